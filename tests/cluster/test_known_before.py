"""Other nodes know a container before it starts: while etcd is away, and when its first packet leaves at once.

``FIRST_PACKETS=1000`` sends as many first packets of new containers in some minutes. What was lost is printed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from scapy.layers.inet import UDP
from scapy.packet import Raw

from moorage.lab import Lab, LabNode
from tests.cluster.attacking import Shot, Tally, fire, mark, udp_socket
from tests.cluster.peers import FABRICS, PORT, Join, Peer, create_networks, peers
from tests.cluster.tunnel import from_container, network
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

FAMILIES = (4, 6)
NETWORKS = ("vx", "hg")
BUSY = "nn"
"""The network of those that come and go."""

ENGINES = ("cni", "net-modules")

WARM = 8
"""Addresses of each family that a network keeps ready."""

SETTLED = 1.0
"""Seconds after which nothing that was sent still arrives, and every node has heard what the store told."""

COUNT = int(os.environ.get("FIRST_PACKETS") or 12)
"""Containers; each sends a first packet of each family."""

CHURNING = 3
"""Containers that start and end on each node all the while."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes that have used both networks."""
    with Lab(nodes=2) as lab:
        lab.start()
        create_networks(lab.nodes[0], *NETWORKS, BUSY, "op")
        with peers(lab) as join:
            for node in lab.nodes:
                for name in NETWORKS:
                    join(node, name)
            yield lab


@pytest.fixture
def join(lab: Lab) -> Iterator[Join]:
    """When what lies ready is known everywhere."""
    for node in lab.nodes:
        eventually(lambda node=node: stocked(node))
    time.sleep(SETTLED)
    with peers(lab) as join:
        yield join


def stocked(node: LabNode) -> bool:
    """Whether everything is written, and each network's warm addresses lie ready."""
    status = node.ask("status")
    warm = {(r["network"], r["family"]): r["count"] for r in status["addresses"] if r["state"] == "warm"}
    wanted = [(name, family) for name in NETWORKS for family in FAMILIES]
    return status["outbox"] == 0 and all(warm.get(which, 0) >= WARM for which in wanted)


def arrived(pairs: list[tuple[Peer, Peer]], within: float = SETTLED) -> set[tuple[str, str, int]]:
    """(id, id, family) of what got through, of one datagram in each family from every first to its second."""
    sent = {}
    for number, (source, target) in enumerate(pairs):
        for family in FAMILIES:
            label = f"{number} {family}"
            sent[label] = (source.id, target.id, family)
            with udp_socket(source.namespace, family) as sender:
                sender.sendto(mark(label), (target.ips[family], PORT))
    heard: Counter[str] = Counter()
    ears = {target.id: target.ear for _, target in pairs}
    deadline = time.monotonic() + within
    while len(heard) < len(sent) and time.monotonic() < deadline:
        time.sleep(0.02)
        for ear in ears.values():
            heard.update(ear.heard())
    return {sent[label] for label in heard}


def both_ways(one: Peer, other: Peer) -> list[tuple[Peer, Peer]]:
    return [(one, other), (other, one)]


def unknown(node: LabNode) -> str:
    return " ".join(node.ask("status")["not_known_to_other_nodes_yet"])


def test_a_container_started_while_etcd_is_away_reaches_and_is_reached_across_nodes(
    lab: Lab, join: Join, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = lab.nodes
    old = {name: join(there, name) for name in NETWORKS}
    old_red, open_old = join(there, "vx", "red"), join(there, "op")
    join(here, "op", "red")
    lab.etcd.kill()
    try:
        new = [(join(here, name, engine=engine), engine) for name in NETWORKS for engine in ENGINES]
        pairs = [pair for peer, _ in new for pair in both_ways(peer, old[peer.network])]
        found = arrived(pairs)
        with capsys.disabled():
            print(f"\n  {'etcd is away':<26} {'family':<7} {'reaches':<8} reached")
            for peer, engine in new:
                for family in FAMILIES:
                    other = old[peer.network]
                    row = [
                        "yes" if (source.id, target.id, family) in found else "no"
                        for source, target in both_ways(peer, other)
                    ]
                    print(f"  {FABRICS[peer.network]:<13} {engine:<12} IPv{family}    {row[0]:<8} {row[1]}")
        assert found == {(source.id, target.id, family) for source, target in pairs for family in FAMILIES}

        # What cannot be known before is said.
        red = join(here, "vx", "red")
        assert not arrived([(red, old_red), (red, old["vx"]), (old["vx"], red)])
        assert all(ip in unknown(here) for ip in red.ips.values())
        assert all(ip not in unknown(here) for peer, _ in new for ip in peer.ips.values())
        eventually(lambda: "not known to other nodes yet" in here.log.read_text())

        # Of an open network nobody asks for netgroups.
        assert len(arrived(both_ways(open_new := join(here, "op", "red"), open_old))) == 4
        assert all(ip not in unknown(here) for ip in open_new.ips.values())
    finally:
        lab.etcd.start()
        lab.etcd.wait_ready()
    eventually(lambda: unknown(here) == "", 2 * PATIENCE)
    eventually(lambda: len(arrived(both_ways(red, old_red))) == 4)
    assert not arrived([(red, old["vx"]), (old["vx"], red)])


def announced(node: LabNode, name: str) -> dict[int, str]:
    """A warm address of each family that other nodes know as a member of the network's netgroup."""
    rows = node.ask("ip", "list", "--node", node.name, "--state", "warm", "--network", name)
    return {6 if ":" in r["address"] else 4: r["address"] for r in rows if r["netgroups"] == [name]}


@pytest.mark.parametrize("name", NETWORKS)
def test_nobody_sends_from_a_warm_address_that_other_nodes_know(
    lab: Lab, join: Join, tally: Tally, name: str
) -> None:
    """Containers of another netgroup, on the node that has it and on another, forge it to call members."""
    warm = announced(lab.nodes[0], name)
    members = [join(node, name) for node in lab.nodes]
    for evil in [join(node, name, "red") for node in lab.nodes]:
        for family in FAMILIES:
            forged = [calling(evil, member, family, warm[family], "warm") for member in members]
            truths = [
                calling(one, other, family, one.ips[family], f"truth {one.node.name}")
                for one, other in (members, members[::-1])
            ]
            result = fire(forged, truths, [member.ear for member in members])
            tally.judge(f"a warm address, forged on {evil.node.name}", family, FABRICS[name], result)


def calling(sender: Peer, target: Peer, family: int, source: str, label: str) -> Shot:
    packet = network(source, target.ips[family]) / UDP(sport=PORT, dport=PORT) / Raw(mark(label))
    return Shot(label, lambda: sender.wire.send(from_container(sender, packet)))


@contextlib.contextmanager
def churn(lab: Lab) -> Iterator[None]:
    """Containers come and go on all nodes."""
    over = threading.Event()

    def work(node: LabNode) -> None:
        while not over.is_set():
            with node.container("churn") as container:
                container.add(BUSY)
                container.delete(BUSY)

    threads = [threading.Thread(target=work, args=(node,)) for node in lab.nodes for _ in range(CHURNING)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_the_first_packet_of_a_new_container_arrives_on_another_node(
    lab: Lab, join: Join, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves as soon as the ADD is answered, while other containers come and go on both nodes."""
    here, there = lab.nodes
    far = {name: join(there, name) for name in NETWORKS}
    lost: Counter[tuple[str, int]] = Counter()
    sent: Counter[tuple[str, int]] = Counter()
    with churn(lab):
        for number in range(COUNT):
            name = NETWORKS[number % len(NETWORKS)]
            waiting = first_packets(here, far[name], str(number))
            for family in FAMILIES:
                sent[name, family] += 1
                lost[name, family] += f"{number} {family}" in waiting
    with capsys.disabled():
        rows = (f"{n} IPv{f}: {lost[n, f]} of {sent[n, f]}" for n, f in sorted(sent))
        print(f"\n  first packets lost: {'; '.join(rows)}")
    assert not +lost, lost


def first_packets(node: LabNode, far: Peer, label: str) -> set[str]:
    """A container sends one in each family as soon as it can; which did not arrive."""
    with node.container("first") as container, contextlib.ExitStack() as stack:
        sockets: dict[int, socket.socket] = {
            family: stack.enter_context(udp_socket(container.namespace, family)) for family in FAMILIES
        }
        assert container.add(far.network).exit == 0
        stack.callback(container.delete, far.network)
        for family, sender in sockets.items():
            sender.sendto(mark(f"{label} {family}"), (far.ips[family], PORT))
        waiting = {f"{label} {family}" for family in FAMILIES}
        deadline = time.monotonic() + SETTLED
        while waiting and time.monotonic() < deadline:
            waiting -= far.ear.heard().keys()
            time.sleep(0.002)
    return waiting
