"""What an agent does not see is not gone: another namespace, interfaces under other names, all of them at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from isolator.drivers.naming import host_ifname
from isolator.model import EndpointKey
from moorage.lab import Container, LabNode
from moorage.lab.namespace import Namespace, unique
from tests.system.conftest import assert_nothing_left, eventually, links

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def running() -> Iterator[LabNode]:
    with LabNode("node") as node:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16")
        yield node


@pytest.fixture
def node(running: LabNode) -> Iterator[LabNode]:
    """Without any endpoint, before each test and after it."""
    yield running
    assert_nothing_left(running)


def assigned(node: LabNode) -> set[str]:
    return {row["address"] for row in node.ask("ip", "list", "--state", "assigned")}


def states(node: LabNode) -> dict[str, str]:
    return {row["container_id"]: row["state"] for row in node.ask("endpoint", "list")}


@contextmanager
def two_containers(node: LabNode) -> Iterator[tuple[Container, Container, str]]:
    """Attached and known to the store; with an address of the first."""
    with node.container("a") as a, node.container("b") as b:
        ip = a.add("web").ips[4]
        assert b.add("web").exit == 0
        eventually(lambda: len(assigned(node)) == 2)
        yield a, b, ip


def end_unseen(node: LabNode) -> None:
    """Their interfaces are gone while no agent runs."""
    node.kill()
    for name in links(node):
        node.namespace.run("ip", "link", "delete", name)


def test_an_agent_in_another_network_namespace_refuses_to_start_and_touches_nothing(node: LabNode) -> None:
    right, wrong = node.namespace, Namespace(unique("wrong"))
    with two_containers(node) as (a, b, ip), wrong:
        before = assigned(node)
        node.kill()
        node.namespace = wrong
        try:
            node.launch()
            eventually(lambda: not node.is_running)
        finally:
            node.kill()
            node.namespace = right
        assert "runs in another network namespace than the one before it" in node.log.read_text()
        assert assigned(node) == before
        node.start()
        assert states(node) == {a.id: "attached", b.id: "attached"}
        assert right.pings(ip)
        for container in (a, b):
            assert container.delete("web").exit == 0


def test_containers_that_are_all_gone_at_a_start_are_a_question_that_an_operator_answers(
    node: LabNode,
) -> None:
    with two_containers(node) as (a, b, _), node.container("late") as late:
        before = assigned(node)
        end_unseen(node)
        node.start()
        assert states(node) == {a.id: "missing", b.id: "missing"}
        assert assigned(node) == before
        assert late.add("web").exit == 0
        assert "moorage endpoint missing --release" in node.ask("status")["missing"]
        assert "moorage endpoint missing" in node.cli("doctor", check=False).stdout
        refused = node.cli("ip", "release", sorted(before)[0], check=False)
        assert "nobody knows whether" in refused.stderr
        assert node.cli("ip", "check", check=False).returncode == 0
        # A restart does not take the one that is seen for an answer about the others.
        node.kill()
        node.start()
        assert states(node) == {a.id: "missing", b.id: "missing", late.id: "attached"}
        node.cli("endpoint", "missing", "--keep", a.id)
        assert "of all 1 containers" in node.ask("status")["missing"]
        node.cli("endpoint", "missing", "--release")
        eventually(lambda: states(node) == {late.id: "attached"})
        assert late.delete("web").exit == 0


def test_containers_that_all_ended_while_no_agent_ran_are_no_question_once_their_dels_are_there(
    node: LabNode,
) -> None:
    with two_containers(node) as (a, b, _):
        end_unseen(node)
        assert [c.delete("web").exit for c in (a, b)] == [0, 0]
        node.start()
        eventually(lambda: states(node) == {})
        assert node.ask("status")["missing"] == ""


@pytest.mark.parametrize("stopped", [False, True], ids=["while it runs", "while it is stopped"])
def test_an_interface_that_somebody_renames_is_its_containers_still(node: LabNode, stopped: bool) -> None:
    with two_containers(node) as (a, b, ip):
        before = assigned(node)
        name = node.ask("endpoint", "show", f"{a.id}/eth0")["host_ifname"]
        if stopped:
            node.kill()
        node.namespace.run("ip", "link", "set", name, "name", "lan0")
        if stopped:
            node.start()
        eventually(lambda: name in links(node))
        eventually(lambda: b.namespace.pings(ip, wait=1))
        assert (states(node)[a.id], assigned(node)) == ("attached", before)
        # By a DEL that finds it so, too.
        node.namespace.run("ip", "link", "set", name, "name", "lan0")
        for container in (a, b):
            assert container.delete("web").exit == 0
        eventually(lambda: states(node) == {})
        assert "lan0" not in node.namespace.run("ip", "-o", "link").stdout


def test_what_a_container_writes_on_an_interface_that_it_moves_to_the_node_is_nobodys_word(
    node: LabNode,
) -> None:
    with node.container("attacker") as attacker:
        assert attacker.add("web").exit == 0
        with node.container("victim") as victim:
            ip = victim.add("web").ips[4]
            eventually(lambda: len(assigned(node)) == 2)
            before = assigned(node), states(node)
            name = node.ask("endpoint", "show", f"{victim.id}/eth0")["host_ifname"]
            (shown,) = json.loads(node.namespace.run("ip", "-j", "link", "show", name).stdout)
            made_up = host_ifname(EndpointKey("made-up", "eth0"))
            for number, (link, alias) in enumerate(
                {
                    made_up: shown["ifalias"].replace(name, made_up).replace(victim.id, "made-up"),
                    "evil0": shown["ifalias"],
                }.items()
            ):
                inside = attacker.namespace
                inside.run("ip", "link", "add", link, "type", "veth", "peer", "name", f"far{number}")
                inside.run("ip", "link", "set", link, "alias", alias)
                inside.run("ip", "link", "set", link, "netns", node.namespace.name)
            node.kill()
            node.start()
            assert (assigned(node), states(node)) == before
            assert node.namespace.pings(ip)
        # The victim ended, and nobody sent its DEL.
        eventually(lambda: states(node) == {attacker.id: "attached"})
        assert name not in links(node)
        for link in (made_up, "evil0"):
            node.namespace.run("ip", "link", "delete", link)
        assert attacker.delete("web").exit == 0
