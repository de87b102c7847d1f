"""Reservations: an IP kept for whoever presents its key."""

from __future__ import annotations

import re

from ipam import keys
from ipam.errors import AlreadyExists, InvalidInput, NotFound, TryAgain
from ipam.keys import IPAddress
from ipam.networks import list_networks
from ipam.nodes_networks import read_nodes_networks
from ipam.pools import geometry
from ipam.records import Reservation
from ipam.store.base import Delete, Put, Store, Txn, absent, read_prefix, unchanged

KEY = re.compile(r"[!-~]{1,255}")
"""A reservation's key: printable ASCII without spaces."""


async def reserve(store: Store, ip: IPAddress, key: str, note: str = "") -> Reservation:
    """Keep ``ip`` for whoever presents ``key``.

    Somebody who has the address now keeps it until it is released. Raises InvalidInput when no pool has
    the address, AlreadyExists when it is reserved under another key.
    """
    if not KEY.fullmatch(key):
        raise InvalidInput(
            f"{key!r} is no reservation key; use 1 to 255 printable ASCII characters without spaces"
        )
    guard = await store.get(keys.POOLSET)
    shapes = [geometry(pool) for _, pools in await list_networks(store) for pool in pools]
    shape = next((s for s in shapes if ip in s.cidr), None)
    if shape is None:
        raise InvalidInput(
            f"{ip} is in no pool (pools: {', '.join(str(s.cidr) for s in shapes) or 'none yet'}); "
            "choose an address of one"
        )
    around = await read_nodes_networks(store)
    if whose := around.why_closed(ip, shape):
        raise InvalidInput(
            f"{ip} of pool {shape.cidr} is given to nobody, because it is in use outside of moorage: {whose}; choose "
            "another address"
        )
    if not shape.usable(ip):
        raise InvalidInput(f"{ip} is excluded from pool {shape.cidr}; choose another address")
    record = Reservation(key=key, network=shape.network, note=note)
    stored = keys.reservation_key(ip)
    same_pools = absent(keys.POOLSET) if guard is None else unchanged(guard)
    result = await store.txn(Txn((absent(stored), same_pools), (Put(stored, record.encode()),)))
    if result.succeeded:
        return record
    found = await get_reservation(store, ip)
    if found is None:
        raise TryAgain(f"the pools changed while {ip} was being reserved; try again")
    if found.key == key:
        return found
    raise AlreadyExists(
        f"{ip} is reserved already under the key {found.key}; free it with `moorage ip unreserve {ip}` first"
    )


async def unreserve(store: Store, ip: IPAddress) -> None:
    """End a reservation; whoever has the address keeps it. Raises NotFound."""
    kv = await store.get(keys.reservation_key(ip))
    if kv is None or not (await store.txn(Txn((unchanged(kv),), (Delete(kv.key),)))).succeeded:
        raise NotFound(f"{ip} is not reserved; see `moorage ip reservations`")


async def get_reservation(store: Store, ip: IPAddress) -> Reservation | None:
    kv = await store.get(keys.reservation_key(ip))
    return None if kv is None else Reservation.decode(kv.key, kv.value)


async def list_reservations(store: Store) -> list[tuple[IPAddress, Reservation]]:
    """All reservations, in address order, IPv4 first."""
    items, _ = await read_prefix(store, keys.RESERVATIONS)
    return [(keys.ip_of(kv.key), Reservation.decode(kv.key, kv.value)) for kv in items]
