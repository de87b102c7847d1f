"""A node that is cut off from the store judges by what it last heard, and is not heard of: what is released meanwhile
is reused last, and a container that starts on it is said to be unknown."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moorage.lab import Lab, LabNode
from tests.cluster.attacking import mark, udp_socket
from tests.cluster.hasty_agent import COOLDOWN
from tests.cluster.peers import PORT, Join, Peer, create_networks, peers
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

HASTY = Path(__file__).with_name("hasty_agent.py")
SETTLED = 0.5
"""Seconds after which nothing that was sent still arrives."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes whose released addresses are ready again within seconds, and a network that keeps one warm."""
    with Lab(nodes=0) as lab, contextlib.ExitStack() as stack:
        for number in (1, 2):
            node = LabNode(
                f"n{number}",
                agent=(sys.executable, str(HASTY), "agent"),
                store=lab.etcd.url,
                switch=lab.switch,
                host=number,
            )
            lab.nodes.append(stack.enter_context(node))
            node.start()
        create_networks(lab.nodes[0], "vx", vx=("--warm", "1", "--allow-static", "all"))
        yield lab
        lab.nodes.clear()


@pytest.fixture
def join(lab: Lab) -> Iterator[Join]:
    with peers(lab) as join:
        yield join


def delivered(target: Peer, *sources: Peer) -> set[str]:
    """The source addresses from which a datagram arrives."""
    for source in sources:
        for family, ip in source.ips.items():
            with udp_socket(source.namespace, family) as sender:
                sender.sendto(mark(ip), (target.ips[family], PORT))
    time.sleep(SETTLED)
    return set(target.ear.heard())


def alive(lab: Lab, name: str) -> bool:
    return any(row["name"] == name and row["alive"] for row in lab.nodes[0].ask("node", "list"))


def states(node: LabNode) -> set[str]:
    return {row["state"] for row in node.ask("ip", "list", "--node", node.name)}


def test_a_released_address_does_not_reach_whom_its_last_owner_could_on_a_node_that_is_cut_off(
    lab: Lab, join: Join
) -> None:
    n1, n2 = lab.nodes
    victim = join(n2, "vx", "blue")
    front = [join(n1, "vx", "front")]
    with peers(lab) as leaving:
        friend = leaving(n1, "vx", "blue")
        eventually(lambda: delivered(victim, friend) == set(friend.ips.values()))
        lab.partition(n2, *lab.etcd.members)
        eventually(lambda: not alive(lab, "n2"))
    try:
        time.sleep(COOLDOWN)
        eventually(lambda: "cooling" not in states(n1))
        front += [join(n1, "vx", "front") for _ in range(3)]
        assert delivered(victim, *front) == set()
        assert not {ip for peer in front for ip in peer.ips.values()} & set(friend.ips.values())
    finally:
        lab.heal()


def test_a_container_that_starts_on_such_a_node_is_said_to_be_unknown_to_others_until_the_cut_is_over(
    lab: Lab, join: Join
) -> None:
    n1, n2 = lab.nodes
    eventually(lambda: alive(lab, "n2") and n2.ask("status")["problem"] == "")
    here, _ = join(n1, "vx", "blue"), join(n2, "vx", "front")
    eventually(lambda: ready(n2))
    lab.partition(n2, *lab.etcd.members)
    try:
        eventually(lambda: not alive(lab, "n2"))
        late = join(n2, "vx", "front")
        (said,) = n2.ask("status")["not_known_to_other_nodes_yet"]
        assert all(part in said for part in (late.id, *late.ips.values()))
        traced = n1.cli("endpoint", "trace", late.ips[4], here.id, check=False).stdout
        assert "may be not known to other nodes yet" in traced
    finally:
        lab.heal()
    eventually(lambda: n2.ask("status")["not_known_to_other_nodes_yet"] == [])


def test_nobody_of_other_netgroups_chooses_an_address_that_such_a_node_takes_for_a_member(
    lab: Lab, join: Join
) -> None:
    n1, n2 = lab.nodes
    eventually(lambda: alive(lab, "n2") and n2.ask("status")["problem"] == "")
    victim, member = join(n2, "vx"), join(n1, "vx")
    eventually(lambda: ready(n1, "vx"))
    ips = ready(n1, "vx")
    eventually(lambda: delivered(victim, member) == set(member.ips.values()))
    lab.partition(n2, *lab.etcd.members)
    try:
        eventually(lambda: not alive(lab, "n2"))
        named = {"moorage.ip": ips[4], "moorage.ip6": ips[6]}
        with pytest.raises(Exception, match="ask for another address"):
            join(n1, "vx", "front", labels=named)
        assert delivered(victim, join(n1, "vx", labels=named)) == set(ips.values())
    finally:
        lab.heal()


def ready(node: LabNode, *netgroups: str) -> dict[int, str]:
    """Warm addresses of both families that are announced as these, or plain ones; {} while one is missing."""
    rows = node.ask("ip", "list", "--node", node.name, "--state", "warm", "--network", "vx")
    found = {
        6 if ":" in row["address"] else 4: row["address"] for row in rows if row["netgroups"] == [*netgroups]
    }
    return found if len(found) == 2 else {}
