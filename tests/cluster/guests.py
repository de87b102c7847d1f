"""Containers that a module's tests share, on two networks whose nodes reach each other differently."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from moorage.lab import Container, Lab, LabNode, Namespace
from tests.patience import PATIENCE

NETWORKS = {"vx": "vxlan", "hg": "hostgw"}
"""Network -> fabric."""

POOLS = {"vx": ("10.64.0.0/20", "fd64::/112"), "hg": ("10.65.0.0/20", "fd65::/112")}
IFNAMES = {"vx": "eth0", "hg": "eth1"}
FAMILIES = (4, 6)
DEVICE = "mfbvxlan"

Ping: TypeAlias = tuple[Namespace, str, str]
"""From where, to which IP, and from which IP; "" lets the kernel choose."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A container with an interface on each of its networks. ips: by network and family."""

    node: LabNode
    container: Container
    ips: dict[tuple[str, int], str]

    @property
    def namespace(self) -> Namespace:
        return self.container.namespace


def create_networks(node: LabNode) -> None:
    """Both networks, one for each fabric."""
    for name, fabric in NETWORKS.items():
        pools = [argument for cidr in POOLS[name] for argument in ("--pool", cidr)]
        node.cli(
            "network", "create", name, *pools,
            "--fabric", fabric, "--allow-static", "all", "--allow-from", "nodes",
        )  # fmt: skip


@contextlib.contextmanager
def guest(node: LabNode, *networks: str, **labels: str) -> Iterator[Guest]:
    """A container that is attached, and detached in the end."""
    with node.container() as container:
        try:
            ips: dict[tuple[str, int], str] = {}
            for network in networks or NETWORKS:
                answer = container.add(network, IFNAMES.get(network, "eth0"), labels=labels)
                assert answer.exit == 0, answer
                ips |= {(network, family): ip for family, ip in answer.ips.items()}
            yield Guest(node, container, ips)
        finally:
            for network in networks or NETWORKS:
                container.delete(network, IFNAMES.get(network, "eth0"))


def between(guests: Iterable[Guest], networks: Iterable[str] = NETWORKS) -> list[Ping]:
    """From every one to every other, within each network and family."""
    everyone = list(guests)
    return [
        (one.namespace, other.ips[network, family], one.ips[network, family])
        for one in everyone
        for other in everyone
        if one is not other
        for network in networks
        for family in FAMILIES
    ]


def from_nodes(nodes: Iterable[LabNode], guests: Iterable[Guest]) -> list[Ping]:
    """From a process of every node to every container, in every network and family."""
    return [(node.namespace, ip, "") for node in nodes for one in guests for ip in one.ips.values()]


def unanswered(pings: Iterable[Ping], wait: int = 15) -> list[str]:
    """Sentences about those that were not answered; all are sent at once."""
    running = [
        (
            ping,
            ping[0].start(
                "ping", "-n", "-q", "-c", "1", "-W", str(wait), *(("-I", ping[2]) if ping[2] else ()), ping[1],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ),
        )
        for ping in pings
    ]  # fmt: skip
    assert running
    return [f"{ping[0].name} {ping[2]} -> {ping[1]}" for ping, process in running if process.wait()]


def all_answer(pings: Iterable[Ping], within: float = PATIENCE) -> None:
    """Wait until everybody answers. Fails with those who do not."""
    waiting = list(pings)
    deadline = time.monotonic() + within
    while left := unanswered(waiting, wait=2):
        assert time.monotonic() < deadline, f"{len(left)} of {len(waiting)} unanswered, such as {left[:4]}"


def fabric_of(node: LabNode) -> list[str]:
    """Everything that the fabric holds in a node's kernel, as the system's own tools print it; sorted."""
    show = (
        "ip -4 route show proto 157; ip -6 route show proto 157",
        f"bridge fdb show dev {DEVICE}",
        f"ip neigh show dev {DEVICE} nud permanent",
        f"ip -o address show dev {DEVICE}",
        f"ip -o -d link show dev {DEVICE} | grep -oE '\\<mtu [0-9]+|ether [0-9a-f:]+|vxlan id.*dstport [0-9]+'",
    )
    text = node.namespace.run("sh", "-c", "; ".join(show), check=False).stdout
    # A link's number is another after it was made anew.
    return sorted(line.split(": ", 1)[-1].strip() for line in text.splitlines() if " dev mrg" not in line)


def routes_of(node: LabNode) -> str:
    """The routes of a node's fabric, as text."""
    return "\n".join(line for line in fabric_of(node) if " metric 2048" in line)


HEADERS = {4: 28, 6: 48}
"""Bytes of an echo request that are not its payload: IP and ICMP."""


def echo(one: Guest, other: Guest, network: str, family: int, length: int) -> str:
    """What ping says of echo requests of so many bytes that may not be fragmented: one each second until one is
    answered, or an error comes back. A single one may be lost on a busy machine."""
    return one.namespace.run(
        "ping", "-n", "-c", "1", "-w", "20", "-M", "do", "-s", str(length - HEADERS[family]),
        "-I", one.ips[network, family], other.ips[network, family],
        check=False,
    ).stdout  # fmt: skip


def took(holds: Callable[[], bool], within: float = PATIENCE) -> float:
    """Seconds until it held. Fails after ``within``, which says nothing about how fast it should be."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() < begun + within, f"not after {within} s"
        time.sleep(0.005)
    return time.monotonic() - begun


def fabric_is_well(lab: Lab) -> bool:
    """Whether no node's fabric has a problem."""
    return all(node.ask("status")["fabric"]["problems"] == [] for node in lab.nodes)
