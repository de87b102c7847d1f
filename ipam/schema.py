"""The version of the store's layout, checked by everybody who opens a store for writing."""

from __future__ import annotations

import msgspec

from ipam import keys
from ipam.errors import StoreError
from ipam.store.base import Put, Store, Txn, absent

VERSION = 1


class SchemaTooNew(StoreError):
    """A newer moorage wrote the store."""


async def ensure_schema(store: Store) -> None:
    """Write the schema version into a new store, or check that this program can work with what is there.

    Raises SchemaTooNew.
    """
    value = msgspec.json.encode({"version": VERSION})
    result = await store.txn(Txn((absent(keys.SCHEMA),), (Put(keys.SCHEMA, value),), ()))
    if result.succeeded:
        return
    found = await store.get(keys.SCHEMA)
    version = msgspec.json.decode(found.value).get("version") if found else None
    if version != VERSION:
        raise SchemaTooNew(
            f"the store has schema version {version} and this moorage knows {VERSION}; "
            "run the moorage version that wrote it, or a newer one"
        )
