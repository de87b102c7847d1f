"""Every kernel object that an endpoint, a network and the node need, taken by another hand: it comes back by itself.

With the agent idle, busy with ADDs and DELs, and stopped meanwhile. What is compared is what the kernel shows of each
endpoint before and after; and that traffic, mapped ports, limits and netgroups are as they were.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from moorage.lab import Container, LabNode
from moorage.lab.container import Answer
from moorage.lab.namespace import Namespace
from tests.patience import PATIENCE

pytestmark = pytest.mark.kernel

BACK_WITHIN = 10.0
"""Seconds that the agent may take on a machine that has time for it; the test waits longer and tells."""

LIMITS = {"moorage.bandwidth.ingress": "10mbit", "moorage.bandwidth.egress": "20mbit"}

TAKEN: dict[str, tuple[str, str]] = {
    "the route to IPv4": ("node", "ip route del IP4 dev LINK"),
    "the route to IPv6": ("node", "ip -6 route del IP6 dev LINK"),
    "routes flushed": ("node", "ip route flush dev LINK; ip -6 route flush dev LINK"),
    "a route that leads elsewhere": ("node", "ip route replace blackhole IP4"),
    "the neighbour of IPv4": ("node", "ip neigh del IP4 dev LINK"),
    "the neighbour of IPv6": ("node", "ip -6 neigh del IP6 dev LINK"),
    "a neighbour with another MAC": (
        "node",
        "ip neigh replace IP4 dev LINK lladdr 02:00:00:00:00:09 nud permanent",
    ),
    "the link is down": ("node", "ip link set LINK down"),
    "the link speaks ARP": ("node", "ip link set LINK arp on"),
    "the link's MAC": ("node", "ip link set LINK address 02:00:00:00:00:09"),
    "the link's MTU": ("node", "ip link set LINK mtu 1000"),
    "IPv6 of the link": ("node", "sysctl -qw net.ipv6.conf.LINK.disable_ipv6=1"),
    "mapped ports from 127.0.0.1": ("node", "sysctl -qw net.ipv4.conf.LINK.route_localnet=0"),
    "the limit to it": ("node", "tc qdisc del dev LINK root"),
    "the limit from it": ("node", "tc qdisc del dev LINK ingress"),
    "the link that limits": ("node", "ip link del SHAPER"),
    "the address": ("inside", "ip addr del IP4/32 dev eth0"),
    "all addresses": ("inside", "ip addr flush dev eth0"),
    "the rules": ("inside", "ip rule del from IP4; ip -6 rule del from IP6"),
    "the default routes": ("inside", "ip route del default; ip -6 route del default"),
    "the routes to its pools": ("inside", "ip route del 10.64.0.0/16; ip -6 route del fd64::/64"),
    "the interface's own table": ("inside", "ip route flush table TABLE; ip -6 route flush table TABLE"),
    "all routes": ("inside", "ip route flush table all dev eth0; ip -6 route flush table all dev eth0"),
    "the gateways": ("inside", "ip neigh flush nud permanent dev eth0"),
    "the inner link is down": ("inside", "ip link set eth0 down"),
    "the inner link's MAC": ("inside", "ip link set eth0 address 02:00:00:00:00:09"),
    "an MTU without IPv6": ("inside", "ip link set eth0 mtu 1000"),
    "IPv6 inside": ("inside", "sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1"),
    "the loopback": ("inside", "ip link set lo down"),
}
"""What -> where, and the commands: each is done to a container of its own."""

MAPPED = ("the address", "mapped ports from 127.0.0.1", "an MTU without IPv6")
"""Whose mapped ports are tried, since it takes a while."""

NODE_WIDE: dict[str, str] = {
    "every set and map": "for k in set map; do "
    "for s in $(nft list ${k}s inet | grep -o \"^\t$k [a-z0-9_]*\" | cut -d' ' -f2); do "
    "nft flush $k inet moorage $s; done; done",
    "every chain": "for c in $(nft list chains inet | grep -o '^\tchain [a-z0-9_]*' | cut -d' ' -f2); do "
    "nft flush chain inet moorage $c; done",
    "the ruleset": "nft flush ruleset",
    "forwarding": "sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0",
}


@dataclass
class Taken:
    """Something that was taken of an endpoint, or of the node. shows: what the kernel shows of it."""

    what: str
    take: Callable[[], object]
    shows: Callable[[], Any]
    before: Any = None
    back_after: float = 0.0

    def is_back(self) -> bool:
        """Whether the kernel shows it again; of the node, others may have added to it meanwhile."""
        now = self.shows()
        return bool(self.before <= now if isinstance(now, set) else self.before == now)

    def differs(self) -> list[str]:
        """What is not as it was."""
        now = self.shows()
        if isinstance(now, set):
            return sorted(self.before - now)
        sides = zip(self.before, now, strict=True)
        pairs = (pair for side in sides for pair in itertools.zip_longest(*side))
        return [f"was {was}, is {shown}" for was, shown in pairs if was != shown]


@dataclass
class Scene:
    """A node with one container for each thing that can be taken."""

    node: LabNode
    containers: dict[str, Container] = field(default_factory=dict)
    endpoints: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, what: str) -> Taken:
        where, command = TAKEN[what]
        container, endpoint = self.containers[what], self.endpoints[what]
        rules = container.namespace.run("ip", "rule").stdout
        table = re.search(rf"from {endpoint['addresses'][0]} lookup (\d+)", rules)
        assert table is not None, rules
        shaper = f"mrg-{endpoint['host_ifname'][3:14]}"
        words = {"IP4": endpoint["addresses"][0], "IP6": endpoint["addresses"][1], "LINK": endpoint["host_ifname"],
                 "TABLE": table[1], "SHAPER": shaper}  # fmt: skip
        filled = re.sub("|".join(words), lambda found: words[found[0]], command)
        room = self.node.namespace if where == "node" else container.namespace
        return Taken(
            what,
            lambda: room.run("sh", "-c", filled),
            lambda: self.shown(container, endpoint["host_ifname"], shaper),
        )

    def shown(self, container: Container, link: str, shaper: str) -> list[Any]:
        """What the kernel holds of one endpoint."""
        outside = f"""
            ip -j link show {link}; ip -j -4 route show table all dev {link}; ip -j -6 route show dev {link}
            ip -j route show {self.endpoints_ip(link)}
            ip -j -4 neigh show dev {link} nud permanent; ip -j -6 neigh show dev {link} nud permanent
            ip -j link show {shaper} type ifb; tc -j qdisc show dev {link}; tc -j qdisc show dev {shaper}
            sysctl -n net.ipv6.conf.{link}.disable_ipv6 net.ipv4.conf.{link}.route_localnet"""
        inside = """
            ip -j link; ip -j -4 addr; ip -j -6 addr; ip -j -4 rule; ip -j -6 rule
            ip -j -4 route show table all; ip -j -6 route show table all; ip -j neigh show nud permanent
            sysctl -n net.ipv6.conf.eth0.disable_ipv6"""
        return [
            [_plain(line) for line in room.run("sh", "-c", command, check=False).stdout.splitlines()]
            for room, command in ((self.node.namespace, outside), (container.namespace, inside))
        ]

    def endpoints_ip(self, link: str) -> str:
        return next(e["addresses"][0] for e in self.endpoints.values() if e["host_ifname"] == link)

    def node_wide(self, what: str) -> Taken:
        run = self.node.namespace.run
        return Taken(what, lambda: run("sh", "-c", NODE_WIDE[what]), self.table_and_settings)

    def table_and_settings(self) -> set[str]:
        """Rules, elements and settings; what others add meanwhile is beside the point."""
        run = self.node.namespace.run
        listed = run("nft", "-j", "list", "table", "inet", "moorage", check=False).stdout
        found = {
            run("sysctl", name).stdout for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
        }
        for entry in json.loads(listed)["nftables"] if listed else ():
            for kind, what in entry.items():
                elements = (
                    what.pop("elem", ())
                    if isinstance(what, dict) and what.get("name") != "over_limit"
                    else ()
                )
                found.add(f"{kind} {json.dumps(_timeless(what), sort_keys=True)}")
                found |= {
                    f"{what['name']} {json.dumps(_timeless(each), sort_keys=True)}" for each in elements
                }
        return found

    def works(self) -> str:
        """Why not, if traffic from and to anybody is not as it was, mapped ports included; "" if it is."""
        everybody = [ip for what in TAKEN for ip in self.endpoints[what]["addresses"]]
        friend, enemy = self.containers["friend"].namespace, self.containers["enemy"].namespace
        if lost := set(everybody) - _answering(friend, everybody):
            return f"{sorted(lost)} do not answer who shares their netgroup"
        if got := _answering(enemy, everybody):
            return f"{sorted(got)} answer who does not"
        friends = self.endpoints["friend"]["addresses"]
        for what in MAPPED:
            if lost := set(friends) - _answering(self.containers[what].namespace, friends):
                return f"{what}: nothing gets out to {lost}"
            port = self.endpoints[what]["port_mappings"][0]["host_port"]
            for address in ("127.0.0.1", "198.18.0.1", "fd98::1"):
                if not self.maps(what, address, port):
                    return f"{what}: its mapped port is not reached by {address}"
        return ""

    def sends(self, what: str, to: str) -> float:
        """Mbit/s of datagrams that arrive of all that a container can send for a second."""
        receives = (sys.executable, "-c", RECEIVE, to)
        with self.containers["friend"].namespace.start(*receives, stdout=subprocess.PIPE) as receiver:
            assert receiver.stdout is not None
            assert receiver.stdout.readline()
            self.containers[what].namespace.run(sys.executable, "-c", FLOOD, to)
            return float(receiver.stdout.readline())

    def maps(self, what: str, address: str, port: int) -> bool:
        """Whether the mapped port leads into the container."""
        family = "[::]" if ":" in address else "0.0.0.0"
        listens = ("timeout", "20", sys.executable, "-c", ACCEPT, family.strip("[]"))
        with self.containers[what].namespace.start(*listens, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            assert server.stdout.readline()
            asked = self.node.namespace.run(sys.executable, "-c", CONNECT, address, str(port), check=False)
            server.kill()
        return asked.returncode == 0


ACCEPT = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 80), family=family) as server:
    print(flush=True)
    server.accept()[0].close()
"""
RECEIVE = """
import socket, sys, time
made = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
made.bind((sys.argv[1], 7777))
made.settimeout(30)
print(flush=True)
made.recv(2000)
first = last = time.monotonic()
count = 0
made.settimeout(1)
try:
    while True:
        count += len(made.recv(2000))
        last = time.monotonic()
except TimeoutError:
    print(count * 8 / (last - first) / 1e6, flush=True)
"""
FLOOD = """
import socket, sys, time
made = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
until = time.monotonic() + 1
while time.monotonic() < until:
    made.sendto(bytes(1200), (sys.argv[1], 7777))
"""
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()"


def _answering(room: Namespace, ips: list[str]) -> set[str]:
    """Who answers pings from there."""
    pings = "".join(f"(ping -n -q -c1 -W2 {ip} >/dev/null && echo {ip}) & " for ip in ips)
    return set(room.run("sh", "-c", f"{pings} wait").stdout.split())


def _plain(line: str) -> Any:
    """Of `ip -j`, what does not change by itself, and is somebody's."""
    try:
        found = json.loads(line)
    except ValueError:
        return line
    if not isinstance(found, list):
        return found
    return sorted({json.dumps(_timeless(_own(entry)), sort_keys=True) for entry in found if _own(entry)})


def _own(entry: dict[str, Any]) -> dict[str, Any]:
    """Without what the kernel makes anew another way: its own local routes, and the MAC of what only limits."""
    if entry.get("table") == "local":
        kept = entry.get("type") == "local" and entry.get("dev") == "eth0"
        return {key: entry[key] for key in ("dst", "dev", "type", "table")} if kept else {}
    if str(entry.get("ifname")).startswith("mrg-"):
        return {**entry, "address": ""}
    return entry


_BY_THE_WAY = {"handle", "index", "ifindex", "valid_life_time", "preferred_life_time", "protocol", "bytes", "packets",
               "operstate", "counter", "elem", "qdisc", "parent", "dynamic", "link_index", "num_tx_queues"}  # fmt: skip


def _timeless(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {key: _timeless(value) for key, value in entry.items() if key not in _BY_THE_WAY}
    if isinstance(entry, list):
        return [_timeless(value) for value in entry if value != {}]
    return entry


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with ExitStack() as stack:
        node = stack.enter_context(LabNode("taken"))
        node.start()
        pools = ("--pool", "10.64.0.0/16", "--pool", "fd64::/64")
        allowed = ("--allow-hostport", "9000-9099", "--allow-netgroup", "enemies")
        node.cli("network", "create", "web", *pools, *allowed, "--warm", "64")
        scene = Scene(node)
        for number, what in enumerate((*TAKEN, "friend", "enemy")):
            container = stack.enter_context(node.container("taken"))
            asked: dict[str, Any] = {
                "labels": LIMITS,
                "port_mappings": [{"host_port": 9000 + number, "container_port": 80}],
            }
            if what == "enemy":
                asked = {"groups": ["enemies"]}
            answer = container.add("web", **asked)
            assert answer.exit == 0, answer.stdout
            scene.containers[what] = container
        listed = {e["container_id"]: e for e in node.ask("endpoint", "list")}
        for what, container in scene.containers.items():
            scene.endpoints[what] = listed[container.id]
        yield scene


@contextmanager
def churn(node: LabNode) -> Iterator[None]:
    """Two ADDs and DELs a second beside, all of which have to succeed."""
    over = threading.Event()

    def come_and_go() -> list[Answer]:
        answers = []
        while not over.is_set():
            with node.container("churn") as container:
                answers += [container.add("web"), container.delete("web")]
            over.wait(0.4)
        return answers

    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(come_and_go)
        try:
            yield
        finally:
            over.set()
    assert [answer.stdout for answer in running.result() if answer.exit] == []


def back(taken: list[Taken], begun: float) -> None:
    """Wait until all of it is back, and note when."""
    missing = list(taken)
    while missing:
        for one in list(missing):
            if one.is_back():
                one.back_after = time.monotonic() - begun
                missing.remove(one)
        waited = time.monotonic() - begun
        if missing and waited > PATIENCE:
            pytest.fail(
                "\n".join(f"{one.what}: {text}" for one in missing for text in one.differs()), pytrace=False
            )
        time.sleep(0.1)


def table(title: str, taken: list[Taken]) -> str:
    rows = "\n".join(f"  {one.back_after:5.1f} s  {one.what}" for one in taken)
    return f"\n{title}, back after\n{rows}"


@pytest.fixture(params=["idle", "busy", "stopped meanwhile"])
def taken_and_back(
    scene: Scene, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[Taken]], None]:
    """Takes all of it from an agent in one of these states, waits until it is back, and prints after how long."""
    agent = request.param

    def take(taken: list[Taken]) -> None:
        for one in taken:
            one.before = one.shows()
        with ExitStack() as stack:
            if agent == "busy":
                stack.enter_context(churn(scene.node))
            if agent == "stopped meanwhile":
                assert scene.node.stop() == 0
            begun = time.monotonic()
            for one in taken:
                one.take()
            if agent == "stopped meanwhile":
                there = [one.what for one in taken if one.is_back()]
                assert there == [], "each of it is seen to be gone"
                begun = time.monotonic()
                scene.node.start()
            back(taken, begun)
        with capsys.disabled():
            print(table(f"agent {agent}", taken))

    return take


def test_what_is_taken_of_an_endpoint_comes_back(
    scene: Scene, taken_and_back: Callable[[list[Taken]], None]
) -> None:
    taken_and_back([scene.of(what) for what in TAKEN])
    assert scene.node.ask("status")["damage"] == []
    assert scene.works() == ""
    for friend in scene.endpoints["friend"]["addresses"]:
        assert scene.sends("the limit from it", friend) < 2 * 20, "its limit holds again"
        assert scene.sends("all routes", friend) < 2 * 20, "and that of one whose routes were taken"


@pytest.mark.parametrize("what", NODE_WIDE)
def test_what_is_taken_of_the_node_comes_back(
    scene: Scene, taken_and_back: Callable[[list[Taken]], None], what: str
) -> None:
    taken_and_back([scene.node_wide(what)])
    assert scene.works() == ""
