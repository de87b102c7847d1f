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
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import msgspec
import structlog

from ipam.errors import StoreError
from ipam.journal import AddressRow, BlockRow
from ipam.keys import IPAddress, IPNetwork
from ipam.records import Address, Label
from isolator.errors import JournalCorrupt, JournalUnwritable
from isolator.model import Asked, Bandwidth, Endpoint, EndpointKey, EndpointState, PortMapping

log = structlog.get_logger(__name__)

SCHEMA_VERSION = 5
"""2: endpoints have port mappings and limits. 3: and what their engine calls the network; addresses may be allocated.
4: endpoints have a next hop, and the pools that their container has routes to. 5: it says whose it is, and an endpoint
may be missing.
What an earlier version wrote is read as it is, but never the reverse."""

_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS endpoints (
    container_id TEXT NOT NULL, ifname TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (container_id, ifname)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS addresses (
    ip TEXT PRIMARY KEY, record BLOB NOT NULL, revision INTEGER NOT NULL, dirty INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS blocks (
    block TEXT PRIMARY KEY, pool TEXT NOT NULL, revision INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cache (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tombstones (
    container_id TEXT NOT NULL, ifname TEXT NOT NULL, boot_id TEXT NOT NULL, at INTEGER NOT NULL,
    PRIMARY KEY (container_id, ifname)
) WITHOUT ROWID;
"""


class Journal:
    """See the module's docstring. Used from the event loop's thread only; every call is synchronous.

    rebuilt: the file was unreadable and moved aside; kernel and store have to say what was in it.
    Writes raise JournalUnwritable and then changed nothing.
    """

    def __init__(self, path: Path, boot_id: str) -> None:
        """Open or create the journal. Raises JournalUnwritable; an unreadable file is moved aside."""
        self._path = path
        self._boot_id = boot_id
        self._depth = 0
        self.rebuilt = False
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = self._open()
        except JournalCorrupt as error:
            aside = _move_aside(path)
            log.error(
                "journal was unreadable and is rebuilt from kernel and store", kept=str(aside), why=str(error)
            )
            self.rebuilt = True
            self._db = self._open()
        except OSError as error:
            raise _unwritable(path, error) from error
        self.is_of_this_boot = self._meta("boot_id") == boot_id

    def _open(self) -> sqlite3.Connection:
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            db = sqlite3.connect(self._path, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise _unwritable(self._path, error) from error
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.executescript(_TABLES)
            verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise JournalCorrupt(f"the journal {self._path} is damaged: {verdict}")
            self._db = db
            version = int(self._meta("schema") or SCHEMA_VERSION)
            if version > SCHEMA_VERSION:
                raise StoreError(
                    f"the journal {self._path} was written by a newer moorage (schema {version}); "
                    "start that version, or move the file away to rebuild it from kernel and store"
                )
            if self._meta("schema") != str(SCHEMA_VERSION):
                self._set_meta("schema", str(SCHEMA_VERSION))
            if not self._meta("state_id"):
                self._set_meta("state_id", uuid.uuid4().hex)
            int(self._meta("confirmed_seq") or 0)
            for load in (
                self.load_endpoints,
                self.load_addresses,
                self.load_blocks,
                self.load_cache,
                self.load_tombstones,
            ):
                load()
        except sqlite3.OperationalError as error:
            db.close()
            raise _unwritable(self._path, error) from error
        except (sqlite3.DatabaseError, msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
            db.close()
            raise JournalCorrupt(f"the journal {self._path} is damaged: {error}") from error
        except JournalCorrupt:
            db.close()
            raise
        return db

    def close(self) -> None:
        self._db.close()

    # -- transactions

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Joins the writes inside it into one commit; nests."""
        if self._depth:
            yield
            return
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

    def _run(self, statement: str, rows: Iterable[tuple[Any, ...]] | None = None) -> None:
        try:
            if rows is None:
                self._db.execute(statement)
            else:
                self._db.executemany(statement, rows)
        except sqlite3.Error as error:
            raise _unwritable(self._path, error) from error

    def check_writable(self) -> None:
        """Commit something. Raises JournalUnwritable."""
        self._set_meta("checked", "")

    async def make_durable(self) -> None:
        """What was committed so far survives a power failure from now on. Raises JournalUnwritable."""
        try:
            await asyncio.to_thread(self._sync_log)
        except OSError as error:
            raise _unwritable(self._path, error) from error

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

    # -- meta

    def _meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _set_meta(self, key: str, value: str) -> None:
        self._run("INSERT OR REPLACE INTO meta VALUES (?, ?)", [(key, value)])

    def own_boot(self) -> None:
        """Store and journal agree: from now on what it holds is of this boot, also after a restart."""
        if self._meta("boot_id") != self._boot_id:
            self._set_meta("boot_id", self._boot_id)

    @property
    def confirmed_seq(self) -> int:
        """The last write of this node that the store confirmed, 0 if none is known."""
        return int(self._meta("confirmed_seq") or 0)

    def save_confirmed_seq(self, seq: int) -> None:
        self._set_meta("confirmed_seq", str(seq))

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
    def window(self) -> str:
        """The namespaces that its endpoints were made from (isolator/window.py); "" if none is known."""
        return self._meta("window") or ""

    def save_window(self, window: str) -> None:
        self._set_meta("window", window)

    # -- endpoints and tombstones

    def load_endpoints(self) -> list[Endpoint]:
        rows = self._db.execute("SELECT value FROM endpoints")
        return [_decode_endpoint(value) for (value,) in rows]

    def save_endpoint(self, endpoint: Endpoint) -> None:
        row = (endpoint.key.container_id, endpoint.key.ifname, _encode_endpoint(endpoint))
        self._run("INSERT OR REPLACE INTO endpoints VALUES (?, ?, ?)", [row])

    def drop_endpoint(self, key: EndpointKey) -> None:
        self._run("DELETE FROM endpoints WHERE container_id = ? AND ifname = ?", [tuple(key)])

    def load_tombstones(self) -> dict[EndpointKey, Asked]:
        rows = self._db.execute("SELECT container_id, ifname, boot_id, at FROM tombstones")
        return {EndpointKey(cid, ifname): Asked(boot_id, at) for cid, ifname, boot_id, at in rows}

    def save_tombstone(self, key: EndpointKey, asked: Asked) -> None:
        row = (*key, asked.boot_id, asked.at)
        self._run("INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?, ?)", [row])

    def drop_tombstones(self, keys: Iterable[EndpointKey]) -> None:
        self._run(
            "DELETE FROM tombstones WHERE container_id = ? AND ifname = ?", [tuple(key) for key in keys]
        )

    # -- what IPAM keeps here (ipam/journal.py)

    def load_addresses(self) -> list[AddressRow]:
        rows = self._db.execute("SELECT ip, record, revision, dirty FROM addresses")
        return [
            AddressRow(ip_address(ip), Address.decode(ip, record), revision, bool(dirty))
            for ip, record, revision, dirty in rows
        ]

    def save_addresses(self, rows: Iterable[AddressRow]) -> None:
        encoded = [(str(row.ip), row.record.encode(), row.revision, row.dirty) for row in rows]
        self._run("INSERT OR REPLACE INTO addresses VALUES (?, ?, ?, ?)", encoded)

    def drop_addresses(self, ips: Iterable[IPAddress]) -> None:
        self._run("DELETE FROM addresses WHERE ip = ?", [(str(ip),) for ip in ips])

    def load_blocks(self) -> list[BlockRow]:
        rows = self._db.execute("SELECT block, pool, revision FROM blocks")
        return [BlockRow(ip_network(block), pool, revision) for block, pool, revision in rows]

    def save_block(self, row: BlockRow) -> None:
        self._run(
            "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?)", [(str(row.block), row.pool, row.revision)]
        )

    def drop_block(self, block: IPNetwork) -> None:
        self._run("DELETE FROM blocks WHERE block = ?", [(str(block),)])

    # -- what the catalogue keeps here (ipam/catalogue.py)

    def load_cache(self) -> list[tuple[str, bytes, int]]:
        return list(self._db.execute("SELECT key, value, revision FROM cache"))

    def save_cache(self, changed: Iterable[tuple[str, bytes, int]], gone: Iterable[str]) -> None:
        with self.transaction():
            self._run("INSERT OR REPLACE INTO cache VALUES (?, ?, ?)", changed)
            self._run("DELETE FROM cache WHERE key = ?", [(key,) for key in gone])


def _unwritable(path: Path, error: Exception) -> JournalUnwritable:
    return JournalUnwritable(
        f"the journal {path} cannot be written ({error}); free space on its disk or make it writable, "
        "then try again"
    )


def _move_aside(path: Path) -> Path:
    """Keep a damaged journal for whoever wants to look at it. Its log goes with it: it belongs to it."""
    aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
    return aside


def _encode_endpoint(endpoint: Endpoint) -> bytes:
    return msgspec.json.encode(endpoint, enc_hook=str)


def _decode_endpoint(raw: bytes) -> Endpoint:
    fields = msgspec.json.decode(raw, type=dict[str, Any])
    return Endpoint(
        **{
            **fields,
            "key": EndpointKey(*fields["key"]),
            "state": EndpointState(fields["state"]),
            "asked": Asked(**fields["asked"]),
            "ips": tuple(ip_address(ip) for ip in fields["ips"]),
            "labels": tuple(Label(**label) for label in fields["labels"]),
            **{name: tuple(fields[name]) for name in ("netgroups", "nameservers", "search")},
            "port_mappings": tuple(map(_port_mapping, fields.get("port_mappings", ()))),
            "bandwidth": msgspec.convert(fields.get("bandwidth", {}), Bandwidth),
            "pools": tuple(ip_network(cidr) for cidr in fields.get("pools", ())),
        }
    )


def _port_mapping(fields: dict[str, Any]) -> PortMapping:
    host_ip = fields["host_ip"]
    return PortMapping(**{**fields, "host_ip": None if host_ip is None else ip_address(host_ip)})
