"""The store's file: made once and whole, opened carefully, and what its errors mean.

    /var/lib/moorage/            0700
        store.db                 0600, the tables below
        store.db-wal, -shm       SQLite's write-ahead log and its index, while a process has it open

A new store is built under another name and then linked into place, so a file called ``store.db`` is
always a complete store: one that is empty or has no tables has been damaged, and is refused, never
filled anew.

After it is linked the file is opened by SQLite only. POSIX drops a process's locks on a file when that
process closes *any* descriptor of it, SQLite's own locks included.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from ipam.errors import Ambiguous, StoreError, StoreUnavailable

SCHEMA = 1
"""Version of the tables below; a file with a higher one is refused."""

BUSY_TIMEOUT = 5.0
"""Seconds to wait for another process's write. Theirs take milliseconds: longer means one is stuck."""

WAL_LIMIT = 16 * 2**20
"""Bytes that the write-ahead log is cut back to after a burst."""

TABLES = """
    -- schema: see SCHEMA. revision: the last one. oldest: the oldest that can be read or watched.
    CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;

    -- A key had this value from `revision` until `ended` (exclusive; NULL: it still has).
    -- A deletion is an end that no version of the same revision follows.
    CREATE TABLE versions (
        key TEXT NOT NULL,
        revision INTEGER NOT NULL,
        ended INTEGER,
        created INTEGER NOT NULL,
        lease INTEGER NOT NULL,
        value BLOB NOT NULL,
        PRIMARY KEY (key, revision)
    ) WITHOUT ROWID;
    CREATE UNIQUE INDEX live ON versions (key) WHERE ended IS NULL;
    CREATE INDEX by_revision ON versions (revision, key);
    CREATE INDEX by_end ON versions (ended, key) WHERE ended IS NOT NULL;
    CREATE INDEX by_lease ON versions (lease) WHERE ended IS NULL AND lease <> 0;

    -- deadline: CLOCK_BOOTTIME in the boot named boot_id, seconds. AUTOINCREMENT: no id comes back.
    CREATE TABLE leases (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        deadline REAL NOT NULL,
        boot_id TEXT NOT NULL
    );

    INSERT INTO meta VALUES ('revision', 1), ('oldest', 1);
"""


_INACCESSIBLE = (
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_PROTOCOL,
)


class Database:
    """One connection to a store's file, for the one thread that opens it."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError (damaged, foreign, newer), StoreUnavailable."""
        self.path = path
        with translated(path):
            self.connection = _connect(path)
            self._identity = _identity(path)
            self._log = path.with_name(f"{path.name}-wal")
            try:
                _check_schema(self.connection, path)
                _set_up(self.connection)
                self._version = self._data_version()
                # There from the first look on, and until the last connection is closed.
                self._log_identity = _identity(self._log)
            except BaseException:
                self.connection.close()
                raise

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the file that is open."""
        return self._identity or (0, 0)

    def close(self) -> None:
        self.connection.close()

    def verify(self) -> None:
        """Look for damage in the whole file: 50 ms for 100,000 keys. Raises StoreError."""
        with translated(self.path):
            found = self.connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            # SQLite's answer opens with a line that only says which database.
            raise _damaged(self.path, str(found).splitlines()[-1])

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One snapshot for everything read inside."""
        self._check_identity()
        with translated(self.path):
            self.connection.execute("BEGIN")
            try:
                yield self.connection
            finally:
                self._roll_back()

    @contextlib.contextmanager
    def writing(self, *, patient: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction: all that is written inside stands on the disk afterwards, or nothing.

        Another writer is waited for, up to BUSY_TIMEOUT, only by the patient.
        Raises StoreUnavailable if it certainly was not applied, Ambiguous if the disk failed during the
        commit itself: the log may hold it, and recovery after a crash would then bring it back.
        """
        self._check_identity()
        with translated(self.path):
            self._begin(patient)
            try:
                yield self.connection
            except BaseException:
                self._roll_back()
                raise
        with translated(self.path, committing=True):
            try:
                self.connection.execute("COMMIT")
            except BaseException:
                self._roll_back()
                raise

    def changed(self) -> bool:
        """Whether another connection, of any process, committed since the last call."""
        self._check_identity()
        with translated(self.path):
            before, self._version = self._version, self._data_version()
        return before != self._version

    def _data_version(self) -> int:
        version: int = self.connection.execute("PRAGMA data_version").fetchone()[0]
        return version

    def _begin(self, patient: bool) -> None:
        if patient:
            self.connection.execute("BEGIN IMMEDIATE")
            return
        self.connection.execute("PRAGMA busy_timeout = 0")
        try:
            self.connection.execute("BEGIN IMMEDIATE")
        finally:
            self.connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT * 1000)}")

    def _roll_back(self) -> None:
        # SQLite ends the transaction by itself on some errors (a full disk, for one).
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")

    def _check_identity(self) -> None:
        # SQLite would go on with a file that was deleted or renamed, and every write would be lost.
        with translated(self.path):
            is_there = _identity(self.path) == self._identity
            if is_there and _identity(self._log) == self._log_identity:
                return
        if is_there:
            raise StoreUnavailable(
                f"the write-ahead log {self._log.name} of the store {self.path} was removed or replaced while in use, "
                "so others would not see what is written; restart moorage on this node, which keeps what was"
            )
        raise StoreUnavailable(
            f"the store {self.path} was moved or replaced while in use; "
            "put it back, or restart moorage on this node to open the one that is there now"
        )


def open_database(path: Path) -> Database:
    """Open the store at ``path``, made if there is none, and look for damage. Raises like Database."""
    if not exists(path):
        create(path)
    database = Database(path)
    try:
        database.verify()
    except BaseException:
        database.close()
        raise
    return database


def exists(path: Path) -> bool:
    """Raises StoreUnavailable if this user may not even look."""
    with translated(path):
        return path.exists()


def create(path: Path) -> None:
    """Make an empty store at ``path``, unless another process was faster. Raises StoreError."""
    log = path.with_name(path.name + "-wal")
    # In this order: whoever makes a store links the file before its log appears.
    if log.exists() and not path.exists():
        raise StoreError(
            f"the store {path} is gone but its write-ahead log {log.name}, which holds its latest writes, "
            f"is still there; put both back from where they were moved, or remove {log} to start empty"
        )
    with translated(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        try:
            _fill(Path(name))
            _sync(Path(name))
            with contextlib.suppress(FileExistsError):
                os.link(name, path)
        finally:
            for leftover in (name, f"{name}-wal", f"{name}-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(leftover)
        _sync(path.parent)


@contextlib.contextmanager
def translated(path: Path, *, committing: bool = False) -> Iterator[None]:
    """Turns SQLite's and the file system's errors into ours."""
    try:
        yield
    except sqlite3.Error as error:
        raise _explained(error, path, committing) from error
    except OSError as error:
        raise StoreUnavailable(
            f"the store {path} cannot be opened ({error.strerror}); "
            "check that the path exists and that this user may write there"
        ) from error


def _explained(error: sqlite3.Error, path: Path, committing: bool) -> StoreError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return _damaged(path, str(error))
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreUnavailable(
            f"the store {path} was kept locked by another process for {BUSY_TIMEOUT:g} s, "
            f"nothing was written; try again, and if it stays so find that process with: fuser -v {path}"
        )
    if code == sqlite3.SQLITE_FULL:
        return StoreUnavailable(
            f"the disk that holds the store {path} is full, nothing was written; "
            "free some space on it, moorage then goes on by itself"
        )
    if code == sqlite3.SQLITE_IOERR and committing:
        return Ambiguous(
            f"the disk that holds the store {path} failed during a commit ({error}), which may or may not "
            "stand; check the disk (dmesg)"
        )
    if code in _INACCESSIBLE:
        return StoreUnavailable(
            f"the store {path} cannot be read or written ({error}); "
            "check its owner and mode, that its file system is writable and has space, and the disk (dmesg)"
        )
    return StoreError(f"the store {path} refused a request ({error}), a defect of moorage; please report it")


def _damaged(path: Path, what: str) -> StoreError:
    # Not `sqlite3 ... .recover`, which would be the natural advice: Debian 12's fails on every file.
    aside = path.parent / "damaged"
    return StoreError(
        f"the store {path} is damaged or is no moorage store ({what}), and was left as it is; "
        f"stop moorage on this node, put it aside with: mkdir {aside} && mv {path}* {aside}/ , and copy your "
        f"latest backup to {path}, or start without one: the agent then asserts the addresses it holds anew, "
        "and you create networks, pools and reservations again"
    )


def _connect(path: Path) -> sqlite3.Connection:
    # mode=rw: SQLite itself never creates a store. isolation_level None: we say BEGIN ourselves.
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw", uri=True, timeout=BUSY_TIMEOUT, isolation_level=None
    )


def _fill(path: Path) -> None:
    connection = _connect(path)
    try:
        _set_up(connection)
        # Nobody knows this file yet: it is synced once, when it is whole.
        connection.execute("PRAGMA synchronous = OFF")
        connection.executescript(f"BEGIN; {TABLES}; INSERT INTO meta VALUES ('schema', {SCHEMA}); COMMIT;")
    finally:
        connection.close()


def _set_up(connection: sqlite3.Connection) -> None:
    (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreError(
            "the store's file system cannot hold a write-ahead log, which needs memory shared between "
            "processes (a network file system, perhaps); put the store on a local disk"
        )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT}")


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'meta'").fetchone():
        raise _damaged(path, "it has no table meta")
    row = connection.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
    if row is None or not isinstance(row[0], int):
        raise _damaged(path, "its table meta has no schema version")
    if row[0] > SCHEMA:
        raise StoreError(
            f"the store {path} was written by a newer moorage (schema {row[0]}, this one knows {SCHEMA}); "
            "install that version on this node too"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
