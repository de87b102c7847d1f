"""Printing: tables for people, JSON for programs, from the same rows.

A row is a mapping of field names of the records (docs/design.md, section 4) to plain values. JSON prints
all of them; a table prints the columns that a command chooses, in words. On a pipe nothing is cut off or
wrapped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
import msgspec

from ipam.records import Record

Row = Mapping[str, Any]
PIPE_WIDTH = 10_000
"""Columns: wide enough that nothing is ever wrapped where a program may read."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. show: from the row to its text; by default the field called ``title``."""

    title: str
    show: Callable[[Row], str] | None = None

    def text(self, row: Row) -> str:
        return words(row.get(self.title)) if self.show is None else self.show(row)


@dataclass(frozen=True, slots=True)
class Output:
    """Where a command's result goes."""

    as_json: bool

    def rows(self, rows: Sequence[Row], columns: Sequence[Column], none: str) -> None:
        """A list: a JSON array of objects, or a table; ``none`` says on stderr that it is empty."""
        if self.as_json:
            print_json(rows)
        elif not rows:
            click.echo(none, err=True)
        else:
            print_table([c.title for c in columns], ([c.text(r) for c in columns] for r in rows))

    def record(self, record: Row) -> None:
        """One thing: a JSON object, or a line a field."""
        if self.as_json:
            print_json(record)
            return
        plain = {k: v for k, v in record.items() if not is_table(v)}
        width = max((len(key) for key in plain), default=0)
        for key, value in plain.items():
            click.echo(
                f"{key.replace('_', ' '):<{width}}  {age(value) if key == 'since' else words(value)}".rstrip()
            )
        for key, value in record.items():
            if is_table(value):
                click.echo(f"\n{key.replace('_', ' ')}:")
                titles = list(dict.fromkeys(title for row in value for title in row))
                print_table(titles, ([words(row.get(title)) for title in titles] for row in value))

    def done(self, sentence: str, record: Row) -> None:
        """A change was made: the sentence, or the record for programs."""
        if self.as_json:
            print_json(record)
        else:
            click.echo(sentence)


def fields(record: Record) -> dict[str, Any]:
    """A store record's fields as JSON has them, without those that only matter to the store, or to its node."""
    found: dict[str, Any] = msgspec.to_builtins(record)
    found.pop("v")
    found.pop("endpoint", None)  # `moorage endpoint list` shows what it is
    unknown = found.pop("unknown")
    return {**found, **unknown}


def print_json(value: Any) -> None:
    """Indented, one value, UTF-8."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns. Text is printed as it is: rich's own markup in it means nothing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if terminal else PIPE_WIDTH, highlight=False, emoji=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(Text(title.replace("_", " ").upper()), overflow="fold", no_wrap=not terminal)
    for row in rows:
        table.add_row(*(Text(printable(text)) for text in row))
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()), color=terminal)


def words(value: Any) -> str:
    """A plain value as a person would write it; an empty one as a dash."""
    match value:
        case None | "":
            return "-"
        case Mapping() | list() | tuple() if not value:
            return "-"
        case bool():
            return "yes" if value else "no"
        case {"key": key, **rest} if not rest.keys() - {"value"}:
            return key if rest.get("value") is None else f"{key}={rest['value']}"
        case Mapping():
            return ", ".join(f"{key} {words(item)}" for key, item in value.items())
        case list() | tuple():
            return ", ".join(words(item) for item in value)
        case _:
            return printable(str(value))


def printable(text: str) -> str:
    """Labels come from users: what would move the cursor or colour the terminal is shown, not done."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def age(since: Any) -> str:
    """How long ago a wall-clock time was, in its two largest units."""
    if not since:
        return "-"
    seconds = max(0, int(time.time() - since))
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            rest = seconds % size // part
            return f"{seconds // size}{unit}{rest}{part_unit}" if rest else f"{seconds // size}{unit}"
    return f"{seconds}s"


def is_table(value: Any) -> bool:
    """A list of objects that deserves lines of its own; labels, which are pairs, do not."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, Mapping) and not item.keys() <= {"key", "value"} for item in value)
    )
