"""However a journal is damaged, it is recognised and begun anew, or nothing of what was written is different.

The short run has a fixed seed; MOORAGE_DAMAGES=100000 runs a campaign of that many, MOORAGE_SEED names another one.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import structlog

from ipam.journal import BlockRow
from isolator.journal import Journal
from isolator.model import Asked, EndpointKey, EndpointState
from tests.isolator.test_journal import ADDRESS, BOOT, ENDPOINT

DAMAGES = int(os.environ.get("MOORAGE_DAMAGES", "300"))
SEED = int(os.environ.get("MOORAGE_SEED", "20261201"))
PAGE = 4096

State = tuple[Any, ...]


@dataclass(frozen=True)
class Original:
    """A journal as a killed agent left it. states: what it held after each of its commits, the last one last."""

    directory: Path
    states: list[State]


def state_of(journal: Journal) -> State:
    """All that it holds."""
    return (
        journal.load_endpoints(),
        journal.load_addresses(),
        journal.load_blocks(),
        journal.load_cache(),
        journal.load_tombstones(),
        journal.confirmed_seq,
        journal.is_of_this_boot,
        journal.drained,
    )


def written(directory: Path, *, checkpointed: int, commits: int) -> Original:
    """A journal with a history: ``checkpointed`` commits in the file, the rest in its log."""
    live = directory / "live"
    journal = Journal(live / "journal.db", BOOT)
    states = []
    for number in range(commits):
        ip = ip_address(f"10.0.0.{number + 1}")
        key = EndpointKey(f"container-{number % 40}", "eth0")
        with journal.transaction():
            state = EndpointState.ATTACHED if number % 3 else EndpointState.DETACHING
            journal.save_endpoint(replace(ENDPOINT, key=key, state=state))
            journal.save_addresses([replace(ADDRESS, ip=ip, revision=number, dirty=number % 2 == 0)])
            journal.save_block(BlockRow(ip_network(f"10.0.{number % 9}.0/26"), "10.0.0.0-24", number))
            journal.save_tombstone(key, Asked(BOOT, number))
            journal.save_cache([(f"networks/{number % 7}", b"{}" * number, number)], [])
            journal.save_confirmed_seq(number)
            if number % 5 == 4:
                journal.drop_endpoints([key])
        if number == 0:
            journal.own_boot()
            journal.is_of_this_boot = True
        if number + 1 == checkpointed:
            journal._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        states.append(state_of(journal))
    kept = directory / "original"
    kept.mkdir()
    for file in live.glob("journal.db*"):
        if not file.name.endswith("-shm"):  # a start makes it anew
            shutil.copy(file, kept)
    journal.close()
    return Original(kept, states)


Damage = Callable[[random.Random, Path], bool]
"""Whether what was committed last may be lost without a trace."""


def pick(dice: random.Random, path: Path) -> Path:
    """The file or its log."""
    log = Path(f"{path}-wal")
    return log if log.exists() and log.stat().st_size and dice.random() < 0.5 else path


def some_bytes(dice: random.Random, path: Path) -> bool:
    file = pick(dice, path)
    raw = bytearray(file.read_bytes())
    for _ in range(dice.choice([1, 1, 2, 8, 64])):
        raw[dice.randrange(len(raw))] ^= dice.randrange(1, 256)
    file.write_bytes(raw)
    return file != path


def a_few_bits_of_a_header(dice: random.Random, path: Path) -> bool:
    file = pick(dice, path)
    raw = bytearray(file.read_bytes())
    page = dice.randrange(max(1, len(raw) // PAGE)) * PAGE
    raw[min(len(raw) - 1, page + dice.randrange(100))] = dice.choice([0, 1, 2, 5, 10, 13, 127, 255])
    file.write_bytes(raw)
    return file != path


def a_stretch(dice: random.Random, path: Path) -> bool:
    file = pick(dice, path)
    raw = bytearray(file.read_bytes())
    at, length = dice.randrange(len(raw)), dice.choice([16, 512, PAGE, 3 * PAGE])
    raw[at : at + length] = dice.choice([bytes(length), dice.randbytes(length), b"\xff" * length])[
        : len(raw) - at
    ]
    file.write_bytes(raw)
    return file != path


def pages_swapped(dice: random.Random, path: Path) -> bool:
    raw = bytearray(path.read_bytes())
    one, other = (dice.randrange(len(raw) // PAGE) * PAGE for _ in range(2))
    raw[one : one + PAGE], raw[other : other + PAGE] = raw[other : other + PAGE], raw[one : one + PAGE]
    path.write_bytes(raw)
    return False


def cut_at_a_page(dice: random.Random, path: Path) -> bool:
    file = pick(dice, path)
    size = file.stat().st_size
    step, first = (PAGE, 0) if file == path else (PAGE + 24, 32)
    os.truncate(file, max(0, min(size, first + dice.randrange(1 + size // step) * step)))
    # A file of no bytes is as good as none: a new journal.
    return file != path or not path.stat().st_size


def cut_anywhere(dice: random.Random, path: Path) -> bool:
    file = pick(dice, path)
    os.truncate(file, dice.randrange(1, file.stat().st_size))
    return file != path


def a_value(dice: random.Random, path: Path) -> bool:
    """A row of another type or content, well-formed for SQLite."""
    table, column = dice.choice(
        [
            ("meta", "value"),
            ("endpoints", "value"),
            ("addresses", "record"),
            ("addresses", "revision"),
            ("addresses", "dirty"),
            ("blocks", "pool"),
            ("cache", "value"),
            ("tombstones", "at"),
            ("endpoints", "crc"),
        ]
    )
    value = dice.choice([b"\xff\xfe", "text", 7, 1.5, "", dice.randbytes(30), 2**62])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.text_factory = bytes
        db.execute(f"UPDATE {table} SET {column} = ?", (value,))
    return False


def the_schema(dice: random.Random, path: Path) -> bool:
    change = dice.choice(
        [
            "UPDATE sqlite_master SET sql = replace(sql, 'revision', 'revisiom')",
            "UPDATE sqlite_master SET sql = replace(sql, 'INTEGER', 'TEXT')",
            "UPDATE sqlite_master SET name = 'b' || name, tbl_name = 'b' || tbl_name WHERE name = 'blocks'",
            "DELETE FROM sqlite_master WHERE name = 'addresses'",
            "UPDATE sqlite_master SET rootpage = rootpage + 1 WHERE name = 'cache'",
            "UPDATE sqlite_master SET rootpage = 0",
            "UPDATE sqlite_master SET type = 'index' WHERE name = 'endpoints'",
            "UPDATE sqlite_master SET sql = NULL WHERE name = 'meta'",
        ]
    )
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute(change)
    return False


KINDS: list[Damage] = [
    some_bytes,
    some_bytes,
    a_few_bits_of_a_header,
    a_stretch,
    pages_swapped,
    cut_at_a_page,
    cut_anywhere,
    a_value,
    the_schema,
]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory that no disk has to write."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="moorage-journal-") as directory:
        yield Path(directory)


@pytest.fixture
def quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.mark.usefixtures("quiet")
def test_a_damaged_journal_is_never_served_with_what_was_not_written(memory: Path) -> None:
    dice = random.Random(SEED)
    originals = []
    for checkpointed, commits in ((60, 60), (25, 60), (0, 12)):
        directory = memory / f"{checkpointed}"
        directory.mkdir()
        originals.append(written(directory, checkpointed=checkpointed, commits=commits))
    counts: Counter[str] = Counter()
    place = memory / "damaged"
    for number in range(DAMAGES):
        original, kind = dice.choice(originals), dice.choice(KINDS)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(original.directory, place)
        may_lose = kind(dice, place / "journal.db")
        which = f"damage {number} of seed {SEED}: {kind.__name__} of {original.directory.parent.name}"
        try:
            journal = Journal(place / "journal.db", BOOT)
        except Exception as error:
            raise AssertionError(f"{which}: the journal is not opened") from error
        found = state_of(journal)
        was_rebuilt = journal.rebuilt
        journal.close()
        if was_rebuilt:
            assert found[:5] == ([], [], [], [], {}), which
            assert list(place.glob("journal.db.corrupt-*")), which
            counts["rebuilt"] += 1
        elif found == original.states[-1]:
            counts["whole"] += 1
        else:
            # A log that ends early is one of an earlier moment; the fence tells (ipam/sync.py).
            assert may_lose, which
            assert found[5] == 0 or any(found == state for state in original.states), which
            counts["earlier"] += 1
    print(f"seed {SEED}: {dict(counts)}")
