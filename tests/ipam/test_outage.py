"""Who waits for the store while it may only be between two leaders, and who is refused once it is away."""

from __future__ import annotations

import asyncio

import pytest

from ipam import outage, refill
from ipam.errors import TryAgain
from ipam.outage import Outage
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network
from tests.patience import PATIENCE


async def test_an_outage_is_told_once_after_its_grace_and_again_only_after_an_answer() -> None:
    told: list[str] = []
    store = Outage(told.append)
    store.failed("first")
    store.failed("second")
    assert (store.why, store.away, told) == ("second", False, [])
    await eventually(lambda: store.away)
    store.failed("third")
    await asyncio.sleep(outage.GRACE * 2)
    assert (store.why, told) == ("third", ["second"])
    store.answered()
    assert (store.why, store.away) == ("", False)
    store.failed("fourth")
    await eventually(lambda: told == ["second", "fourth"])


async def test_who_answers_within_the_grace_was_never_away() -> None:
    told: list[str] = []
    store = Outage(told.append)
    store.failed("election")
    store.answered()
    await asyncio.sleep(outage.GRACE * 2)
    assert (store.away, told) == (False, [])


async def test_a_read_that_fails_opens_the_same_grace_and_only_who_was_answered_ends_what_failed() -> None:
    told: list[str] = []
    store = Outage(told.append)
    store.unread("no member")
    assert (store.why, store.away, told) == ("no member", False, [])
    store.read()
    assert store.why == ""
    await asyncio.sleep(outage.GRACE * 2)
    assert (store.away, told) == (False, []), "it was read within the grace"
    store.failed("no space")
    store.unread("no member")
    await eventually(lambda: store.away)
    store.read()
    assert (store.why, store.away) == ("no space", True), "what can be read may still take no writes"
    store.unread("no member")
    store.answered()
    assert (store.why, store.away) == ("", False)


async def test_on_a_node_that_only_reads_nobody_waits_for_a_store_that_is_away(
    faulty: FaultyStore, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=0)
    await node.start()
    await eventually(node.is_quiet)
    faulty.down = True
    transactions = node.status()["transactions"]
    node.holder.unread("the store does not answer (test)")
    assert (node.status()["in_sync"], node.status()["problem"]) == (False, "the store does not answer (test)")
    await asyncio.sleep(outage.GRACE * 2)
    with pytest.raises(TryAgain, match="does not answer"):
        node.holder.check_ready(net.name)
    monkeypatch.setattr(outage, "GRACE", PATIENCE)
    with pytest.raises(TryAgain, match="does not answer"):
        async with asyncio.timeout(refill.REFILL_PATIENCE / 2):
            await node.take(net)
    assert node.status()["transactions"] == transactions
    faulty.down = False
    node.holder.read()
    assert node.status()["in_sync"]
    assert await node.take(net)


@pytest.mark.parametrize("ips", [(), ("10.64.0.9",)], ids=["any", "by name"])
async def test_who_finds_nothing_warm_waits_while_the_store_elects_a_leader(
    faulty: FaultyStore, node: Node, monkeypatch: pytest.MonkeyPatch, ips: tuple[str, ...]
) -> None:
    monkeypatch.setattr(outage, "GRACE", PATIENCE)
    net = await network(faulty.store, "10.64.0.0/24", warm=0)
    await node.start()
    await eventually(node.is_quiet)
    faulty.fault = lambda _: "refused"
    early = asyncio.create_task(node.take(net, *ips))
    await eventually(lambda: node.holder.problem)
    late = asyncio.create_task(node.take(net))
    await asyncio.sleep(0.1)
    assert not early.done()
    assert not late.done()
    faulty.faults()
    assert len({held.ip for held in await early + await late}) == 2


async def test_once_the_store_is_known_to_be_away_nobody_waits_until_it_answers(
    faulty: FaultyStore, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=0)
    await node.start()
    await eventually(node.is_quiet)
    faulty.fault = lambda _: "refused"
    with pytest.raises(TryAgain, match="does not answer"):
        await node.take(net)
    monkeypatch.setattr(outage, "GRACE", PATIENCE)
    for ips in ((), ("10.64.0.9",)):
        with pytest.raises(TryAgain, match="does not answer"):
            async with asyncio.timeout(refill.REFILL_PATIENCE / 2):
                await node.take(net, *ips)
    faulty.faults()
    await eventually(lambda: not node.holder.problem)
    assert await node.take(net)
