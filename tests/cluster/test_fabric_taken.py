"""Whatever of the fabric somebody takes out of a node's kernel comes back by itself: while the cluster is idle, while
another node's blocks change all the time, and when it was taken while no agent ran."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest

from moorage.lab import Lab, LabNode
from moorage.lab.node import with_source
from tests.cluster.guests import DEVICE, FAMILIES, NETWORKS, Guest, all_answer, between, routes_of, took
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

GHOST = Path(__file__).with_name("ghost.py")
GHOSTS = "10.79.0."
"""Begins the addresses of a network whose blocks another node claims and gives back."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Objects of one kind. listed: a command that prints one a line. take: from such a line, what takes it away."""

    listed: str
    take: Callable[[str], str]


def _route(line: str) -> str:
    destination = " ".join(line.split()[: 2 if line.startswith("blackhole") else 1])
    return f"ip -{6 if ':' in destination else 4} route del {destination} proto 157 metric 2048"


def _tunnel(line: str) -> str:
    return f"bridge fdb del {line.partition(' ')[0]} dev {DEVICE}"


def _neighbour(line: str) -> str:
    return f"ip neigh del {line.partition(' ')[0]} dev {DEVICE}"


def _address(line: str) -> str:
    return f"ip address del {line.split()[2]} dev {DEVICE}"


OBJECTS = {
    **{
        f"IPv{family} {name}": Kind(
            f"ip -{family} route show proto 157 | grep 'metric 2048' | {which}", _route
        )
        for family in FAMILIES
        for name, which in (
            ("routes of vxlan", f"grep {DEVICE}"),
            ("routes of hostgw", "grep 'dev up0'"),
            ("drops of what is at home", "grep blackhole"),
        )
    },
    "tunnels": Kind(f"bridge fdb show dev {DEVICE}", _tunnel),
    "neighbours": Kind(f"ip neigh show dev {DEVICE} nud permanent", _neighbour),
    "addresses of the device": Kind(f"ip -o address show dev {DEVICE}", _address),
    "the device": Kind(f"ip -o link show {DEVICE}", lambda _: f"ip link delete {DEVICE}"),
    "the device's being up": Kind(f"ip -o link show up dev {DEVICE}", lambda _: f"ip link set {DEVICE} down"),
}
"""What a fabric owns in a kernel."""

ROUNDS = (
    ("tunnels", "neighbours"),
    tuple(name for name in OBJECTS if name.startswith("IPv") or name == "addresses of the device"),
    ("the device",),
    ("the device's being up",),
)
"""What is taken at once. Of the first the kernel tells nobody; any of the others has everything compared."""


@pytest.fixture(scope="module")
def home(lab: Lab, guests: list[Guest]) -> Iterator[LabNode]:
    """A node that has all of that, an address away from its blocks among it."""
    node = lab.nodes[0]
    labels = [
        {"moorage.ip": beside(guests[1].ips[network, 4]), "moorage.ip6": beside(guests[1].ips[network, 6])}
        for network in NETWORKS
    ]
    with contextlib.ExitStack() as stack:
        for network, asked in zip(NETWORKS, labels, strict=True):
            container = stack.enter_context(node.container())
            assert container.add(network, labels=asked).exit == 0
            stack.callback(container.delete, network)
        all_answer(between(guests))
        eventually(lambda: all(listed(node, name) for name in OBJECTS))
        away = [ip for asked in labels for ip in asked.values()]
        eventually(lambda: all(f"blackhole {ip} " in routes_of(node) for ip in away))
        yield node


def beside(ip: str) -> str:
    """An address of the same block that nobody has."""
    packed = ip_address(ip).packed
    return str(ip_address(packed[:-1] + bytes([packed[-1] ^ 0x18])))


def listed(node: LabNode, name: str) -> list[str]:
    """The objects of that name in a node's kernel; none of the network whose blocks come and go."""
    text = node.namespace.run("sh", "-c", OBJECTS[name].listed, check=False).stdout
    # A link's number is another after it was made anew.
    return sorted(re.sub(r"^\d+: ", "", line).strip() for line in text.splitlines() if GHOSTS not in line)


def take(node: LabNode, names: Iterable[str]) -> None:
    """Take every object of these names away. Fails if that cannot be done."""
    commands = [OBJECTS[name].take(line) for name in names for line in listed(node, name)]
    assert len(commands) >= len(list(names))
    node.namespace.run("sh", "-ec", "; ".join(commands))


@contextlib.contextmanager
def blocks_coming_and_going(lab: Lab) -> Iterator[None]:
    """Another node claims a block, and gives it back, twice a second."""
    node = lab.nodes[0]
    node.cli("network", "create", "ghosts", "--pool", f"{GHOSTS}0/24", "--warm", "0")
    ghost = lab.nodes[1].namespace.start(
        sys.executable, str(GHOST), f"{GHOSTS}0-24", f"{GHOSTS}0/26",
        env=with_source(lab.nodes[1].environment), stdin=subprocess.PIPE,
    )  # fmt: skip
    try:
        eventually(lambda: GHOSTS in node.namespace.run("ip", "route").stdout)
        yield
    finally:
        ghost.communicate(timeout=PATIENCE)
        node.cli("network", "delete", "ghosts")


@contextlib.contextmanager
def idle(_: Lab) -> Iterator[None]:
    yield


@pytest.mark.parametrize("while_", [idle, blocks_coming_and_going])
def test_what_is_taken_while_the_agent_runs_comes_back(
    lab: Lab, home: LabNode, tell: list[str], while_: Callable[[Lab], AbstractContextManager[None]]
) -> None:
    with while_(lab):
        for names in ROUNDS:
            before = {name: listed(home, name) for name in OBJECTS}
            take(home, names)
            tell.append(f"{', '.join(names)}: {back(home, before):.1f} s")


@pytest.mark.parametrize("names", [(*ROUNDS[0], *ROUNDS[1]), ROUNDS[2]], ids=["parts", "device"])
def test_what_is_taken_while_no_agent_runs_comes_back(
    lab: Lab, home: LabNode, tell: list[str], names: tuple[str, ...]
) -> None:
    before = {name: listed(home, name) for name in OBJECTS}
    home.kill()
    take(home, names)
    home.start()
    tell.append(f"{len(names)} kinds: {back(home, before):.1f} s after the agent served")


def back(node: LabNode, before: dict[str, list[str]]) -> float:
    """Seconds until the node's kernel holds what it held before."""
    return took(lambda: all(listed(node, name) == lines for name, lines in before.items()))
