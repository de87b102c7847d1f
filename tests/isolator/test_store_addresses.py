"""Where the store listens, as addresses."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from ipam.taken import parse_all
from isolator import store_addresses
from isolator.store_addresses import StoreAddresses

Answers = dict[str, list[str]]
HERE = ("address 198.18.0.3 eth0", "address fd98::3 eth0", "connected 198.18.0.0/24 eth0")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """What the resolver of the machine would say, by name; [] fails, and a missing name does not answer."""
    known: Answers = {}

    async def getaddrinfo(_: object, name: str, *_args: Any, **_options: Any) -> list[Any]:
        if name not in known:
            await asyncio.Event().wait()
        if not known[name]:
            raise socket.gaierror("not known")
        return [(0, 0, 0, "", (ip, 0)) for ip in known[name]]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(store_addresses, "RESOLVE_WITHIN", 0.05)
    monkeypatch.setattr(store_addresses, "RESOLVE_EVERY", 0.0)
    return known


async def see(of: StoreAddresses, *before: str) -> list[str]:
    return [str(one) for one in await of.look(parse_all(before), parse_all(HERE))]


async def test_addresses_need_nobody() -> None:
    found = StoreAddresses([("198.18.0.9", 2379), ("fd98::9", 2379)])
    assert await see(found) == ["store 198.18.0.9 tcp/2379", "store fd98::9 tcp/2379"]


async def test_a_store_of_the_machine_itself_listens_on_the_machines_addresses() -> None:
    """As far as anybody knows: containers reach it there, or do not."""
    assert await see(StoreAddresses([("127.0.0.1", 2379)])) == [
        "store 198.18.0.3 tcp/2379",
        "store fd98::3 tcp/2379",
    ]


async def test_what_can_be_no_host_name_is_told_and_outlived() -> None:
    found = StoreAddresses([("a..b", 2379), ("198.18.0.9", 2379)])
    assert await see(found) == ["store 198.18.0.9 tcp/2379"]


async def test_a_name_is_all_of_its_addresses_as_they_are_now(answers: Answers) -> None:
    found = StoreAddresses([("etcd", 2379)])
    answers["etcd"] = ["198.18.0.9", "fd98::9"]
    assert await see(found) == ["store 198.18.0.9 tcp/2379", "store fd98::9 tcp/2379"]
    answers["etcd"] = ["198.18.0.10"]
    assert await see(found) == ["store 198.18.0.10 tcp/2379"]


async def test_what_was_known_holds_until_somebody_answers(answers: Answers) -> None:
    found = StoreAddresses([("etcd", 2379), ("198.18.0.1", 2379)])
    before = ("store 198.18.0.9 tcp/2379", "address 198.18.0.3 eth0")
    assert await see(found, *before) == ["store 198.18.0.1 tcp/2379", "store 198.18.0.9 tcp/2379"]


async def test_a_name_that_is_not_resolved_any_more_is_where_it_was(answers: Answers) -> None:
    found = StoreAddresses([("etcd", 2379)])
    answers["etcd"] = ["198.18.0.9"]
    await see(found)
    answers["etcd"] = []
    assert await see(found) == ["store 198.18.0.9 tcp/2379"]
