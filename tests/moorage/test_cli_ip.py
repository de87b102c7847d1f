"""``moorage ip`` on a real store, with a stand-in for the agent that answers intents."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import pytest

from ipam import keys
from ipam.checks import CheckReport, Finding
from ipam.intents import IntentServer
from ipam.records import Address, AddressState, Alive, Intent, Label, Node
from ipam.store import Put, Store, Txn, open_store
from tests.moorage.agents import answering
from tests.moorage.conftest import CommandLine

ASSIGNED = Address(
    pool="10.64.0.0-24",
    state=AddressState.ASSIGNED,
    node="a",
    id="id1",
    container_id="c1",
    ifname="eth0",
    network="web",
    engine="mesos",
    netgroups=["web", "db"],
    labels=[Label("tier", "front")],
    since=1.0,
)
WARM = Address(pool="10.64.0.0-24", state=AddressState.WARM, node="b", network="web")


@pytest.fixture
def filled(moorage: CommandLine) -> CommandLine:
    """A command line on a store with a network, one assigned and one warm address."""
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")

    async def fill(store: Store) -> None:
        for ip, record in (("10.64.0.5", ASSIGNED), ("10.64.0.6", WARM)):
            await store.txn(Txn(then=(Put(keys.address_key(ip_address(ip)), record.encode()),)))

    moorage.on_store(fill)
    return moorage


def test_a_row_has_the_fields_of_an_address_record(filled: CommandLine) -> None:
    assert filled.json("ip", "list")[0] == {
        "address": "10.64.0.5",
        "pool": "10.64.0.0-24",
        "state": "assigned",
        "node": "a",
        "id": "id1",
        "container_id": "c1",
        "ifname": "eth0",
        "network": "web",
        "engine": "mesos",
        "netgroups": ["web", "db"],
        "labels": [{"key": "tier", "value": "front"}],
        "app": "",
        "task": "",
        "framework": "",
        "reservation": "",
        "uid": "",
        "former": "",
        "since": 1.0,
    }


@pytest.mark.parametrize(
    ("options", "addresses"),
    [
        ([], ["10.64.0.5", "10.64.0.6"]),
        (["--state", "warm"], ["10.64.0.6"]),
        (["--node", "a"], ["10.64.0.5"]),
        (["--network", "web"], ["10.64.0.5", "10.64.0.6"]),
        (["--node", "b", "--state", "warm"], ["10.64.0.6"]),
        (["--network", "web", "--state", "cooling"], []),
    ],
)
def test_lists_are_filtered(filled: CommandLine, options: list[str], addresses: list[str]) -> None:
    assert [row["address"] for row in filled.json("ip", "list", *options)] == addresses


def test_a_filter_that_names_nothing_is_no_empty_list(filled: CommandLine) -> None:
    assert "there is no network 'wbe' (known: web)" in filled.fails("ip", "list", "--network", "wbe")
    assert "there is no node 'z'" in filled.fails("ip", "list", "--node", "z")


def test_the_table_of_addresses(filled: CommandLine) -> None:
    lines = filled.ok("ip", "list").splitlines()
    assert lines[0] == "ADDRESS    STATE     NETWORK  NODE  CONTAINER  IFNAME  NETGROUPS  APP  AGE"
    assert lines[1].startswith("10.64.0.5  assigned  web      a     c1         eth0    web, db    -    ")
    assert lines[2].split() == ["10.64.0.6", "warm", "web", "b", "-", "-", "-", "-", "-"]


def test_show_says_who_has_an_address(filled: CommandLine) -> None:
    shown = filled.json("ip", "show", "10.64.0.5")
    assert (shown["state"], shown["container_id"], shown["reservation"]) == ("assigned", "c1", None)
    assert "container id  c1" in filled.ok("ip", "show", "10.64.0.5")


def test_show_says_that_an_address_is_free_or_excluded(filled: CommandLine) -> None:
    assert filled.json("ip", "show", "10.64.0.7") == {
        "address": "10.64.0.7",
        "state": "free",
        "pool": "10.64.0.0-24",
        "network": "web",
        "reservation": None,
    }
    assert filled.json("ip", "show", "10.64.0.0")["state"] == "excluded"


def test_show_of_an_address_in_no_pool_names_the_pools(filled: CommandLine) -> None:
    assert filled.fails("ip", "show", "10.9.0.1") == (
        "10.9.0.1 is in no pool (pools: 10.64.0.0/24); correct the address"
    )


def test_a_reservation_is_made_listed_shown_and_ended(filled: CommandLine) -> None:
    reservation = {"address": "10.64.0.9", "key": "web-front", "network": "web", "note": "partner X"}
    made = filled.json("ip", "reserve", "10.64.0.9", "--key", "web-front", "--note", "partner X")
    assert made == reservation
    assert filled.json("ip", "reservations", "--network", "web") == [reservation]
    assert filled.json("ip", "reservations", "--network", "other") == []
    assert filled.json("ip", "show", "10.64.0.9")["reservation"]["key"] == "web-front"
    assert "key web-front" in filled.ok("ip", "show", "10.64.0.9")
    assert filled.ok("ip", "unreserve", "10.64.0.9") == "10.64.0.9 is not reserved any more\n"
    assert filled.json("ip", "reservations") == []
    assert "10.64.0.9 is not reserved" in filled.fails("ip", "unreserve", "10.64.0.9")


def test_a_reserved_address_is_not_reserved_under_another_key(filled: CommandLine) -> None:
    filled.ok("ip", "reserve", "10.64.0.9", "--key", "one")
    assert "is reserved already under the key one" in filled.fails(
        "ip", "reserve", "10.64.0.9", "--key", "two"
    )


def test_reserving_needs_a_key(filled: CommandLine) -> None:
    assert "'--key'" in filled.fails("ip", "reserve", "10.64.0.9", code=2)


@contextmanager
def agent(url: str, node: str, answer: dict[str, Any]) -> Iterator[list[Intent]]:
    """A live agent as far as the store can tell; yields the intents it was given."""
    seen: list[Intent] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        store = await open_store(url)

        async def answering(intent: Intent) -> dict[str, Any]:
            seen.append(intent)
            return answer

        lease = await store.lease(30.0)
        await store.txn(
            Txn(
                then=(
                    Put(keys.ALIVE + node, Alive(instance="i1", boot_id="b1").encode(), lease.id),
                    Put(keys.NODES + node, Node(name=node, version="0.1.0", underlay=["192.0.2.1"]).encode()),
                )
            )
        )
        ready.set()
        try:
            await IntentServer(store, node, answering).run()
        finally:
            await store.close()

    task = loop.create_task(serve())
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    )
    thread.start()
    try:
        assert ready.wait(10)
        yield seen
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        loop.close()


@pytest.mark.parametrize(("options", "kind"), [([], "verify"), (["--force"], "release")])
def test_release_asks_the_addresss_node_about_what_it_saw(
    filled: CommandLine, options: list[str], kind: str
) -> None:
    with agent(filled.store, "a", {"done": True, "why": "the container is gone"}) as seen:
        said = filled.ok("ip", "release", "10.64.0.5", *options)
    assert said == "10.64.0.5 released by node a: the container is gone\n"
    (intent,) = seen
    assert (intent.kind, intent.ip, intent.id) == (kind, "10.64.0.5", "id1")
    assert intent.mod_revision > 0


def test_release_that_the_node_declines_is_an_error_with_its_reason(filled: CommandLine) -> None:
    with agent(filled.store, "a", {"done": False, "why": "container c1 lives"}):
        assert filled.fails("ip", "release", "10.64.0.5") == "node a kept 10.64.0.5: container c1 lives"


def test_release_without_an_agent_says_that_it_is_needed(filled: CommandLine) -> None:
    assert "the agent of node a is not running" in filled.fails("ip", "release", "10.64.0.5")


def test_release_of_what_no_container_has_is_refused(filled: CommandLine) -> None:
    assert "is warm on node b" in filled.fails("ip", "release", "10.64.0.6")
    assert "is free already" in filled.fails("ip", "release", "10.64.0.7")
    assert "is in no pool" in filled.fails("ip", "release", "10.9.0.1")


def test_nodes_are_listed_with_their_life(filled: CommandLine) -> None:
    with agent(filled.store, "a", {}):
        (row,) = filled.json("node", "list")
    assert row == {
        "name": "a",
        "alive": True,
        "drained": False,
        "version": "0.1.0",
        "underlay": ["192.0.2.1"],
        "instance": "i1",
        "since": 0.0,
        "blocks": 0,
    }
    assert (
        filled.ok("node", "list").splitlines()[0].split()
        == "NAME ALIVE DRAINED VERSION UNDERLAY BLOCKS AGE".split()
    )


FINDING = Finding(2, "10.64.0.5", "has no endpoint on its node", {"node": "a"}, "release it")
OTHER = Finding(4, "mrg0123", "outlives its endpoint")


def reporting(monkeypatch: pytest.MonkeyPatch, report: CheckReport) -> None:
    async def check(store: Store, *, repair: bool = False) -> CheckReport:
        return report

    monkeypatch.setattr("ipam.checks.check", check)


def test_a_check_without_finding_is_exit_0(filled: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    reporting(monkeypatch, CheckReport(addresses=7, nodes_asked=2))
    assert filled.ok("ip", "check") == "7 addresses, 2 nodes asked: no violation\n"


@pytest.mark.parametrize(
    ("notes", "own"),
    [
        (
            [],
            [
                "note: this machine's agent, of node a, is not in sync, so what it has was not looked at: fenced"
            ],
        ),
        (["node a: out of sync with the store: fenced"], []),
    ],
    ids=["another agent answered for the name", "it answered itself"],
)
def test_a_check_says_that_the_agent_beside_it_is_not_in_sync(
    filled: CommandLine, monkeypatch: pytest.MonkeyPatch, notes: list[str], own: list[str]
) -> None:
    reporting(monkeypatch, CheckReport(addresses=7, nodes_asked=1, notes=notes))
    status = {"node": "a", "problem": "fenced"}
    with answering(filled.socket, {"status": (0, status)}):
        lines = filled.ok("ip", "check").splitlines()
        told = filled.json("ip", "check")["notes"]
    assert lines == [*(f"note: {note}" for note in notes), *own, "7 addresses, 1 nodes asked: no violation"]
    assert [f"note: {note}" for note in told] == lines[:-1]


def test_a_check_with_findings_is_exit_1_and_shows_evidence(
    filled: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporting(
        monkeypatch, CheckReport(findings=[FINDING], addresses=7, nodes_asked=1, notes=["node b is silent"])
    )
    result = filled.run("ip", "check")
    assert result.exit_code == 1
    assert result.stdout == (
        "invariant 2: 10.64.0.5: has no endpoint on its node\n"
        "    node: a\n"
        "    repair: release it\n"
        "note: node b is silent\n"
        "7 addresses, 1 nodes asked: 1 violations; `moorage ip check --repair` does what is provably safe\n"
    )


def test_what_was_repaired_does_not_count_as_left(
    filled: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporting(monkeypatch, CheckReport(findings=[FINDING], repaired=[FINDING], addresses=7, nodes_asked=1))
    assert filled.ok("ip", "check", "--repair").splitlines() == [
        "repaired: 10.64.0.5: release it",
        "7 addresses, 1 nodes asked: no violation",
    ]


def test_a_check_as_json(filled: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    reporting(
        monkeypatch, CheckReport(findings=[FINDING, OTHER], repaired=[FINDING], notes=["n"], addresses=7)
    )
    result = filled.run("ip", "check", "--repair", "-o", "json")
    assert result.exit_code == 1
    assert '"nodes_silent": []' in result.stdout
    assert '"subject": "mrg0123"' in result.stdout.split('"repaired"')[0]
    assert '"subject": "10.64.0.5"' in result.stdout.split('"repaired"')[1]
