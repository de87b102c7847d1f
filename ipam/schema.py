"""The version of the store's layout: checked by everybody who opens a store, moved by `moorage store upgrade`.

schema = {"version": 1}                     what the records look like
         {"version": 1, "upgrading": 2}     on its way; who does not know 2 does not start any more
         {"version": 0, "loading": true}    half of a dump is in it (ipam/dump.py); nobody may use it
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ipam import keys
from ipam.errors import MoorageError, StoreError, TryAgain
from ipam.records import Node
from ipam.store.base import Compare, KeyValue, Op, Put, Store, Txn, absent, read_prefix, unchanged

VERSION = 1
"""The newest version that this program knows, and which it gives a new store."""

OLDEST = 1
"""The oldest one it can work with: agents are upgraded before the store is."""

FEATURE = "schema-"
"""In a node's ``features``, with a number: the newest version that its agent knows."""


class SchemaMismatch(StoreError):
    """This program cannot work with the store as it is."""


class SchemaTooNew(SchemaMismatch):
    """A newer moorage wrote the store."""


class LoadUnfinished(SchemaMismatch):
    """Only a part of a dump was loaded into the store."""


@dataclass(frozen=True, slots=True)
class Schema:
    """What the schema key says. found: the key, None in a new store."""

    found: KeyValue | None
    version: int
    upgrading: int = 0
    loading: bool = False

    @property
    def guard(self) -> Compare:
        """Holds while it says the same."""
        return absent(keys.SCHEMA) if self.found is None else unchanged(self.found)


async def read_schema(store: Store) -> Schema:
    """Raises StoreError when the key cannot be read."""
    found = await store.get(keys.SCHEMA)
    if found is None:
        return Schema(None, VERSION)
    try:
        fields = msgspec.json.decode(found.value, type=dict[str, Any])
        return Schema(
            found, int(fields["version"]), int(fields.get("upgrading", 0)), bool(fields.get("loading"))
        )
    except (msgspec.MsgspecError, KeyError, ValueError, TypeError) as error:
        raise StoreError(
            f"the store's key {keys.SCHEMA} cannot be read ({error}); restore the store from a backup"
        ) from error


def encode(version: int, **more: Any) -> bytes:
    """The schema key's value."""
    return msgspec.json.encode({"version": version, **more})


async def ensure_schema(store: Store) -> Schema:
    """Write the schema version into a new store, or check that this program can work with what is there.

    Raises SchemaMismatch.
    """
    new = await store.txn(Txn((absent(keys.SCHEMA),), (Put(keys.SCHEMA, encode(VERSION)),)))
    schema = await read_schema(store)
    if not new.succeeded:
        check_schema(schema)
    return schema


def check_schema(schema: Schema) -> None:
    """Raises SchemaMismatch when this program cannot work with it."""
    if schema.loading:
        raise LoadUnfinished(
            "the store holds a part of a dump only; run `moorage store load` again with the same file"
        )
    version = max(schema.version, schema.upgrading)
    if version > VERSION:
        raise SchemaTooNew(
            f"the store has schema version {version} and this moorage knows {VERSION}; "
            "run the moorage version that wrote it, or a newer one"
        )
    if version < OLDEST:
        raise SchemaMismatch(
            f"the store has schema version {version} and this moorage needs {OLDEST} or newer; "
            "upgrade it first with the moorage version before this one (`moorage store upgrade`)"
        )


Commit = Callable[[Sequence[Compare], Sequence[Op]], Awaitable[bool]]
"""A transaction of a migration: whether its compares held. Raises TryAgain when the schema moved meanwhile."""


@dataclass(frozen=True, slots=True)
class Migration:
    """A step to ``version`` from the one before it.

    apply: rewrites records through Commit. Runs while agents that know both versions live, and runs again from
    its start when it was interrupted, so it passes over what it finds done.
    """

    version: int
    apply: Callable[[Store, Commit], Awaitable[None]]


MIGRATIONS: tuple[Migration, ...] = ()
"""In the order of their versions; the last leads to VERSION."""


async def upgrade(store: Store, migrations: Sequence[Migration] = MIGRATIONS) -> tuple[int, int]:
    """Move the store to the newest version that is known; returns (from, to).

    Raises SchemaMismatch, and TryAgain naming the agents that are alive and too old; they go on undisturbed.
    """
    schema = await read_schema(store)
    newest = max((m.version for m in migrations), default=VERSION)
    if schema.loading or max(schema.version, schema.upgrading) > newest:
        check_schema(schema)
    first = schema.version
    for migration in migrations:
        if migration.version > schema.version:
            schema = await _migrate(store, schema, migration)
    return first, schema.version


async def _migrate(store: Store, schema: Schema, migration: Migration) -> Schema:
    """Announced first: an agent that is too old and starts now does not register any more."""
    marked = await _move(store, schema, schema.version, upgrading=migration.version)
    if old := await _too_old(store, migration.version):
        await _move(store, marked, schema.version)
        raise TryAgain(
            f"agents that are too old for schema version {migration.version} are running: {', '.join(old)}; upgrade "
            "moorage there and restart them, or stop them, then try again"
        )

    async def commit(compares: Sequence[Compare], operations: Sequence[Op]) -> bool:
        if (await store.txn(Txn((marked.guard, *compares), tuple(operations)))).succeeded:
            return True
        if (await read_schema(store)).found != marked.found:
            raise _moved()
        return False

    await migration.apply(store, commit)
    return await _move(store, marked, migration.version)


async def _move(store: Store, schema: Schema, version: int, **more: int) -> Schema:
    if not (await store.txn(Txn((schema.guard,), (Put(keys.SCHEMA, encode(version, **more)),)))).succeeded:
        raise _moved()
    return await read_schema(store)


def _moved() -> MoorageError:
    return TryAgain("somebody else upgrades the store at this moment; try again")


async def _too_old(store: Store, version: int) -> list[str]:
    """The names of nodes whose agents live and do not know ``version``."""
    leases, _ = await read_prefix(store, keys.ALIVE)
    old = []
    for name in (kv.key.removeprefix(keys.ALIVE) for kv in leases):
        kv = await store.get(keys.NODES + name)
        if kv is None or newest_of(Node.decode(kv.key, kv.value)) < version:
            old.append(name)
    return old


def newest_of(node: Node) -> int:
    """The newest schema version that a node's agent says it knows."""
    said = [f.removeprefix(FEATURE) for f in node.features if f.startswith(FEATURE)]
    return max((int(number) for number in said if number.isdecimal()), default=1)
