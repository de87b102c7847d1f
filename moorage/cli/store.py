"""``moorage store``: the store as a whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

import click

from ipam import dump as dumps
from ipam import schema
from ipam.dump import Dump
from ipam.errors import InvalidInput
from ipam.store.base import Store
from moorage.cli.session import Session, pass_session


@click.group(short_help="The store as a whole.")
def store() -> None:
    """The store as a whole: dumped, loaded into another one, upgraded.

    \b
    Example:
      moorage store dump /var/backups/moorage.dump
      moorage store load /var/backups/moorage.dump --store etcd://10.0.0.1:2379
    """


@store.command(short_help="Write the store to a file.")
@click.argument("file")
@pass_session
def dump(session: Session, file: str) -> None:
    """Write the store to FILE, or to stdout for "-"; stop all agents before.

    The dump has networks, pools, reservations, blocks, addresses and nodes, a line of JSON each, and
    no running agent's leases. It fits SQLite and etcd alike.

    \b
    Examples:
      moorage store dump /var/backups/moorage.dump
      moorage store dump - | ssh other moorage store load -
    """

    async def act(opened: Store) -> Dump:
        with writing(file) as out:
            return await dumps.dump(opened, out)

    made = session.run(act)
    sentence = f"{made.count} entries of schema version {made.schema} dumped"
    if file == "-":
        click.echo(sentence, err=True)
    else:
        session.out.done(f"{sentence} to {file}", {"file": file, **asdict(made)})


@store.command(short_help="Load a dump into an empty store.")
@click.argument("file")
@pass_session
def load(session: Session, file: str) -> None:
    """Load FILE, or stdin for "-", into an empty store; stop all agents before.

    Refused while the store holds networks or addresses. Agents that are started with the loaded store
    read it anew and assert what their containers use; for 30 s they give out only what was warm. When
    interrupted, run it again.

    \b
    Example:
      moorage store load /var/backups/moorage.dump --store etcd://10.0.0.1:2379,10.0.0.2:2379
    """

    async def act(opened: Store) -> Dump:
        return await dumps.load(opened, source)

    with reading(file) as source:
        dumps.verify(source)
        source.seek(0)
        made = session.run(act, create=True, check=False)
    session.out.done(
        f"{made.count} entries of schema version {made.schema} loaded; start the agents with this store now",
        {"file": file, **asdict(made)},
    )


@store.command(short_help="Move the store to this version's layout.")
@pass_session
def upgrade(session: Session) -> None:
    """Move the store to this version's layout, once every agent is upgraded.

    Refused, and nothing changed, while an agent runs that is too old for it.

    \b
    Example:
      moorage store upgrade
    """
    before, after = session.run(schema.upgrade, check=False)
    moved = before != after
    session.out.done(
        f"the store moved from version {before} to version {after}"
        if moved
        else f"the store is at version {after} already",
        {"from": before, "to": after},
    )


@contextlib.contextmanager
def writing(file: str) -> Iterator[IO[bytes]]:
    """FILE appears when it is complete, readable by its owner only. Raises InvalidInput."""
    if file == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(file)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as out:
            try:
                yield out
                out.flush()
                os.fsync(out.fileno())
                Path(out.name).replace(path)
            except BaseException:
                Path(out.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise InvalidInput(f"{file} cannot be written ({error.strerror}); name another file") from error


@contextlib.contextmanager
def reading(file: str) -> Iterator[IO[bytes]]:
    """FILE, or a copy of stdin: a dump is read twice. Raises InvalidInput."""
    with contextlib.ExitStack() as stack:
        try:
            if file == "-":
                source: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(sys.stdin.buffer, source)
                source.seek(0)
            else:
                source = stack.enter_context(Path(file).open("rb"))
        except OSError as error:
            raise InvalidInput(f"{file} cannot be read ({error.strerror}); name another file") from error
        yield source
