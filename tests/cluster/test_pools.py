"""A pool over the nodes' own networks: whatever it is, and whichever came first, no node loses anything by it."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moorage.lab import Lab, LabNode
from moorage.lab.node import with_source
from tests.cluster.guests import guest
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("pools"),
]

OLDER = Path(__file__).with_name("older_cli.py")
UNDERLAY4, UNDERLAY6 = "198.18.0.0/24", "fd98::/64"

LOOKED_AT = 6.0
"""Seconds in which a cluster that loses its store would have lost it: routes and firewall follow within one."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes that run, a third that is switched on, one etcd, and a network as there should be."""
    with Lab(nodes=3, etcd=1) as lab:
        for node in lab.nodes[:2]:
            node.start()
        lab.nodes[0].cli("network", "create", "kept", "--pool", "10.64.0.0/20", "--allow-from", "nodes")
        yield lab


def create_as_before(node: LabNode, name: str, cidr: str, fabric: str = "vxlan") -> None:
    """As a command line did that knew nothing of nodes' networks."""
    node.namespace.run(
        sys.executable, str(OLDER), name, cidr, fabric, environment=with_source(node.environment)
    )


@contextlib.contextmanager
def pool_over(node: LabNode, cidr: str, fabric: str = "vxlan") -> Iterator[str]:
    """A network with such a pool, deleted in the end, which has to work."""
    create_as_before(node, "over", cidr, fabric)
    try:
        yield "over"
    finally:
        node.cli("network", "delete", "over")


def in_sync(node: LabNode) -> bool:
    return node.ask("status")["in_sync"] is True


def well(lab: Lab, nodes: list[LabNode]) -> None:
    """Every node reaches the store and every other, and its agent says so."""
    for node in nodes:
        for other in nodes:
            assert node.namespace.pings(other.ip, wait=2), f"{node.name} does not reach {other.name}"
        assert node.namespace.pings(lab.etcd.members[0].ip, wait=2), f"{node.name} does not reach the store"
        assert node.cli("network", "list", check=False).returncode == 0
        assert in_sync(node)


def stay_well(lab: Lab, nodes: list[LabNode], seconds: float = LOOKED_AT) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        well(lab, nodes)


def captured(node: LabNode, prefix: str = "198.18.0.") -> list[str]:
    """Routes of ours that lead to addresses of the underlay."""
    lines = node.namespace.run("ip", "route", "show", "proto", "157").stdout.splitlines()
    lines += node.namespace.run("ip", "-6", "route", "show", "proto", "157").stdout.splitlines()
    return [line for line in lines if prefix in line.split(" via ")[0] or "fd98:" in line.split(" via ")[0]]


@pytest.mark.parametrize(
    ("cidr", "fabric"), [(UNDERLAY4, "vxlan"), (UNDERLAY6, "vxlan"), ("198.18.0.0/16", "hostgw")]
)
def test_a_pool_over_the_underlay_takes_neither_store_nor_nodes_from_anybody(
    lab: Lab, cidr: str, fabric: str
) -> None:
    running = lab.nodes[:2]
    with pool_over(running[0], cidr, fabric):
        stay_well(lab, running)
        for node in running:
            eventually(lambda node=node: any(cidr in said for said in node.ask("status")["collisions"]))
        for node in running:
            assert captured(node) == []
            for name in ("pools4", "pools6", "nat4", "tunnelled4", "tunnelled6"):
                held = node.namespace.run("nft", "list", "set", "inet", "moorage", name).stdout
                assert "198.18.0." not in held
                assert "fd98::" not in held
    for node in running:
        eventually(lambda node=node: node.ask("status")["collisions"] == [])
    well(lab, running)


def test_nothing_is_given_out_of_it_and_the_refusal_says_whose_it_is(lab: Lab) -> None:
    node = lab.nodes[0]
    with pool_over(node, UNDERLAY4):
        eventually(lambda: node.ask("status")["collisions"])
        with node.container() as container:
            answer = container.add("over")
            assert answer.exit != 0
            assert "no free IPv4 address" in answer.json["msg"]
            answer = container.add("over", labels={"moorage.ip": "198.18.0.254"})
            assert "198.18.0.254" in answer.json["msg"]
            assert "the gateway 198.18.0.254 (up0) of node n1" in answer.json["msg"]
        said = " ".join(row["problem"] for row in node.ask("doctor", check=False))
        assert "the pool 198.18.0.0/24 of network over collides with" in said
        assert "network set over --enable-pool 198.18.0.0/24 --force" in said


@pytest.mark.parametrize("journal", ["kept", "lost"])
def test_an_agent_that_finds_what_an_older_one_did_reaches_its_store_again(lab: Lab, journal: str) -> None:
    node = lab.nodes[1]
    with pool_over(lab.nodes[0], UNDERLAY4), contextlib.ExitStack() as stack:
        # With an endpoint, whose rules nobody would make anew before the store was heard.
        stack.enter_context(guest(node, "kept"))
        node.stop()
        namespace = node.namespace
        namespace.run(
            "ip", "route", "add", "198.18.0.64/26", "via", lab.nodes[0].ip, "proto", "157", "metric", "2048"
        )
        namespace.run("ip", "route", "add", "blackhole", "198.18.0.128/26", "proto", "157", "metric", "2048")
        namespace.run("ip", "route", "add", "blackhole", "198.18.0.0/26", "proto", "157", "metric", "2048")
        for name in ("pools4", "tunnelled4", "nat4"):
            namespace.run("nft", "add", "element", "inet", "moorage", name, "{ 198.18.0.0/24 }")
        assert not namespace.pings(lab.etcd.members[0].ip, wait=1)
        if journal == "lost":
            shutil.rmtree(node.state_dir)
        node.start()
        eventually(lambda: in_sync(node), PATIENCE)
        assert captured(node) == []
        well(lab, lab.nodes[:2])
        assert "were cut back" in node.log.read_text()
    well(lab, lab.nodes[:2])


def lan(node: LabNode, address: str, name: str = "lan0") -> None:
    node.namespace.run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-far")
    node.namespace.run("ip", "link", "set", f"{name}-far", "up")
    node.namespace.run("ip", "address", "add", address, "dev", name)
    node.namespace.run("ip", "link", "set", name, "up")


def no_lan(node: LabNode, name: str = "lan0") -> None:
    node.namespace.run("ip", "link", "delete", name, check=False)


def test_a_pool_over_a_nodes_lan_never_gives_away_the_node_or_its_gateway(lab: Lab) -> None:
    node, other = lab.nodes[0], lab.nodes[1]
    lan(node, "10.50.0.3/29")
    node.namespace.run("ip", "route", "add", "10.77.0.0/16", "via", "10.50.0.1")
    try:
        eventually(lambda: "connected 10.50.0.0/29 lan0" in other.ask("node", "show", "n1")["surroundings"])
        refused = other.cli("network", "create", "lan", "--pool", "10.50.0.0/29", check=False)
        assert refused.returncode != 0
        assert "the address 10.50.0.3 (lan0) of node n1" in refused.stderr
        assert "--force" in refused.stderr
        made = other.cli("network", "create", "lan", "--pool", "10.50.0.0/29", "--force", "--fabric", "none")
        assert "gives out all but" in made.stderr
        assert "the gateway 10.50.0.1 (lan0) of node n1" in made.stderr
        with contextlib.ExitStack() as stack:
            given = set()
            for taker in (node, other, node, other):
                one = stack.enter_context(guest(taker, "lan"))
                given |= set(one.ips.values())
            assert given == {"10.50.0.2", "10.50.0.4", "10.50.0.5", "10.50.0.6"}
            assert other.ask("network", "show", "lan")["pools"][0]["usage"]["free"] == 0
            assert node.namespace.run("ip", "route", "get", "10.50.0.1").stdout.startswith(
                "10.50.0.1 dev lan0"
            )
    finally:
        no_lan(node)
        eventually(lambda: other.cli("network", "delete", "lan", check=False).returncode == 0, 2 * PATIENCE)


def test_a_node_that_comes_later_with_such_a_lan_keeps_it(lab: Lab) -> None:
    first, late = lab.nodes[0], lab.nodes[2]
    first.cli(
        "network", "create", "early",
        "--pool", "10.51.0.0/24", "--block-size", "28", "--allow-static", "all", "--allow-from", "nodes",
    )  # fmt: skip
    try:
        with guest(first, "early") as kept:
            before = kept.ips["early", 4]
            lan(late, "10.51.0.200/24")
            late.start()
            eventually(lambda: any("10.51.0.0/24" in said for said in first.ask("status")["collisions"]))
            well(lab, lab.nodes)
            said = first.ask("status")["collisions"]
            assert any(before in sentence and "stays assigned" in sentence for sentence in said), said
            assert kept.namespace.run("ip", "-4", "addr", "show", "dev", "eth0").stdout.count(before) == 1
            # Who has an address keeps it, and is reached by a route of its own.
            assert first.namespace.pings(before)
            assert lab.nodes[1].namespace.pings(before)
            assert [row.split()[0] for row in captured(lab.nodes[1], "10.51.")] == [before]
            usage = first.ask("network", "show", "early")["pools"][0]["usage"]
            assert usage["free"] == 0
            with first.container() as more:
                assert "no free IPv4 address" in more.add("early").json["msg"]
            blocks = [
                row for row in captured(late, "10.51.") if "/" in row.removeprefix("blackhole ").split()[0]
            ]
            assert blocks == []
            assert late.namespace.run("ip", "route", "get", "10.51.0.77").stdout.startswith(
                "10.51.0.77 dev lan0"
            )
        eventually(lambda: captured(lab.nodes[1], "10.51.") == [])
    finally:
        late.stop()
        no_lan(late)
        first.cli("node", "remove", late.name, "--force", check=False)


@pytest.mark.parametrize("taken", ["flush set inet moorage pools4", "flush ruleset"])
def test_a_table_that_an_add_restores_knows_other_nodes_containers_inside_own_networks(
    lab: Lab, taken: str
) -> None:
    """They were there before the network was; whoever restores the table has to know of them."""
    here, there = lab.nodes[:2]
    with guest(here, "kept") as one, guest(there, "kept") as other:
        ip = other.ips["kept", 4]
        eventually(lambda: one.container.namespace.pings(ip, wait=1))
        here.namespace.run("ip", "link", "add", "own0", "type", "veth", "peer", "name", "own1")
        try:
            own = f"{ip.rpartition('.')[0]}.250/24"
            here.namespace.run(
                "sh", "-ec", f"ip link set own1 up; ip link set own0 up; ip addr add {own} dev own0"
            )
            known = ("nft", "get", "element", "inet", "moorage", "pools4", f"{{ {ip} }}")
            unknown = ("nft", "get", "element", "inet", "moorage", "pools4", f"{{ {own.partition('/')[0]} }}")
            eventually(lambda: here.namespace.run(*unknown, check=False).returncode)
            assert one.container.namespace.pings(ip)
            here.namespace.run("nft", *taken.split())
            with here.container() as third:
                assert third.add("kept").exit == 0
                assert here.namespace.run(*known, check=False).returncode == 0
                eventually(lambda: one.container.namespace.pings(ip, wait=1))
                third.delete("kept")
        finally:
            here.namespace.run("ip", "link", "delete", "own0")
