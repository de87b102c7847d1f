from __future__ import annotations

from ipaddress import ip_address

import pytest

from ipam.errors import AlreadyExists, InvalidInput, NotFound
from ipam.reservations import get_reservation, list_reservations, reserve, unreserve
from ipam.store import Store
from tests.ipam.nodes import network

IP = ip_address("10.64.0.7")


async def test_a_reservation_is_kept_with_its_key_network_and_note(store: Store) -> None:
    await network(store, "10.64.0.0/24")
    record = await reserve(store, IP, "db", note="the database")
    assert (record.key, record.network, record.note) == ("db", "prod", "the database")
    assert await get_reservation(store, IP) == record


async def test_reservations_are_listed_in_address_order_ipv4_first(store: Store) -> None:
    await network(store, "10.64.0.0/24", "fd00:64::/64")
    for ip in ("fd00:64::5", "10.64.0.20", "10.64.0.3"):
        await reserve(store, ip_address(ip), "db")
    assert [str(ip) for ip, _ in await list_reservations(store)] == ["10.64.0.3", "10.64.0.20", "fd00:64::5"]


async def test_the_same_reservation_again_is_no_error(store: Store) -> None:
    await network(store, "10.64.0.0/24")
    assert await reserve(store, IP, "db") == await reserve(store, IP, "db")


async def test_an_address_reserved_under_another_key_is_refused_naming_it(store: Store) -> None:
    await network(store, "10.64.0.0/24")
    await reserve(store, IP, "db")
    with pytest.raises(
        AlreadyExists, match=r"under the key db; free it with `moorage ip unreserve 10\.64\.0\.7`"
    ):
        await reserve(store, IP, "web")


@pytest.mark.parametrize(
    ("ip", "key", "message"),
    [
        ("10.99.0.1", "db", "in no pool"),
        ("10.64.0.0", "db", "excluded from pool"),
        ("10.64.0.7", "two words", "no reservation key"),
        ("10.64.0.7", "", "no reservation key"),
        ("10.64.0.7", "x" * 256, "no reservation key"),
    ],
)
async def test_a_reservation_that_makes_no_sense_is_refused(
    store: Store, ip: str, key: str, message: str
) -> None:
    await network(store, "10.64.0.0/24")
    with pytest.raises(InvalidInput, match=message):
        await reserve(store, ip_address(ip), key)


async def test_an_ended_reservation_is_gone_and_can_be_made_anew(store: Store) -> None:
    await network(store, "10.64.0.0/24")
    await reserve(store, IP, "db")
    await unreserve(store, IP)
    assert await get_reservation(store, IP) is None
    with pytest.raises(NotFound, match="is not reserved"):
        await unreserve(store, IP)
    assert (await reserve(store, IP, "web")).key == "web"
