"""What tests do with the journal of an agent that runs, was killed, or is of another version."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from isolator.journal import Journal
from isolator.journal_file import COLUMNS, names_of, put, rows_of
from isolator.model import Endpoint, EndpointKey

FILES = ("journal.db", "journal.db-wal")


def copy(state: Path, to: Path) -> None:
    """A copy of the journal, of a running agent too."""
    to.mkdir(exist_ok=True)
    for name in FILES:
        if (state / name).exists():
            shutil.copy(state / name, to)


def lose(state: Path) -> None:
    """The journal is gone."""
    for file in state.glob("journal.db*"):
        file.unlink()


def put_back(state: Path, copied: Path) -> None:
    """The journal of a stopped agent is as it was when it was copied."""
    lose(state)
    copy(copied, state)


def endpoints_of(state: Path) -> dict[EndpointKey, Endpoint]:
    """What the journal of a running agent says."""
    with tempfile.TemporaryDirectory() as directory:
        copy(state, Path(directory))
        journal = Journal(Path(directory) / "journal.db", "")
        assert not journal.rebuilt
        found = {endpoint.key: endpoint for endpoint in journal.load_endpoints()}
        journal.close()
    return found


@contextlib.contextmanager
def _opened(state: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(state / "journal.db")) as db, db:
        yield db


def edit(state: Path, endpoint: Callable[[dict[str, Any]], None], **meta: str) -> None:
    """Change the endpoints, and entries of ``meta``, in a stopped agent's journal."""
    with _opened(state) as db:
        changed = []
        for container, ifname, value in list(rows_of(db, "endpoints")):
            fields = json.loads(value)
            endpoint(fields)
            changed.append((container, ifname, json.dumps(fields).encode()))
        put(db, "endpoints", changed)
        put(db, "meta", meta.items())


def make_older(state: Path, schema: int) -> None:
    """Have a stopped agent's journal laid out as before there were checksums (schema 4 and earlier)."""
    with _opened(state) as db:
        for table in COLUMNS:
            columns = ", ".join(names_of(table))
            db.execute(f"CREATE TABLE earlier AS SELECT {columns} FROM {table}")
            db.execute(f"DROP TABLE {table}")
            db.execute(f"ALTER TABLE earlier RENAME TO {table}")
        db.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (str(schema),))
