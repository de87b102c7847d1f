"""`moorage endpoint trace` on two real nodes: it holds where packets pass, and names the first hop that does not."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from moorage.lab import Container, Lab
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2, etcd=1) as lab:
        lab.start()
        one = lab.nodes[0]
        one.cli(
            "network", "create", "tunnelled", "--pool", "10.64.0.0/20", "--pool", "fd64::/112", "--allow-from", "nodes"
        )  # fmt: skip
        one.cli(
            "network",
            "create",
            "routed",
            "--pool",
            "10.65.0.0/20",
            "--fabric",
            "hostgw",
            "--allow-from",
            "nodes",
        )
        one.cli("network", "create", "apart", "--pool", "10.66.0.0/20", "--fabric", "none")
        yield lab


Pair = tuple[Container, Container]


@pytest.fixture(scope="module")
def pair(lab: Lab) -> Iterator[Pair]:
    """A container on each node, on all three networks."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(node.container()) for node in lab.nodes]
        for container in made:
            for number, network in enumerate(("tunnelled", "routed", "apart")):
                answer = container.add(network, f"eth{number}")
                assert answer.exit == 0, answer.stdout
        one, other = made
        eventually(lambda: not broken(trace(lab, f"{one.id}/eth0", f"{other.id}/eth0")))
        eventually(lambda: not broken(trace(lab, f"{one.id}/eth1", f"{other.id}/eth1")))
        yield one, other
        for container in made:
            for number, network in enumerate(("tunnelled", "routed", "apart")):
                container.delete(network, f"eth{number}")


def trace(lab: Lab, source: str, target: str, *packet: str) -> dict[str, Any]:
    answer = lab.nodes[0].cli("endpoint", "trace", source, target, *packet, "-o", "json", check=False)
    found: dict[str, Any] = json.loads(answer.stdout)
    assert answer.returncode == (1 if found["broken"] else 0)
    return found


def broken(found: dict[str, Any]) -> tuple[str, str] | None:
    """(node, place) of the first hop that does not hold."""
    hops = (hop for way in found["ways"] for hop in way["hops"] if hop["holds"] is False)
    first = next(hops, None)
    return (first["node"], first["at"]) if first is not None else None


def finds(lab: Lab, pair: Pair, plant: Callable[[], object], ifname: str = "eth0") -> tuple[str, str] | None:
    """What a trace says while ``plant`` is done over and over, because agents mend some of it at once; the first
    that finds something, as it may look in between."""
    one, other = pair
    ending = threading.Event()

    def go_on() -> None:
        while not ending.is_set():
            plant()

    planting = threading.Thread(target=go_on)
    planting.start()
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            found = broken(trace(lab, f"{one.id}/{ifname}", f"{other.id}/{ifname}"))
            if found is not None or time.monotonic() > deadline:
                return found
    finally:
        ending.set()
        planting.join()


def interface(lab: Lab, number: int, container: Container, ifname: str = "eth0") -> str:
    rows = lab.nodes[number].ask("endpoint", "list")
    (row,) = [r for r in rows if (r["container_id"], r["ifname"]) == (container.id, ifname)]
    return str(row["host_ifname"])


def test_what_packets_pass_holds_there_and_back_in_both_families(lab: Lab, pair: Pair) -> None:
    one, other = pair
    found = trace(lab, f"{one.id}/eth0", f"{other.id}/eth0")
    assert found["verdict"] == "every hop holds, there and back"
    assert [(way["source"]["node"], way["source"]["family"]) for way in found["ways"]] == [
        ("n1", 4), ("n2", 4), ("n1", 6), ("n2", 6),
    ]  # fmt: skip
    places = [(hop["node"], hop["at"]) for hop in found["ways"][0]["hops"]]
    assert places == [
        ("n1", "container"), ("n1", "source"), ("n1", "veth"), ("n1", "sending"), ("n1", "forwarding"), ("n1", "route"),
        ("n1", "fabric"), ("n1", "underlay"), ("n2", "fabric"), ("n2", "forwarding"), ("n2", "route"), ("n2", "policy"),
        ("n2", "veth"), ("n2", "container"),
    ]  # fmt: skip


def test_what_is_not_bound_leaves_by_the_interface_on_the_network_of_the_other(lab: Lab, pair: Pair) -> None:
    one, other = pair
    for ifname, number in (("eth0", 64), ("eth1", 65)):
        found = trace(lab, f"{one.id}/{ifname}", f"{other.id}/{ifname}")
        assert found["verdict"] == "every hop holds, there and back"
        (source,) = (hop for hop in found["ways"][0]["hops"] if hop["at"] == "source")
        assert f"leaves by {ifname} from 10.{number}." in source["says"]


def test_a_nodes_own_processes_are_an_end_too(lab: Lab, pair: Pair) -> None:
    _, other = pair
    assert broken(trace(lab, "node:n1", f"{other.id}/eth0")) is None
    assert broken(trace(lab, "node:n1", f"{other.id}/eth1")) is None


def test_between_containers_of_one_node_there_is_no_fabric(lab: Lab, pair: Pair) -> None:
    one, _ = pair
    with lab.nodes[0].container() as neighbour:
        assert neighbour.add("tunnelled").exit == 0
        eventually(lambda: lab.nodes[0].ask("status")["outbox"] == 0)
        found = trace(lab, f"{one.id}/eth0", neighbour.id)
        assert broken(found) is None
        assert {hop["at"] for way in found["ways"] for hop in way["hops"]} == {
            "container", "source", "veth", "sending", "forwarding", "route", "policy",
        }  # fmt: skip
        assert neighbour.delete("tunnelled").exit == 0


def test_a_packet_that_no_netgroup_decides_about_ends_with_the_name_of_what_drops_it(
    lab: Lab, pair: Pair
) -> None:
    ends = (f"{pair[0].id}/eth0", f"{pair[1].id}/eth0")
    etcd = lab.etcd.members[0]
    found = trace(lab, *ends, "--proto", "udp", "--port", "4789")
    assert broken(found) == ("n1", "sending")
    assert "(tunnel-port)" in found["verdict"]
    assert broken(trace(lab, *ends, "--proto", "udp", "--port", "4790")) is None
    guarded = ((lab.nodes[1].ip, ("--proto", "udp", "--port", "4789")), (etcd.ip, ("--port", "2379")))
    for target, port in guarded:
        found = trace(lab, ends[0], target, *port)
        assert broken(found) == ("n1", "sending")
        assert "(tunnel-port)" in found["verdict"] or "(store)" in found["verdict"]
        assert broken(trace(lab, ends[0], target)) is None
    said = json.dumps(trace(lab, *ends, "--proto", "icmp-error"))
    assert "dropped (icmp-error)" in said
    lab.nodes[0].cli("network", "set", "tunnelled", "--max-connections", "1")
    try:
        pair[0].namespace.run("ping", "-c", "1", "-W", "1", lab.nodes[1].ip, check=False)
        eventually(lambda: broken(trace(lab, *ends)) == ("n1", "sending"))
        assert "(connections)" in trace(lab, *ends)["verdict"]
    finally:
        lab.nodes[0].cli("network", "set", "tunnelled", "--max-connections", "default")


def test_a_container_that_lost_its_default_route(lab: Lab, pair: Pair) -> None:
    inside = pair[0].namespace
    (route, *_) = (r for r in inside.run("ip", "route", "show", "default").stdout.splitlines() if "eth0" in r)
    try:
        assert finds(lab, pair, lambda: inside.run("ip", "route", "delete", *route.split(), check=False)) == (
            "n1",
            "container",
        )
    finally:
        inside.run("ip", "route", "replace", *route.split())


def test_an_interface_that_is_down_on_the_other_node(lab: Lab, pair: Pair) -> None:
    name = interface(lab, 1, pair[1])
    node = lab.nodes[1].namespace
    found = finds(lab, pair, lambda: node.run("ip", "link", "set", name, "down"))
    assert found in (("n2", "route"), ("n2", "veth"))
    assert pair[1].delete("tunnelled").exit == 0
    assert pair[1].add("tunnelled").exit == 0
    eventually(lambda: broken(trace(lab, f"{pair[0].id}/eth0", f"{pair[1].id}/eth0")) is None)


def test_a_rule_of_somebody_elses_that_leads_astray(lab: Lab, pair: Pair) -> None:
    node = lab.nodes[0].namespace
    node.run("ip", "route", "add", "blackhole", "default", "table", "99")
    node.run("ip", "rule", "add", "to", "10.64.0.0/20", "lookup", "99", "priority", "99")
    try:
        found = trace(lab, f"{pair[0].id}/eth0", f"{pair[1].id}/eth0")
        assert broken(found) == ("n1", "route")
        assert "blackhole" in found["verdict"]
    finally:
        node.run("ip", "rule", "delete", "priority", "99")


@pytest.mark.parametrize(
    ("setting", "family"), [("net.ipv4.ip_forward", 0), ("net.ipv6.conf.all.forwarding", 2)]
)
def test_a_node_that_does_not_forward(lab: Lab, pair: Pair, setting: str, family: int) -> None:
    def names_it() -> bool:
        # The agent switches it on again, so it may be in time.
        lab.nodes[1].namespace.run("sysctl", "-qw", f"{setting}=0")
        found = trace(lab, f"{pair[0].id}/eth0", f"{pair[1].id}/eth0")
        first = next((hop for hop in found["ways"][family]["hops"] if hop["holds"] is False), None)
        return (
            first is not None
            and (first["node"], first["at"]) == ("n2", "forwarding")
            and f"sysctl -w {setting}=1" in first["cure"]
        )

    eventually(names_it)
    eventually(lambda: lab.nodes[1].namespace.run("sysctl", "-n", setting).stdout.strip() == "1")


def test_a_tunnel_that_leads_to_another_machine(lab: Lab, pair: Pair) -> None:
    node = lab.nodes[0].namespace
    (link,) = json.loads(lab.nodes[1].namespace.run("ip", "-j", "link", "show", "mfbvxlan").stdout)
    astray = (
        "bridge",
        "fdb",
        "replace",
        link["address"],
        "dev",
        "mfbvxlan",
        "dst",
        "198.18.0.99",
        "self",
        "permanent",
    )
    assert finds(lab, pair, lambda: node.run(*astray)) == ("n1", "fabric")
    eventually(lambda: broken(trace(lab, f"{pair[0].id}/eth0", f"{pair[1].id}/eth0")) is None)


def test_a_network_without_a_fabric(lab: Lab, pair: Pair) -> None:
    one, other = pair
    found = trace(lab, f"{one.id}/eth2", f"{other.id}/eth2")
    assert broken(found) == ("n1", "route")
    assert "no fabric" in found["verdict"]


def test_nodes_that_do_not_hear_each_other(lab: Lab, pair: Pair) -> None:
    one, other = pair
    lab.partition(lab.nodes[0], lab.nodes[1])
    lab.nodes[0].namespace.run("ip", "neigh", "flush", "dev", "up0")
    try:
        ends = (f"{one.id}/eth0", f"{other.id}/eth0")
        lab.nodes[0].namespace.pings("198.18.0.2", count=4, wait=1)
        eventually(lambda: broken(trace(lab, *ends)) == ("n1", "underlay"))
    finally:
        lab.heal()
    eventually(lambda: lab.nodes[0].namespace.pings("198.18.0.2"))


def test_an_address_that_nobody_has(lab: Lab, pair: Pair) -> None:
    found = trace(lab, f"{pair[0].id}/eth0", "10.64.0.0")
    assert broken(found) is not None
    assert "10.64.0.0 is " in found["verdict"]


def test_a_node_whose_agent_does_not_run_is_said_not_to_be_seen(lab: Lab, pair: Pair) -> None:
    one, other = pair
    lab.nodes[1].stop()
    try:
        found = trace(lab, f"{one.id}/eth0", f"{other.id}/eth0")
        assert not found["broken"]
        assert "n2 could not be asked" in found["verdict"]
    finally:
        lab.nodes[1].start()


def test_what_is_unknown_is_refused_with_what_is_known(lab: Lab) -> None:
    answer = lab.nodes[0].cli("endpoint", "trace", "nobody", "node:n1", check=False)
    assert answer.returncode != 0
    assert "no container or address 'nobody' is known" in answer.stderr
    answer = lab.nodes[0].cli("endpoint", "trace", "node:n9", "node:n1", check=False)
    assert "there is no node 'n9' (known: n1, n2)" in answer.stderr
