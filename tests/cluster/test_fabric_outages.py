"""The fabric while the store is away, cut off, or older than what the nodes hold."""

from __future__ import annotations

import contextlib
import re
import subprocess

import pytest

from moorage.lab import Lab
from tests.cluster.guests import (
    Guest,
    all_answer,
    between,
    fabric_of,
    from_nodes,
    guest,
    routes_of,
    unanswered,
)
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]


def test_partitions_heal(lab: Lab, guests: list[Guest]) -> None:
    one, other, third = guests
    all_answer(between(guests))
    before = fabric_of(one.node)
    lab.partition(one.node, other.node, *lab.etcd.members)
    try:
        cut = between([one, other])
        assert len(unanswered(cut, wait=1)) == len(cut)
        assert unanswered(between([one, third])) == []
        assert unanswered(between([other, third])) == []
        static = "10.64.14.7"
        with other.node.container() as container:
            assert container.add("vx", labels={"moorage.ip": static}).exit == 0
            assert fabric_of(one.node) == before
            lab.heal()
            all_answer([*cut, (one.namespace, static, "")])
            container.delete("vx")
    finally:
        lab.heal()


def test_an_outage_of_the_store_changes_nothing_nor_does_an_agent_started_in_it(
    lab: Lab, guests: list[Guest]
) -> None:
    all_answer(between(guests))
    eventually(lambda: all(node.ask("status")["outbox"] == 0 for node in lab.nodes))
    before = fabric_of(lab.nodes[0])
    lab.etcd.kill()
    try:
        lab.nodes[0].kill()
        lab.nodes[0].start()
        assert unanswered(between(guests) + from_nodes(lab.nodes, guests)) == []
        assert fabric_of(lab.nodes[0]) == before
        (problem,) = lab.nodes[0].ask("status")["fabric"]["problems"]
        assert "what an earlier agent left in the kernel stays as it is" in problem
    finally:
        lab.etcd.start()
        lab.etcd.wait_ready()
    eventually(lambda: lab.nodes[0].ask("status")["problem"] == "")
    assert unanswered(between(guests) + from_nodes(lab.nodes, guests)) == []


def test_an_agent_that_lost_its_journal_keeps_its_own_address_and_everybodys_way(
    lab: Lab, guests: list[Guest]
) -> None:
    node = lab.nodes[1]
    eventually(lambda: all(node.ask("status")["outbox"] == 0 for node in lab.nodes))
    before = fabric_of(node)
    node.kill()
    for file in node.state_dir.glob("journal.db*"):
        file.unlink()
    with node.namespace.start(
        "ip", "monitor", "link", "address", "route", stdout=subprocess.PIPE
    ) as watching:
        try:
            node.start()
            eventually(lambda: node.ask("status")["fabric"]["tunnels"] == 2)
            assert unanswered(between(guests) + from_nodes(lab.nodes, guests)) == []
        finally:
            watching.terminate()
        heard, _ = watching.communicate()
    assert [line for line in heard.decode().splitlines() if "mfbvxlan" in line or "metric 2048" in line] == []
    assert fabric_of(node) == before


def test_a_store_that_went_back_in_time_cuts_nobody_off(lab: Lab, guests: list[Guest]) -> None:
    for node in lab.nodes:  # an agent was started while the store was away
        eventually(lambda node=node: node.ask("status")["grace"]["seconds"] == 0)
    with contextlib.ExitStack() as stack:
        backup = lab.etcd.back_up()
        newer = [stack.enter_context(guest(node)) for node in lab.nodes]
        everyone = [*guests, *newer]
        all_answer(between(everyone))
        pinging = guests[0].namespace.start(
            "ping", "-n", "-q", "-i", "0.2", "-w", "12", newer[2].ips["vx", 4], stdout=subprocess.PIPE
        )
        lab.etcd.restore(backup)
        for node in lab.nodes:
            eventually(lambda node=node: node.ask("status")["problem"] == "")
        all_answer(between(everyone) + from_nodes(lab.nodes, everyone))
        said = pinging.communicate(timeout=PATIENCE)[0].decode()
        assert re.search(r" 0% packet loss", said), said


@pytest.mark.parametrize("journal", ["there", "lost"])
def test_a_node_that_is_restarted_without_a_default_route_keeps_and_says_what_it_was(
    lab: Lab, guests: list[Guest], journal: str
) -> None:
    one, other, _ = guests
    eventually(lambda: all(node.ask("status")["outbox"] == 0 for node in lab.nodes))
    before, seen = fabric_of(one.node), routes_of(other.node)
    told = lab.nodes[1].ask("node", "show", one.node.name)
    one.node.kill()
    if journal == "lost":
        for file in one.node.state_dir.glob("journal.db*"):
            file.unlink()
    route = one.node.namespace.run("ip", "route", "show", "default").stdout.split()
    one.node.namespace.run("ip", "route", "delete", "default")
    try:
        one.node.start()
        eventually(lambda: one.node.ask("status")["fabric"]["tunnels"] == 2)
        with one.node.container() as late:
            # One that has lost its journal takes nothing new for some seconds.
            eventually(lambda: late.add("vx").exit == 0)
            assert "mtu 1450 " in late.namespace.run("ip", "-o", "link", "show", "eth0").stdout
            all_answer([(late.namespace, other.ips["vx", 4], ""), (late.namespace, other.ips["vx", 6], "")])
            late.delete("vx")
        assert unanswered(between(guests)) == []
        # There may be more: a block that was claimed meanwhile.
        assert lasting(before) <= lasting(fabric_of(one.node))
        assert lasting(seen.splitlines()) <= lasting(routes_of(other.node).splitlines())
        now = lab.nodes[1].ask("node", "show", one.node.name)
        assert {key: now[key] for key in ("underlay", "mtu")} == {
            key: told[key] for key in ("underlay", "mtu")
        }
    finally:
        one.node.namespace.run("ip", "route", "add", *route)


def lasting(lines: list[str]) -> set[str]:
    """Without routes to single addresses, which an earlier test may have given back just now."""
    return {line for line in lines if not re.match(r"(blackhole )?[0-9a-f.:]+ ", line)}
