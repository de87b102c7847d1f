"""Dumps: a whole store as lines of JSON, to be kept or loaded into another store, SQLite or etcd.

    {"moorage": "store dump", "schema": 1, "count": 3, "taken": 1790000000.0}
    {"key": "networks/web", "value": "{...}"}
    {"key": "pools/10.64.0.0-16", "value": "{...}"}        in key order; "base64" for what is no text

What belongs to living agents and listeners is left out: leases, intents, fences (writers/), leaders, the incarnation.
Revisions are not kept either. An agent that finds another incarnation, or no fence of its own, knows that the store is
not the one that its journal is about: it reads everything anew and asserts what its endpoints use, as after a restored
backup (ipam/sync.py).

A load marks the store first and writes its schema version last; in between nobody uses it, and an interrupted
load is begun again. With the mark it moves the store's incarnation (ipam/continuity.py): an agent that was cut off then
has no sign of life, and could write into what is being loaded.
"""

from __future__ import annotations

import base64
import binascii
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import IO, Any

import msgspec

from ipam import keys
from ipam.errors import Compacted, InvalidInput, TryAgain
from ipam.records import Incarnation
from ipam.schema import OLDEST, VERSION, check_schema, encode, read_schema
from ipam.store.base import (
    Compare,
    Delete,
    KeyValue,
    Op,
    Put,
    Store,
    Txn,
    none_between,
    prefix_end,
    read_prefix,
    unchanged,
)

TITLE = "store dump"
FIRST, LAST = "!", "\x7f"
"""Every key lies in between."""

LEFT_OUT = (
    keys.SCHEMA,
    keys.ALIVE,
    keys.INTENTS,
    keys.WRITERS,
    keys.LEADERS,
    keys.LISTENERS,
    keys.INCARNATION,
    keys.VOUCHED,
)
PRECIOUS = (keys.NETWORKS, keys.POOLS, keys.BLOCKS, keys.ADDRESSES, keys.RESERVATIONS)
"""What no load may overwrite or mix with."""

KEYS_AT_ONCE = 100
BYTES_AT_ONCE = 512 * 1024
"""In one transaction; etcd takes requests of 1.5 MiB."""


@dataclass(frozen=True, slots=True)
class Dump:
    """A dump's header."""

    schema: int
    count: int
    taken: float


async def dump(store: Store, out: IO[bytes]) -> Dump:
    """Write everything as it stood at one revision. Raises TryAgain while an agent is alive."""
    await _check_no_agent(store)
    schema = await read_schema(store)
    check_schema(schema)
    try:
        revision = (await store.page(FIRST, LAST, limit=1, keys_only=True)).revision
        count = 0
        async for _ in _everything(store, revision, keys_only=True):
            count += 1
        header = Dump(schema.version, count, time.time())
        _write(out, {"moorage": TITLE, "schema": header.schema, "count": count, "taken": header.taken})
        async for kv in _everything(store, revision):
            _write(out, {"key": kv.key, **_value(kv.value)})
    except Compacted as error:
        raise TryAgain(f"the store forgot meanwhile what was to be dumped ({error}); try again") from error
    await _check_no_agent(store)
    return header


def _write(out: IO[bytes], line: dict[str, Any]) -> None:
    out.write(msgspec.json.encode(line) + b"\n")


def _value(value: bytes) -> dict[str, str]:
    try:
        return {"value": value.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


async def _everything(store: Store, revision: int, *, keys_only: bool = False) -> AsyncIterator[KeyValue]:
    cursor: str | None = FIRST
    while cursor is not None:
        page = await store.page(cursor, LAST, revision=revision, keys_only=keys_only)
        for kv in page.items:
            if not kv.lease and not kv.key.startswith(LEFT_OUT):
                yield kv
        cursor = page.next_key


async def _check_no_agent(store: Store) -> None:
    leases, _ = await read_prefix(store, keys.ALIVE)
    if leases:
        names = ", ".join(kv.key.removeprefix(keys.ALIVE) for kv in leases)
        raise TryAgain(
            f"agents are running: {names}; stop all of them first (a killed one counts as running for another 15 s)"
        )


def verify(source: IO[bytes]) -> Dump:
    """Read a dump to its end. Raises InvalidInput saying in which line it is not what was written."""
    header = _header(source)
    count = sum(1 for _ in _lines(source))
    if count != header.count:
        raise InvalidInput(
            f"the dump has {count} of the {header.count} entries that its first line promises; it was cut off, "
            "take another copy"
        )
    return header


def _header(source: IO[bytes]) -> Dump:
    try:
        fields = msgspec.json.decode(source.readline(), type=dict[str, Any])
        if fields["moorage"] != TITLE:
            raise ValueError(f"it is a {fields['moorage']!r}")
        header = Dump(int(fields["schema"]), int(fields["count"]), float(fields["taken"]))
    except (msgspec.MsgspecError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise InvalidInput(
            f"this is no dump of a store ({error}); make one with `moorage store dump FILE`"
        ) from error
    if not OLDEST <= header.schema <= VERSION:
        raise InvalidInput(
            f"the dump has schema version {header.schema} and this moorage knows {OLDEST} to {VERSION}; "
            "load it with the moorage version that made it"
        )
    return header


def _lines(source: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    before = ""
    for number, line in enumerate(source, start=2):
        try:
            fields = msgspec.json.decode(line, type=dict[str, str])
            key = fields["key"]
            value = (
                fields["value"].encode()
                if "value" in fields
                else base64.b64decode(fields["base64"], validate=True)
            )
            if not (key.isascii() and before < key) or key.startswith(LEFT_OUT):
                raise ValueError(f"unexpected key {key!r}")
        except (msgspec.MsgspecError, KeyError, ValueError, binascii.Error, RecursionError) as error:
            raise InvalidInput(
                f"line {number} of the dump is damaged ({error}); take another copy"
            ) from error
        before = key
        yield key, value


async def load(store: Store, source: IO[bytes]) -> Dump:
    """Load a dump, a seekable file, into a store without networks and addresses; all of it is checked before.

    Raises InvalidInput, and TryAgain when the store holds something or an agent is alive.
    """
    header = verify(source)
    source.seek(0)
    _header(source)
    guard = await _begin(store)
    try:
        operations: list[Op] = []
        size = 0
        for key, value in _lines(source):
            operations.append(Put(key, value))
            size += len(key) + len(value)
            if len(operations) == KEYS_AT_ONCE or size >= BYTES_AT_ONCE:
                await _commit(store, (guard,), operations)
                operations, size = [], 0
        await _commit(store, (guard,), operations)
    except InvalidInput as error:  # the file changed since it was verified
        raise TryAgain(f"{error}; the store is not usable before a load is finished") from error
    no_agent = none_between(keys.ALIVE, prefix_end(keys.ALIVE))
    await _commit(store, (guard, no_agent), [Put(keys.SCHEMA, encode(header.schema))])
    return header


async def _begin(store: Store) -> Compare:
    """Mark the store; returns what every further transaction compares. A load that was interrupted is begun again."""
    await _check_no_agent(store)
    schema = await read_schema(store)
    if not schema.loading:
        check_schema(schema)
    empty = () if schema.loading else tuple(none_between(p, prefix_end(p)) for p in PRECIOUS)
    no_agent = none_between(keys.ALIVE, prefix_end(keys.ALIVE))
    mark = Put(keys.SCHEMA, encode(0, loading=True))
    moved = Incarnation(
        id=uuid.uuid4().hex, by="`moorage store load`", why="a dump was loaded", since=time.time()
    )
    incarnation = Put(keys.INCARNATION, moved.encode())
    result = await store.txn(Txn((schema.guard, no_agent, *empty), (mark, incarnation)))
    if not result.succeeded:
        raise TryAgain(
            "the store holds networks or addresses already, or somebody uses it at this moment; a dump is loaded into "
            "an empty store only: name another with --store"
        )
    guard = Compare(keys.SCHEMA, result.revision)
    # Of agents that used the empty store, and of an interrupted load of another dump.
    for prefix in (keys.WRITERS, keys.NODES, *(PRECIOUS if schema.loading else ())):
        stale, _ = await read_prefix(store, prefix)
        for start in range(0, len(stale), KEYS_AT_ONCE):
            some = stale[start : start + KEYS_AT_ONCE]
            await _commit(store, (guard, *map(unchanged, some)), [Delete(kv.key) for kv in some])
    return guard


async def _commit(store: Store, compares: tuple[Compare, ...], operations: list[Op]) -> None:
    if operations and not (await store.txn(Txn(compares, tuple(operations)))).succeeded:
        raise TryAgain(
            "somebody else uses the store or loads into it at this moment; stop that, and load again"
        )
