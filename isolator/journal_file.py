"""The journal's file: its layout, its checksums, and what tells a damaged file from one that cannot be used now.

A damaged file is moved aside and begun anew. So nothing may count as damage that goes away by itself, or by an
operator's hand: a lock, missing rights, a full disk, a disk that does not answer. Everything else does.

The write-ahead log has checksums of SQLite's own, by which it ends where damage begins, silently: what was committed
after that would be lost. ``check_log`` looks whether something was. A log that was cut off after a commit shows no
trace; then the journal is as it was once, which the fence in the store tells (ipam/sync.py).
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ipam.errors import StoreError
from isolator.errors import JournalCorrupt, JournalUnwritable

SCHEMA_VERSION = 5
"""2: endpoints have port mappings and limits. 3: and what their engine calls the network; addresses may be allocated.
4: endpoints have a next hop, and the pools that their container has routes to. 5: rows have checksums;
it says whose it is, and an endpoint may be missing.
What an earlier version wrote is read as it is, but never the reverse."""

COLUMNS = {
    "meta": ("key TEXT", "value TEXT"),
    "endpoints": ("container_id TEXT", "ifname TEXT", "value BLOB"),
    "addresses": ("ip TEXT", "record BLOB", "revision INTEGER", "dirty INTEGER"),
    "blocks": ("block TEXT", "pool TEXT", "revision INTEGER"),
    "cache": ("key TEXT", "value BLOB", "revision INTEGER"),
    "tombstones": ("container_id TEXT", "ifname TEXT", "boot_id TEXT", "at INTEGER"),
}
_KEYS = {"endpoints": ("container_id", "ifname"), "tombstones": ("container_id", "ifname")}
"""Columns that name a row, where it is not the first alone."""

Row = Sequence[Any]

_MAGIC = b"SQLite format 3\0"
_VERSIONS = slice(18, 20)
"""Of the file's header: how it is written and read; 2 is with a write-ahead log (sqlite.org/fileformat)."""
_IN_WAL_MODE = b"\2\2"

_NOT_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOLFS,
        sqlite3.SQLITE_AUTH,
    }
)


def names_of(table: str) -> list[str]:
    """The names of a table's columns, without the checksum's."""
    return [column.partition(" ")[0] for column in COLUMNS[table]]


def keys_of(table: str) -> Sequence[str]:
    """The names of the columns that name a row."""
    return _KEYS.get(table, names_of(table)[:1])


def _create(table: str) -> str:
    columns = ", ".join(f"{column} NOT NULL" for column in (*COLUMNS[table], "crc INTEGER"))
    return f"CREATE TABLE {table} ({columns}, PRIMARY KEY ({', '.join(keys_of(table))})) WITHOUT ROWID"


def checksum(table: str, row: Row) -> int:
    """Of a row, its types and where it belongs."""
    return zlib.crc32(repr((table, *row)).encode())


def put(db: sqlite3.Connection, table: str, rows: Iterable[Row]) -> None:
    """Write rows, in place of those with the same keys. Not one commit by itself."""
    marks = ", ".join("?" * (len(COLUMNS[table]) + 1))
    db.executemany(
        f"INSERT OR REPLACE INTO {table} VALUES ({marks})", ((*row, checksum(table, row)) for row in rows)
    )


def rows_of(db: sqlite3.Connection, table: str, where: str = "", values: Row = ()) -> Iterator[Row]:
    """Rows as they were written. Raises JournalCorrupt, sqlite3.Error."""
    found = db.execute(f"SELECT {', '.join(names_of(table))}, crc FROM {table} {where}", values)
    width = len(keys_of(table))
    before: Row = []
    for *row, crc in found:
        if crc != checksum(table, row):
            raise JournalCorrupt(f"a row of its table {table} is not what was written")
        # Else a row that is there would not be found by its key, and be written a second time.
        if before and before >= row[:width]:
            raise JournalCorrupt(f"the rows of its table {table} are not in order")
        before = row[:width]
        yield row


def prepare(db: sqlite3.Connection) -> None:
    """Make the tables, if the file is new, or has those of an earlier version.

    Raises JournalCorrupt, StoreError for a file of a newer moorage, sqlite3.Error.
    """
    known = dict(db.execute("SELECT name, sql FROM sqlite_master"))
    if not known:
        _begin(db, {})
        return
    has_checksums = any(row[1] == "crc" for row in db.execute("PRAGMA table_info(meta)"))
    meta = rows_of(db, "meta") if has_checksums else _earlier(db, "meta")
    version = next((int(value) for key, value in meta if key == "schema"), SCHEMA_VERSION)
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"it was written by a newer moorage (schema {version}); start that version, or move the file away to "
            "rebuild it from kernel and store"
        )
    if has_checksums:
        if known != {table: _create(table) for table in COLUMNS}:
            raise JournalCorrupt("its tables are not those that were made")
    else:
        _begin(db, {table: _earlier(db, table) for table in COLUMNS if table in known})


def _earlier(db: sqlite3.Connection, table: str) -> list[Row]:
    """Rows of a version that had no checksums."""
    return list(db.execute(f"SELECT {', '.join(names_of(table))} FROM {table}"))


def _begin(db: sqlite3.Connection, rows: dict[str, list[Row]]) -> None:
    """Make all tables anew with these rows, in one commit."""
    db.execute("BEGIN IMMEDIATE")
    try:
        for table in rows:
            db.execute(f"DROP TABLE {table}")
        for table in COLUMNS:
            db.execute(_create(table))
            put(db, table, rows.get(table, ()))
        put(db, "meta", [("schema", str(SCHEMA_VERSION))])
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise


def write_copy(path: Path, tables: dict[str, list[Row]]) -> None:
    """A journal with these rows beside the one at ``path``, whole and durable; ``place_copy`` puts it there.

    Raises sqlite3.Error, OSError.
    """
    begun = _begun_copy(path)
    _unlink(begun)
    db = sqlite3.connect(begun, isolation_level=None)
    try:
        begun.chmod(0o600)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        _begin(db, {})
        db.execute("BEGIN IMMEDIATE")
        for table, rows in tables.items():
            put(db, table, rows)
        db.execute("COMMIT")
    finally:
        db.close()
    begun.rename(_copy(path))


def place_copy(path: Path) -> None:
    """Put what ``write_copy`` wrote in the place of what is at ``path``. Raises OSError."""
    # It would take another one's log for its own.
    _unlink(path, ("-wal", "-shm"))
    _copy(path).rename(path)


def finish_copy(path: Path) -> bool:
    """Whether an agent was killed between the two, and the copy is at ``path`` now. Raises OSError."""
    _unlink(_begun_copy(path))
    if not _copy(path).exists():
        return False
    if path.exists():
        _copy(path).unlink()  # what was written since stands there
        return False
    place_copy(path)
    return True


def _copy(path: Path) -> Path:
    return path.with_name(f"{path.name}.anew")


def _begun_copy(path: Path) -> Path:
    return path.with_name(f"{path.name}.anew-begun")


def _unlink(path: Path, suffixes: Sequence[str] = ("", "-wal", "-shm")) -> None:
    for suffix in suffixes:
        Path(f"{path}{suffix}").unlink(missing_ok=True)


# -- what is damage


def check_header(path: Path) -> None:
    """Raises JournalCorrupt for what SQLite would open in another way than it was written. OSError."""
    with path.open("rb") as file:
        header = file.read(100)
    log = Path(f"{path}-wal")
    if not header and log.exists() and log.stat().st_size > _LOG_HEADER.size:
        raise JournalCorrupt("it is empty, and its log is not")
    if header and (header[: len(_MAGIC)] != _MAGIC or header[_VERSIONS] != _IN_WAL_MODE):
        raise JournalCorrupt("its header is not the one of a journal")


def check_log(path: Path) -> None:
    """Raises JournalCorrupt if the log has a commit that SQLite does not see, OSError.

    To be called when the database was read. What a killed agent leaves is a transaction of which the last frame may
    be torn; nothing of the same log comes after it.
    """
    try:
        log = Path(f"{path}-wal").read_bytes()
        index = Path(f"{path}-shm").read_bytes()
    except FileNotFoundError:
        return
    if len(log) <= _LOG_HEADER.size:
        return
    magic, _, page, _, *salts, first, second = _LOG_HEADER.unpack_from(log)
    if (first, second) != _log_checksum(log[:24], big=bool(magic & 1)) or not 512 <= page <= 65536:
        raise JournalCorrupt("the header of its log is damaged")
    (seen,) = struct.unpack_from("=I", index, 16)
    step = _FRAME.size + page
    frames = range(_LOG_HEADER.size + seen * step, len(log) - _FRAME.size + 1, step)
    beyond = [(place, *_FRAME.unpack_from(log, place)) for place in frames]
    ours = [(place, size) for place, _, size, *of, _, _ in beyond if of == salts]
    is_row = all(place == frames.start + number * step for number, (place, _) in enumerate(ours))
    if not is_row or any(size for _, size in ours[:-1]):
        raise JournalCorrupt("its log is damaged before its last commit")


_LOG_HEADER = struct.Struct(">8I")  # magic, version, page size, checkpoint, two salts, checksum of two words
_FRAME = struct.Struct(
    ">6I"
)  # page, size of the database after a commit else 0, two salts, two words of checksum


def _log_checksum(raw: bytes, *, big: bool) -> tuple[int, int]:
    """SQLite's, of a log (sqlite.org/fileformat2.html#checksum_algorithm)."""
    first = second = 0
    words = struct.unpack(f"{'>' if big else '<'}{len(raw) // 4}I", raw)
    for one, other in zip(words[::2], words[1::2], strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second


def is_damage(error: sqlite3.Error) -> bool:
    """Whether it says that the file's content is wrong, and not that it cannot be used now."""
    # What Python finds, such as text that is no UTF-8, has no code.
    code = getattr(error, "sqlite_errorcode", None)
    return code is None or code == sqlite3.SQLITE_IOERR_SHORT_READ or code & 0xFF not in _NOT_DAMAGE


_CURES = {
    sqlite3.SQLITE_BUSY: "end the program that has it locked, such as a sqlite3 shell or a backup",
    sqlite3.SQLITE_LOCKED: "end the program that has it locked, such as a sqlite3 shell or a backup",
    sqlite3.SQLITE_FULL: "free space on its disk",
    sqlite3.SQLITE_IOERR: "see in the kernel's log whether its disk fails, and that there is space on it",
}


def unusable(path: Path, error: Exception) -> JournalUnwritable:
    """The error for a file that is left as it is."""
    cure = _CURES.get(
        getattr(error, "sqlite_errorcode", 0) & 0xFF, "free space on its disk or make it writable"
    )
    return JournalUnwritable(f"the journal {path} cannot be written ({error}); {cure}, then try again")


def move_aside(path: Path, why: str = "corrupt") -> Path:
    """Keep a file for whoever wants to look at it. Its log goes with it: it belongs to it. Raises OSError."""
    aside = path.with_name(f"{path.name}.{why}-{time.time_ns()}")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
    return aside
