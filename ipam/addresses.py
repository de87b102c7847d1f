"""Reading addresses from the store, for people and tools."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ipam import keys
from ipam.keys import IPAddress
from ipam.records import Address
from ipam.store.base import Store, prefix_end, scan


async def list_addresses(
    store: Store, *, network: str | None = None, node: str | None = None, state: str | None = None
) -> AsyncIterator[tuple[IPAddress, Address, int]]:
    """(ip, record, mod_revision) of every address in the store that matches, in order, at one revision."""
    async for kv in scan(store, keys.ADDRESSES, prefix_end(keys.ADDRESSES)):
        address = Address.decode(kv.key, kv.value)
        if (
            (network is None or address.network == network)
            and (node is None or address.node == node)
            and (state is None or address.state == state)
        ):
            yield keys.ip_of(kv.key), address, kv.mod_revision


async def get_address(store: Store, ip: IPAddress) -> tuple[Address, int] | None:
    """(record, mod_revision) of one address, None if it is free."""
    kv = await store.get(keys.address_key(ip))
    return None if kv is None else (Address.decode(kv.key, kv.value), kv.mod_revision)
