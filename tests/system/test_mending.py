"""Whatever somebody takes of what the agent put in place comes back within seconds, and the log says what it was."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from moorage.lab import Container, LabNode
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel


@dataclass
class Pair:
    """Two containers that talk."""

    node: LabNode
    one: Container
    other: Container
    ips: dict[int, str]
    link: str

    def talk(self) -> bool:
        return all(self.other.namespace.pings(ip, wait=1) for ip in self.ips.values())


@pytest.fixture
def pair(node: LabNode) -> Iterator[Pair]:
    with node.container("one") as one, node.container("other") as other:
        ips = one.add("web").ips
        other.add("web")
        (link,) = [e["host_ifname"] for e in node.ask("endpoint", "list") if e["container_id"] == one.id]
        pair = Pair(node, one, other, ips, link)
        assert pair.talk()
        yield pair


def on_node(*command: str) -> Callable[[Pair], object]:
    return lambda pair: pair.node.namespace.run(*(_filled(pair, word) for word in command))


def inside(*command: str) -> Callable[[Pair], object]:
    return lambda pair: pair.one.namespace.run(*(_filled(pair, word) for word in command))


def _filled(pair: Pair, word: str) -> str:
    return word.replace("IP4", pair.ips[4]).replace("IP6", pair.ips[6]).replace("LINK", pair.link)


DAMAGE = {
    "the whole ruleset": (on_node("nft", "flush", "ruleset"), "table inet moorage was missing"),
    "our table": (on_node("nft", "delete", "table", "inet", "moorage"), "table inet moorage was missing"),
    "who may be called": (on_node("nft", "flush", "map", "inet", "moorage", "receivers4"), "receivers4"),
    "MACs": (on_node("nft", "flush", "set", "inet", "moorage", "senders4"), "senders4"),
    "the route": (on_node("ip", "route", "del", "IP4"), "the route to IP4"),
    "the IPv6 route": (on_node("ip", "-6", "route", "del", "IP6"), "the route to IP6"),
    "the neighbour": (on_node("ip", "neigh", "del", "IP4", "dev", "LINK"), "the permanent neighbour IP4"),
    "the link's state": (on_node("ip", "link", "set", "LINK", "down"), "LINK is down"),
    "the address": (inside("ip", "addr", "del", "IP4/32", "dev", "eth0"), "the address IP4"),
    "all addresses": (inside("ip", "addr", "flush", "dev", "eth0"), "the address IP6"),
    "the rule": (inside("ip", "rule", "del", "from", "IP4"), "the rule that packets from IP4"),
    "the default route": (inside("ip", "route", "del", "default"), "the default route via 169.254.1.1"),
    "the link's own forwarding": (
        on_node("sysctl", "-qw", "net.ipv4.conf.LINK.forwarding=0"),
        "does not forward IPv4 from LINK",
    ),
    "the inner link's state": (inside("ip", "link", "set", "eth0", "down"), "eth0 is down"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_taken_away_comes_back_and_the_log_says_what_it_was(pair: Pair, what: str) -> None:
    damage, words = DAMAGE[what]
    damage(pair)
    eventually(lambda: _filled(pair, words) in pair.node.log.read_text())
    eventually(pair.talk)


def test_nothing_is_mended_where_nothing_was_damaged(pair: Pair) -> None:
    """Neither the endpoints that come and go, nor what a container adds of its own, are taken for damage."""
    pair.one.namespace.run("ip", "link", "add", "br0", "type", "bridge")
    pair.one.namespace.run("ip", "addr", "add", "192.168.7.1/24", "dev", "br0")
    pair.one.namespace.run("ip", "link", "del", "br0")
    with pair.node.container() as third:
        third.add("web")
        third.delete("web")
    time.sleep(2.5)
    log = pair.node.log.read_text()
    assert "repaired" not in log
    assert "restored" not in log


def test_what_cannot_be_put_back_stands_in_status_until_it_could(pair: Pair) -> None:
    """The container has given its interface another name, and somebody took the node's route meanwhile."""
    pair.one.namespace.run("ip", "link", "set", "eth0", "name", "inner")
    pair.node.namespace.run("ip", "route", "del", pair.ips[4])
    says = f"{pair.one.id}/eth0 is not as it should be: the container's link eth0 is called inner"
    eventually(lambda: pair.node.ask("status")["damage"] == [says])
    assert says in pair.node.cli("doctor", check=False).stdout
    eventually(lambda: f"the route to {pair.ips[4]}" in pair.node.log.read_text())
    eventually(pair.talk)

    time.sleep(9)
    assert pair.node.log.read_text().count("endpoint is not as it should be") == 1, "it is said once"
    pair.one.namespace.run("ip", "link", "set", "inner", "name", "eth0")
    eventually(lambda: pair.node.ask("status")["damage"] == [])


def test_a_container_whose_path_leads_to_another_is_found_again_and_the_other_left_alone(
    pair: Pair,
) -> None:
    living = pair.one.namespace.start("sleep", "600")
    try:
        subprocess.run(["ip", "netns", "delete", pair.one.namespace.name], check=True)
        pair.one.namespace.create()
        stranger = Container(pair.node.socket, id="stranger", namespace=pair.one.namespace)
        assert stranger.add("web").exit == 0
        shows = ("sh", "-c", "ip link show eth0; ip addr; ip rule; ip route show table all; ip neigh")
        before = stranger.namespace.run(*shows).stdout
        inside = ["nsenter", f"--net=/proc/{living.pid}/ns/net", "ip", "route", "del", "default"]
        subprocess.run(inside, check=True)
        pair.node.namespace.run("ip", "route", "del", pair.ips[4])
        eventually(lambda: "endpoint's namespace found" in pair.node.log.read_text())
        eventually(pair.talk)
        eventually(lambda: pair.node.ask("status")["damage"] == [])
        assert stranger.namespace.run(*shows).stdout == before
    finally:
        living.kill()
        living.wait()


def test_where_nothing_leads_to_a_container_only_the_nodes_side_is_mended(pair: Pair) -> None:
    """An engine holds a namespace open that no path and no process leads to."""
    with open(pair.one.namespace.path, "rb"):
        subprocess.run(["ip", "netns", "delete", pair.one.namespace.name], check=True)
        eventually(lambda: "does not exist (any more)" in str(pair.node.ask("status")["damage"]))
        pair.node.namespace.run("ip", "route", "del", pair.ips[4])
        eventually(pair.talk)

        ends = (f"{pair.one.id}/eth0", f"{pair.other.id}/eth0")
        (way, *_) = pair.node.ask("endpoint", "trace", *ends, check=False)["ways"]
        hops = {hop["at"]: hop for hop in reversed(way["hops"])}
        assert hops["veth"]["holds"] is True
        assert hops["container"]["holds"] is None
        assert hops["source"]["holds"] is None


def test_after_a_lost_journal_the_agent_finds_its_containers_by_itself(pair: Pair) -> None:
    pair.node.kill()
    for file in pair.node.state_dir.glob("journal.db*"):
        file.unlink()
    pair.node.start()
    eventually(lambda: pair.node.log.read_text().count("endpoint's namespace found") == 2)
    eventually(lambda: pair.node.ask("status")["damage"] == [])
    pair.one.namespace.run("ip", "route", "del", "default")
    eventually(pair.talk)
