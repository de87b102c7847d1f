"""The journal: what this node's agent must not forget, in one SQLite file.

    meta        key -> value             schema, the boot that wrote it, last confirmed write (fence); whose it is: the
                                         node's name, an id of its own, agents that wrote it, and from where
    endpoints   container_id, ifname ->  one Endpoint, JSON
    addresses   ip ->                    Address record, its revision in the store, dirty
    blocks      base/size ->             pool, revision
    cache       store key ->             networks, pools and reservations as last seen
    tombstones  container_id, ifname ->  when it was deleted, against late ADDs

An ADD is one commit: the endpoint and its addresses, marked dirty. The dirty addresses together are
the outbox, so the two can never disagree.

Commits are written to the write-ahead log without waiting for the disk: a killed agent loses nothing,
and after a power failure every namespace is gone anyway, so only a lost commit that *forgets* an address
could hurt. ``make_durable`` is awaited before such an address is given away.

Every row has a checksum. What cannot be read, or is not what was written, is moved aside, and the journal is begun
anew; a file that cannot be opened, locked or written is left alone (journal_file.py, which also has the layout).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TypeAlias

import msgspec
import structlog

from ipam.errors import StoreError
from ipam.journal import AddressRow, BlockRow
from ipam.keys import IPAddress, IPNetwork
from ipam.records import Address
from isolator import journal_file
from isolator.errors import JournalCorrupt
from isolator.journal_file import COLUMNS, Row
from isolator.model import Asked, Endpoint, EndpointKey
from isolator.written import decode_endpoint, encode_endpoint

log = structlog.get_logger(__name__)

_Identity: TypeAlias = tuple[tuple[int, int] | None, ...]
"""Device and inode of the file and its log; None of one that is not there."""


class Journal:
    """See the module's docstring. Used from the event loop's thread only; every call is synchronous.

    rebuilt: the file was damaged and moved aside; kernel and store have to say what was in it.
    Writes raise JournalUnwritable and then changed nothing.
    """

    def __init__(self, path: Path, boot_id: str) -> None:
        """Open or create the journal; a damaged file is moved aside.

        Raises JournalUnwritable for one that cannot be used now, StoreError for a newer moorage's.
        """
        self._path = path
        self._boot_id = boot_id
        self._depth = 0
        self.rebuilt = False
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if journal_file.finish_copy(path):
                log.warning("journal had been removed; what a killed agent wrote anew is gone on with")
            try:
                self._db = self._open()
            except JournalCorrupt as error:
                aside = journal_file.move_aside(path)
                log.error(
                    "journal is damaged and is rebuilt from kernel and store", kept=str(aside), why=str(error)
                )
                self.rebuilt = True
                self._db = self._open()
            self._identity = self._on_disk()
        except OSError as error:
            raise journal_file.unusable(path, error) from error
        if not self.state_id:
            self._set_meta("state_id", uuid.uuid4().hex)
        self.is_of_this_boot = self._meta("boot_id") == boot_id
        self._attempts = int(self._meta("attempts") or 0)

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        journal_file.check_header(self._path)
        db = None
        try:
            db = sqlite3.connect(self._path, isolation_level=None)
            self._check(db)
        except sqlite3.Error as error:
            _close(db)
            if journal_file.is_damage(error):
                raise JournalCorrupt(f"the journal {self._path} is damaged: {error}") from error
            raise journal_file.unusable(self._path, error) from error
        except (JournalCorrupt, msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
            # A ValueError also of text that is no UTF-8, be it in a message of SQLite's.
            _close(db)
            raise JournalCorrupt(f"the journal {self._path} is damaged: {error}") from error
        except BaseException:
            _close(db)
            raise
        return db

    def _check(self, db: sqlite3.Connection) -> None:
        """Raises StoreError for a newer one; anything else but sqlite3.Error and OSError for a damaged one."""
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise JournalCorrupt(str(verdict))
        journal_file.check_log(self._path)
        try:
            journal_file.prepare(db)
        except StoreError as error:
            raise StoreError(f"the journal {self._path} cannot be used: {error}") from error
        self._db = db
        known = {str(key): value for key, value in journal_file.rows_of(db, "meta")}
        for number in ("confirmed_seq", "attempts"):
            int(known.get(number) or 0)
        _ = self.instances
        try:
            self.load_addresses()
        except StoreError as error:
            raise JournalCorrupt(str(error)) from error
        for load in (self.load_endpoints, self.load_blocks, self.load_cache, self.load_tombstones):
            load()

    def close(self) -> None:
        self._db.close()

    # -- transactions

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Joins the writes inside it into one commit; nests."""
        if self._depth:
            yield
            return
        self.keep_in_place()
        self._run("BEGIN IMMEDIATE")
        self._depth = 1
        try:
            yield
            self._run("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        finally:
            self._depth = 0

    def _run(self, statement: str) -> None:
        try:
            self._db.execute(statement)
        except sqlite3.Error as error:
            raise journal_file.unusable(self._path, error) from error

    def _put(self, table: str, rows: Iterable[Row]) -> None:
        """Write rows, all or none."""
        with self.transaction():
            try:
                journal_file.put(self._db, table, rows)
            except sqlite3.Error as error:
                raise journal_file.unusable(self._path, error) from error

    def _drop(self, table: str, keys: Iterable[Row]) -> None:
        """Delete rows, all or none."""
        which = " AND ".join(f"{column} = ?" for column in journal_file.keys_of(table))
        with self.transaction():
            try:
                self._db.executemany(f"DELETE FROM {table} WHERE {which}", keys)
            except sqlite3.Error as error:
                raise journal_file.unusable(self._path, error) from error

    def check_writable(self) -> None:
        """Commit something. Raises JournalUnwritable."""
        self._set_meta("checked", "")

    async def make_durable(self) -> None:
        """What was committed so far survives a power failure from now on. Raises JournalUnwritable."""
        try:
            await asyncio.to_thread(self._sync_log)
        except OSError as error:
            raise journal_file.unusable(self._path, error) from error

    def _sync_log(self) -> None:
        # In WAL mode a commit is durable once the log is; a checkpoint syncs what it moves by itself.
        try:
            file = os.open(f"{self._path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            os.fsync(file)
        finally:
            os.close(file)

    # -- that it is the file on the disk

    def _on_disk(self) -> _Identity:
        return tuple(_inode(Path(f"{self._path}{suffix}")) for suffix in ("", "-wal"))

    def keep_in_place(self) -> None:
        """Write everything anew if somebody removed or replaced the file, or its log: SQLite would go on with what
        nobody finds after a restart. Two calls of stat(2) if all is well. Raises JournalUnwritable."""
        if self._depth:
            return
        try:
            found = self._on_disk()
            if found == self._identity:
                return
            log.error(
                "journal was removed or replaced under the agent; it is written anew", path=str(self._path)
            )
            journal_file.write_copy(
                self._path, {table: list(journal_file.rows_of(self._db, table)) for table in COLUMNS}
            )
            if found[0] not in (None, self._identity[0]):
                journal_file.move_aside(self._path, "replaced")
            # It takes a log along that may be somebody else's by now.
            self._db.close()
            journal_file.place_copy(self._path)
            self._db = self._open()
            self._identity = self._on_disk()
        except OSError as error:
            raise journal_file.unusable(self._path, error) from error
        except sqlite3.Error as error:
            raise journal_file.unusable(self._path, error) from error

    # -- meta

    def _meta(self, key: str) -> str | None:
        row = next(journal_file.rows_of(self._db, "meta", "WHERE key = ?", (key,)), None)
        return None if row is None else str(row[1])

    def _set_meta(self, key: str, value: str) -> None:
        self._put("meta", [(key, value)])

    def own_boot(self) -> None:
        """Store and journal agree: from now on what it holds is of this boot, also after a restart."""
        if self._meta("boot_id") != self._boot_id:
            self._set_meta("boot_id", self._boot_id)

    @property
    def confirmed_seq(self) -> int:
        """The last write of this node that the store confirmed, 0 if none is known."""
        return int(self._meta("confirmed_seq") or 0)

    def save_confirmed_seq(self, seq: int) -> None:
        with self.transaction():
            self._set_meta("confirmed_seq", str(seq))
            if self._attempts:
                self._set_meta("attempts", "0")
        self._attempts = 0

    @property
    def unconfirmed(self) -> int:
        """How many writes of this node the store may have confirmed at most since ``confirmed_seq`` was saved."""
        return self._attempts + 1

    def note_attempt(self) -> None:
        """The fence is about to be claimed, which may move it."""
        self._set_meta("attempts", str(self._attempts + 1))
        self._attempts += 1

    @property
    def drained(self) -> bool:
        """Whether the node is drained (ipam/drain.py)."""
        return self._meta("drained") == "yes"

    def save_drained(self, drained: bool) -> None:
        self._set_meta("drained", "yes" if drained else "no")

    def load_known(self) -> bytes | None:
        """What was known of the store's history (ipam/continuity.py)."""
        known = self._meta("store")
        return None if known is None else known.encode()

    def save_known(self, known: bytes) -> None:
        self._set_meta("store", known.decode())

    def load_grace(self) -> bytes | None:
        """The time in which nothing new is taken (ipam/grace.py)."""
        kept = self._meta("grace")
        return kept.encode() if kept else None

    def save_grace(self, kept: bytes | None) -> None:
        self._set_meta("grace", "" if kept is None else kept.decode())

    # -- whose it is

    @property
    def state_id(self) -> str:
        """Made with the journal, and never changed: copies of it say the same."""
        return self._meta("state_id") or ""

    @property
    def node(self) -> str:
        """The name of the node that it is of; "" if no agent of this version said."""
        return self._meta("node") or ""

    def save_node(self, node: str) -> None:
        self._set_meta("node", node)

    @property
    def instances(self) -> list[str]:
        """The agents that may have written to the store what it holds, oldest first; each is saved before it does."""
        return msgspec.json.decode(self._meta("instances") or "[]", type=list[str])

    def save_instances(self, instances: Sequence[str]) -> None:
        self._set_meta("instances", msgspec.json.encode(instances).decode())

    @property
    def machine_id(self) -> str:
        """The machine whose agent wrote it last, once journal and store agreed; "" if none said."""
        return self._meta("machine_id") or ""

    def save_machine_id(self, machine_id: str) -> None:
        self._set_meta("machine_id", machine_id)

    @property
    def window(self) -> str:
        """The namespaces that its endpoints were made from (isolator/window.py); "" if none is known."""
        return self._meta("window") or ""

    def save_window(self, window: str) -> None:
        self._set_meta("window", window)

    # -- endpoints and tombstones

    def load_endpoints(self) -> list[Endpoint]:
        return [decode_endpoint(value) for *_, value in journal_file.rows_of(self._db, "endpoints")]

    def save_endpoint(self, endpoint: Endpoint) -> None:
        self._put("endpoints", [(*endpoint.key, encode_endpoint(endpoint))])

    def drop_endpoints(self, keys: Iterable[EndpointKey]) -> None:
        self._drop("endpoints", keys)

    def load_tombstones(self) -> dict[EndpointKey, Asked]:
        return {
            EndpointKey(cid, ifname): Asked(boot_id, at)
            for cid, ifname, boot_id, at in journal_file.rows_of(self._db, "tombstones")
        }

    def save_tombstone(self, key: EndpointKey, asked: Asked) -> None:
        self._put("tombstones", [(*key, asked.boot_id, asked.at)])

    def drop_tombstones(self, keys: Iterable[EndpointKey]) -> None:
        self._drop("tombstones", keys)

    # -- what IPAM keeps here (ipam/journal.py)

    def load_addresses(self) -> list[AddressRow]:
        return [
            AddressRow(ip_address(ip), Address.decode(ip, record), revision, bool(dirty))
            for ip, record, revision, dirty in journal_file.rows_of(self._db, "addresses")
        ]

    def save_addresses(self, rows: Iterable[AddressRow]) -> None:
        self._put(
            "addresses", [(str(row.ip), row.record.encode(), row.revision, int(row.dirty)) for row in rows]
        )

    def drop_addresses(self, ips: Iterable[IPAddress]) -> None:
        self._drop("addresses", [(str(ip),) for ip in ips])

    def load_blocks(self) -> list[BlockRow]:
        return [
            BlockRow(ip_network(block), pool, revision)
            for block, pool, revision in journal_file.rows_of(self._db, "blocks")
        ]

    def save_block(self, row: BlockRow) -> None:
        self._put("blocks", [(str(row.block), row.pool, row.revision)])

    def drop_block(self, block: IPNetwork) -> None:
        self._drop("blocks", [(str(block),)])

    # -- what the catalogue keeps here (ipam/catalogue.py)

    def load_cache(self) -> list[tuple[str, bytes, int]]:
        return [(key, value, revision) for key, value, revision in journal_file.rows_of(self._db, "cache")]

    def save_cache(self, changed: Iterable[tuple[str, bytes, int]], gone: Iterable[str]) -> None:
        with self.transaction():
            self._put("cache", changed)
            self._drop("cache", [(key,) for key in gone])


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _close(db: sqlite3.Connection | None) -> None:
    if db is not None:
        with contextlib.suppress(sqlite3.Error):
            db.close()
