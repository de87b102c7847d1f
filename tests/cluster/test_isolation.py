"""Netgroups over nodes: every ordered pair of containers, with real packets, against the one-line definition."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moorage.lab import Container, Lab, LabNode
from tests.cluster.prober import PATIENCE, Prober
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

NETGROUPS = ("red", "green", "blue")
SETTLED = 0.4
"""Seconds after which nothing that was sent still arrives."""

ROUNDS = 100
"""Times that both nodes have an ADD and a DEL."""
RATE = 1000
"""Packets a second. They are sent a little faster, so that a pause is made up for."""
SELDOM = 10
"""The same, between pairs that are not looked at closely."""
UNTOLD = 1
"""Of some 200,000 packets, how many the kernel may lose without counting them: one was, in one of many runs on a busy
machine. A change that cuts what is allowed loses some each time, and there are hundreds of changes."""
ROUND = 0.15
"""Seconds that the packets of a round take at that rate; about what its calls take where nothing else runs."""


@dataclass
class Peer:
    """A container under test."""

    name: str
    node: LabNode
    container: Container
    network: str
    netgroups: tuple[str, ...]
    ips: dict[int, str]
    prober: Prober

    def may_be_called_by(self, other: Peer) -> bool:
        """The definition."""
        return (
            self.network == "open"
            or "public" in self.netgroups
            or bool(set(self.netgroups) & set(other.netgroups))
        )


Join = Callable[..., Peer]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2) as lab:
        lab.start()
        for name, number, isolation in (("web", 64, "netgroups"), ("open", 65, "open")):
            lab.nodes[0].cli(
                "network", "create", name, "--pool", f"10.{number}.0.0/16", "--pool", f"fd{number}::/64",
                "--allow-netgroup", "*", "--allow-public", "--isolation", isolation,
            )  # fmt: skip
        yield lab


@pytest.fixture
def join(lab: Lab) -> Iterator[Join]:
    """join(node, "red", "green", network="web") -> a peer that is gone when the test ends."""
    with contextlib.ExitStack() as stack:

        def start(node: LabNode, *netgroups: str, network: str = "web") -> Peer:
            container = stack.enter_context(node.container("peer"))
            labels = {"moorage.netgroups": ",".join(netgroups)} if netgroups else {}
            answer = container.add(network, labels=labels)
            assert answer.exit == 0, answer.stdout
            stack.callback(container.delete, network)
            prober = stack.enter_context(Prober(container.namespace.command()))
            return Peer(
                container.id[:8], node, container, network, netgroups or (network,), answer.ips, prober
            )

        yield start


def arrived(peers: list[Peer]) -> set[tuple[str, str, int]]:
    """(from, to, family) of every packet that got through when everybody calls everybody."""
    for peer in peers:
        peer.prober.heard()
    for peer in peers:
        peer.prober.send(
            {
                ip: f"{peer.name} {other.name} {family}"
                for other in peers
                if other is not peer
                for family, ip in other.ips.items()
            }
        )
    time.sleep(SETTLED)
    found = set()
    for peer in peers:
        for mark in peer.prober.heard():
            source, target, family = mark.split()
            assert target == peer.name
            found.add((source, target, int(family)))
    return found


def defined(peers: list[Peer]) -> set[tuple[str, str, int]]:
    return {
        (peer.name, other.name, family)
        for peer in peers
        for other in peers
        for family in other.ips
        if other is not peer and other.may_be_called_by(peer)
    }


def as_defined(peers: list[Peer]) -> None:
    """What gets through becomes what is defined, and stays it."""
    deadline = time.monotonic() + PATIENCE
    while (found := arrived(peers)) != (wanted := defined(peers)):
        assert time.monotonic() < deadline, {"forbidden": found - wanted, "missing": wanted - found}
    assert arrived(peers) == wanted


def test_every_pair_may_talk_iff_it_shares_a_netgroup_whatever_changes(lab: Lab, join: Join) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    def some() -> tuple[str, ...]:
        picked = rng.sample(NETGROUPS, rng.randint(1, 2))
        return (*picked, "public") if rng.random() < 0.15 else tuple(picked)

    peers = [join(node, *some()) for node in lab.nodes for _ in range(4)]
    peers += [join(node, "red", network="open") for node in lab.nodes]
    peers.append(join(lab.nodes[0]))  # the default: the network's own name
    peers.append(join(lab.nodes[1]))
    as_defined(peers)
    for _ in range(3):
        for peer in rng.sample(peers[:8], 2):
            peer.netgroups = some()
            rng.choice(lab.nodes).cli("endpoint", "set-netgroups", peer.container.id, *peer.netgroups)
        as_defined(peers)
    for one, other in ((rng.choice(peers), rng.choice(peers)) for _ in range(6)):
        if one is not other:
            said = lab.nodes[0].cli("policy", "test", one.container.id, other.container.id, check=False)
            assert (said.returncode == 0) == other.may_be_called_by(one), said.stdout
    here, there = lab.nodes
    said = here.cli("policy", "test", peers[0].container.id, there.ip, "--port", "80")
    assert f"ask on node {there.name}" in said.stdout, "only that node knows where its ports lead"


def test_churn_lets_nothing_forbidden_through_and_breaks_nothing_allowed(
    lab: Lab, join: Join, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 ADDs and 200 DELs on both nodes, members of the same netgroups among them, under packets in all directions:
    1,000 a second each way between a pair that may talk and one that may not, on one node and across nodes.

    How fast is the machine's affair; how many packets there are to every change is not: on a machine that sends more
    slowly, the changes wait.
    """
    red = [join(node, "red") for node in lab.nodes]
    near = join(lab.nodes[0], "red")
    green = [join(node, "green", "blue") for node in lab.nodes]
    everyone = [*red, near, *green]
    as_defined(everyone)
    for caller, called, family in ((red[0], red[1], 4), (green[1], green[0], 6), (near, red[0], 6)):
        assert caller.prober.connect(called.ips[family])
        caller.prober.stream()
    busy = {
        mark
        for one, other, family in (
            (near, red[0], 4),
            (red[0], red[1], 6),
            (near, green[0], 6),
            (green[0], red[1], 4),
        )
        for mark in (f"{one.name} {other.name} {family}", f"{other.name} {one.name} {family}")
    }
    for node in lab.nodes:
        # Each datagram is a connection to the kernel, and its table is not without end.
        node.namespace.run("sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=3")
    dropped = dropped_by_the_machine(everyone)
    begun = time.monotonic()
    for peer in everyone:
        marks = {
            f"{peer.name} {other.name} {family}": ip
            for other in everyone
            if other is not peer
            for family, ip in other.ips.items()
        }
        peer.prober.keep_sending({m: (ip, 1.1 * RATE if m in busy else SELDOM) for m, ip in marks.items()})
    for number in range(ROUNDS):
        change(lab, ("red", "green", "blue", "red,green,blue", "other")[number % 5])
        wanted = (number + 1) * ROUND * RATE
        eventually(lambda wanted=wanted: slowest(everyone, busy) >= wanted, within=10 * PATIENCE)
    took = time.monotonic() - begun
    sent = {mark: count for peer in everyone for mark, count in peer.prober.stop_sending().items()}
    with capsys.disabled():
        achieved = min(sent[mark] for mark in busy) / took
        print(
            f"\n  {ROUNDS * 2} ADDs and as many DELs in {took:.0f} s, {achieved:.0f} packets/s the slowest way"
        )
    assert min(sent[mark] for mark in busy) >= ROUNDS * ROUND * RATE
    allowed = {f"{source} {target} {family}" for source, target, family in defined(everyone)}
    assert busy & allowed
    assert busy - allowed
    expected = Counter({mark: count for mark, count in sent.items() if mark in allowed})
    heard: Counter[str] = Counter()
    deadline = time.monotonic() + PATIENCE
    while (expected - heard).total() and time.monotonic() < deadline:
        time.sleep(SETTLED)
        heard = sum((peer.prober.counted() for peer in everyone), Counter[str]())
    assert heard.keys() <= allowed, "forbidden packets passed"
    assert all(heard[mark] for mark in allowed)
    lost = expected - heard
    told = f"allowed packets were lost: {dict(lost)}\n" + "\n".join(
        node.namespace.run("ip", "-s", "-s", "link").stdout for node in lab.nodes
    )
    assert lost.total() <= dropped_by_the_machine(everyone) - dropped + UNTOLD, told
    for caller in (red[0], green[1], near):
        stream = caller.prober.stop_streaming()
        assert stream["problem"] == ""
        assert stream["returned"] > ROUNDS
        assert stream["longest"] < PATIENCE


def change(lab: Lab, netgroups: str) -> None:
    """An ADD on each node, at the same time, and then a DEL."""
    both = [node.container("churn") for node in lab.nodes]
    with both[0], both[1]:
        labels = {"moorage.netgroups": netgroups}
        for command in ("ADD", "DEL"):
            calls = [c.start_call(command, c.config("web", labels=labels)) for c in both]
            assert [c.finish_call(call).exit for c, call in zip(both, calls, strict=True)] == [0, 0]


def slowest(peers: list[Peer], marks: set[str]) -> int:
    """How much was sent so far of that of which least was."""
    return min(count for peer in peers for mark, count in peer.prober.sent().items() if mark in marks)


def dropped_by_the_machine(peers: list[Peer]) -> int:
    """Packets that found a queue full: the kernel's own between links (also those of others), or a socket's."""
    processors = Path("/proc/net/softnet_stat").read_text().splitlines()
    return sum(int(line.split()[1], 16) for line in processors) + sum(p.prober.overflowed() for p in peers)


def test_leaving_a_netgroup_cuts_what_is_established_on_every_node(lab: Lab, join: Join) -> None:
    one, near, far = join(lab.nodes[0], "red", "blue"), join(lab.nodes[0], "red"), join(lab.nodes[1], "red")
    blue = join(lab.nodes[1], "blue")
    as_defined([one, near, far, blue])
    for peer in (near, far, blue):
        assert peer.prober.connect(one.ips[4])
        assert peer.prober.echoes("before")
    lab.nodes[1].cli("endpoint", "set-netgroups", one.container.id, "blue")
    one.netgroups = ("blue",)
    as_defined([one, near, far, blue])
    assert not near.prober.echoes("after", within=SETTLED)
    assert not far.prober.echoes("after", within=SETTLED)
    assert blue.prober.echoes("after"), "what is still allowed goes on"


def test_the_follower_outlives_an_agents_restart_and_the_store_being_away(lab: Lab, join: Join) -> None:
    near, far = join(lab.nodes[0], "red"), join(lab.nodes[1], "red")
    stranger = join(lab.nodes[1], "green")
    everyone = [near, far, stranger]
    as_defined(everyone)
    assert far.prober.connect(near.ips[4])
    lab.partition(lab.nodes[0], *lab.etcd.members)
    try:
        lab.nodes[0].kill()
        lab.nodes[0].launch()
        eventually(lab.nodes[0].answers, within=PATIENCE)
        assert arrived(everyone) == defined(everyone), "what the table knew is kept while the store is away"
        assert far.prober.echoes("still there")
    finally:
        lab.heal()
    eventually(lambda: lab.nodes[0].ask("status")["problem"] == "", within=PATIENCE)
    as_defined(everyone)
    assert far.prober.echoes("still there")


@pytest.mark.parametrize("moves", [False, True], ids=["to the same node", "to another node"])
def test_flows_of_a_released_address_never_reach_its_next_owner(lab: Lab, join: Join, moves: bool) -> None:
    """Whom the old owner called may answer it, for minutes as far as connection tracking goes; the new one is in
    no netgroup with them. A reservation lets the address be reused without a cooldown."""
    here, there = lab.nodes
    address, key = ("10.64.200.1", "moves") if moves else ("10.64.200.2", "stays")
    here.cli("ip", "reserve", address, "--key", key)
    near, far = join(here, "public"), join(there, "public")
    labels = {"moorage.reservation": key}
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(here.container("old"))
        assert old.add("web", labels={**labels, "moorage.netgroups": "red"}).ips[4] == address
        prober = stack.enter_context(Prober(old.namespace.command()))
        for peer in (near, far):
            assert prober.connect(peer.ips[4])
            assert prober.echoes("hello")
            assert prober.flow(peer.ips[4]), "its answers come back on a UDP flow that stays"
        assert old.delete("web").exit == 0
    with contextlib.ExitStack() as stack:
        new = stack.enter_context((there if moves else here).container("new"))
        assert new.add("web", labels={**labels, "moorage.netgroups": "green"}).ips[4] == address
        stack.callback(new.delete, "web")
        prober = stack.enter_context(Prober(new.namespace.command()))
        ear = stack.enter_context(prober.listening_to_all())
        for peer in (near, far):
            peer.prober.answer_flows("late")
        time.sleep(SETTLED)
        assert ear.packets() == [], "not a packet of theirs"
    here.cli("ip", "unreserve", address)


def test_an_address_released_while_the_store_is_away_is_nobodys_until_it_is_back(
    lab: Lab, join: Join
) -> None:
    node = lab.nodes[0]
    peer = join(node, "public")
    lab.partition(node, *lab.etcd.members)
    try:
        with node.container("old") as old, node.container("new") as new:
            before = old.add("web", labels={"moorage.netgroups": "red"}).ips
            assert old.delete("web").exit == 0
            after = new.add("web", labels={"moorage.netgroups": "green"}).ips
            assert not set(before.values()) & set(after.values())
            peer.prober.send(dict.fromkeys(before.values(), "late"))
            new.delete("web")
    finally:
        lab.heal()
    eventually(lambda: node.ask("status")["problem"] == "", within=PATIENCE)
