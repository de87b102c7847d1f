"""`moorage ip check` against planted violations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ipam import checks, keys
from ipam.checks import CheckReport, Finding, check
from ipam.intents import IntentServer
from ipam.records import Address, AddressState, Alive, Block, Intent
from ipam.store import Delete, Put, Store, Txn
from tests.ipam.faulty import eventually
from tests.ipam.nodes import Node, network


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SETTLE", 0.1)


async def plant(store: Store, key: str, value: bytes) -> None:
    await store.txn(Txn(then=(Put(key, value),)))


def address(**fields: Any) -> bytes:
    record = Address(
        pool="10.64.0.0-24", state=AddressState.ASSIGNED, node="n9", container_id="c", ifname="eth0"
    )
    return record.with_(**fields).encode()


def block(**fields: Any) -> bytes:
    return Block(pool="10.64.0.0-24", size=26, node="n9", claimed_at=0.0).with_(**fields).encode()


async def test_a_store_as_it_should_be_has_no_finding(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", "fd00:64::/64")
    await node.start()
    await node.add(net, "c1")
    await eventually(node.is_quiet)
    report = await check(store)
    assert report.findings == []
    assert report.addresses == 10
    assert report.nodes_silent == ["n1"]
    assert "n1 holds 10 addresses and its agent gives no sign of life" in report.notes[0]


IP = keys.address_key(ip_address("10.64.0.9"))
OUTSIDE = keys.address_key(ip_address("10.99.0.9"))
BLOCK = keys.block_key(ip_network("10.64.0.64/26"))


@pytest.mark.parametrize(
    ("key", "value", "invariant", "problem", "evidence"),
    [
        (
            OUTSIDE,
            address(network="late"),
            5,
            "lies outside every pool",
            {"node": "n9", "network": "late", "pool": "10.64.0.0-24", "container": "c/eth0"},
        ),
        (IP, address(pool="x"), 5, "names another pool than it lies in", {"says": "x", "is": "10.64.0.0-24"}),
        (IP, address(container_id=""), 2, "is assigned to nobody", {"node": "n9"}),
        (IP, b"garbage", 5, "is no valid address record", None),
        (keys.ADDRESSES + "4/xyz", address(), 5, "is no valid address record", None),
        (BLOCK, block(pool="gone"), 5, "is a block of no pool", {"node": "n9", "pool": "gone"}),
        (BLOCK, block(size=27), 5, "is a block of no pool", {"node": "n9", "pool": "10.64.0.0-24"}),
        (BLOCK, block(size=20), 5, "is no valid block record", None),
        (BLOCK, b"garbage", 5, "is no valid block record", None),
        (keys.BLOCKS + "4/xyz", block(), 5, "is no valid block record", None),
        (keys.POOLS + "bad", b"garbage", 5, "is no valid pool record", None),
    ],
)
async def test_a_planted_violation_is_found_with_its_evidence(
    store: Store, key: str, value: bytes, invariant: int, problem: str, evidence: dict[str, str] | None
) -> None:
    await network(store, "10.64.0.0/24")
    await plant(store, key, value)
    (finding,) = (await check(store)).findings
    assert (finding.invariant, finding.problem) == (invariant, problem)
    assert finding.evidence.get("error") if evidence is None else finding.evidence == evidence


async def test_addresses_of_a_network_that_the_store_forgot_lead_to_what_makes_it_again(store: Store) -> None:
    await network(store, "10.64.0.0/24")
    for ip, pool, name in [
        ("10.65.0.9", "10.65.0.0-24", "late"),
        ("fd65::9", "fd65::-64", "late"),
        ("10.66.0.9", "10.66.0.0-24", "prod"),
    ]:
        await plant(store, keys.address_key(ip_address(ip)), address(pool=pool, network=name))
    warm = address(pool="10.67.0.0-24", network="prod", state=AddressState.WARM, container_id="", ifname="")
    await plant(store, keys.address_key(ip_address("10.67.0.9")), warm)
    steps = {finding.subject: finding.repair for finding in (await check(store)).findings}
    for ip in ("10.65.0.9", "fd65::9"):
        assert "`moorage network create late --pool 10.65.0.0/24 --pool fd65::/64`" in steps[ip]
        assert "end container c/eth0" in steps[ip]
    assert "`moorage network set prod --add-pool 10.66.0.0/24`" in steps["10.66.0.9"]
    assert "node n9" in steps["10.67.0.9"]


After = Callable[[Txn], None]


@pytest.fixture
def after_each_look(store: Store, monkeypatch: pytest.MonkeyPatch) -> After:
    """after_each_look(txn): every look at the store is followed by this transaction."""
    real = checks._look

    def follow_with(txn: Txn) -> None:
        async def look(*args: Any, **options: Any) -> Any:
            seen = await real(*args, **options)
            await store.txn(txn)
            return seen

        monkeypatch.setattr(checks, "_look", look)

    return follow_with


async def test_a_violation_that_is_gone_at_the_second_look_is_no_finding(
    store: Store, after_each_look: After
) -> None:
    await network(store, "10.64.0.0/24")
    await plant(store, OUTSIDE, address())
    after_each_look(Txn(then=(Delete(OUTSIDE),)))
    assert (await check(store)).findings == []


async def test_a_violation_that_only_the_second_look_sees_is_no_finding(
    store: Store, after_each_look: After
) -> None:
    await network(store, "10.64.0.0/24")
    await plant(store, OUTSIDE, address())
    after_each_look(Txn(then=(Put(IP, b"garbage"),)))
    assert [f.problem for f in (await check(store)).findings] == ["lies outside every pool"]


async def checked(store: Store, answers: dict[str, dict[str, Any]], *, repair: bool = False) -> CheckReport:
    """A check while agents of these names answer so."""
    servers = []
    for name, answer in answers.items():
        await plant(store, keys.ALIVE + name, Alive(instance=name, boot_id="b").encode())

        async def reply(intent: Intent, answer: dict[str, Any] = answer) -> dict[str, Any]:
            return {**answer, "notes": [f"repair={intent.evidence['repair']}"]}

        servers.append(asyncio.create_task(IntentServer(store, name, reply).run()))
    try:
        return await check(store, repair=repair)
    finally:
        for server in servers:
            server.cancel()


async def test_an_address_carried_on_two_nodes_is_found(store: Store) -> None:
    carried = {name: {"carried": {"10.64.0.9": f"{name}-c (eth0)"}} for name in ("n1", "n2")}
    (finding,) = (await checked(store, carried)).findings
    assert (finding.invariant, finding.subject) == (1, "10.64.0.9")
    assert finding.evidence == {"endpoints": "n1-c (eth0) on n1, n2-c (eth0) on n2"}


@pytest.mark.parametrize(("unwritten", "found"), [([], 1), (["10.64.0.9"], 0)])
async def test_a_carried_address_that_the_store_does_not_know_is_found_unless_it_is_on_its_way(
    store: Store, unwritten: list[str], found: int
) -> None:
    answer = {"carried": {"10.64.0.9": "c (eth0)"}, "unwritten": unwritten}
    findings = (await checked(store, {"n1": answer})).findings
    assert [(f.invariant, f.subject) for f in findings] == [(3, "10.64.0.9")] * found


async def test_what_agents_find_and_repair_is_reported(store: Store) -> None:
    row = {
        "invariant": 4,
        "subject": "mrg1",
        "problem": "is a stray",
        "evidence": {"a": 1},
        "repair": "removed",
    }
    report = await checked(store, {"n1": {"findings": [row], "repaired": [row]}}, repair=True)
    assert report.findings == report.repaired == [Finding(4, "mrg1", "is a stray", {"a": "1"}, "removed")]
    assert (report.nodes_asked, report.notes) == (1, ["node n1: repair=True"])


async def test_only_the_second_look_repairs(store: Store) -> None:
    row = {"invariant": 4, "subject": "mrg1", "problem": "is a stray"}
    asked: list[bool] = []

    async def reply(intent: Intent) -> dict[str, Any]:
        asked.append(intent.evidence["repair"])
        return {"findings": [row]}

    await plant(store, keys.ALIVE + "n1", Alive(instance="i", boot_id="b").encode())
    server = asyncio.create_task(IntentServer(store, "n1", reply).run())
    await check(store, repair=True)
    server.cancel()
    assert asked == [False, True]


async def test_an_agent_that_does_not_answer_is_noted_and_no_finding(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checks.ask
    monkeypatch.setattr(checks, "ask", lambda store, node, intent: real(store, node, intent, timeout=0.1))
    await plant(store, keys.ALIVE + "n1", Alive(instance="i", boot_id="b").encode())
    report = await check(store)
    assert (report.findings, report.nodes_silent, report.nodes_asked) == ([], ["n1"], 0)
    assert "did not answer" in report.notes[0]
