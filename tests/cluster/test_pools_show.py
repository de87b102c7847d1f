"""Pools over each kind of the nodes' networks, made after the nodes and before them: what is refused, warned of and
kept. The table is printed. The store is asked all the while.

``POOLS_OF_EACH_KIND=10`` has ten of each, of all sizes from /20 to /29, in some three minutes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipam.taken import Kind
from moorage.lab import Container, Lab, LabNode
from moorage.lab.node import AGENT
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("pools"),
]

COUNT = int(os.environ.get("POOLS_OF_EACH_KIND") or 2)
KINDS = (Kind.CONNECTED, Kind.ADDRESS, Kind.GATEWAY, Kind.RESOLVER, Kind.STORE, Kind.ROUTE)

EARLY, LATE = 100, 200
"""The second octet of what nodes use that are there first, and of what those use that come later."""

WITH_RESOLVERS = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'


def used(base: int, kind: Kind, number: int) -> str:
    """An address that a node uses, or that lies in what it uses."""
    return f"10.{base + KINDS.index(kind)}.{16 * number}.9"


def pool(base: int, kind: Kind, number: int) -> str:
    """A pool that has that address, of a size of its own: /20 to /29."""
    first = 8 if 20 + number == 29 else 0
    return f"10.{base + KINDS.index(kind)}.{16 * number}.{first}/{20 + number}"


def with_links(lab: Lab, name: str, host: int, base: int) -> LabNode:
    """A node that is connected to COUNT networks, has as many more addresses, and as many gateways."""
    node = LabNode(name, store=lab.etcd.url, switch=lab.switch, host=host)
    node.create()
    run = node.namespace.run
    for number in range(COUNT):
        run("ip", "link", "add", f"lan{number}", "type", "veth", "peer", "name", f"far{number}")
        inside = used(base, Kind.CONNECTED, number).removesuffix(".9")
        run("ip", "address", "add", f"{inside}.10/28", "dev", f"lan{number}")
        run("ip", "link", "set", f"lan{number}", "up")
        run("ip", "address", "add", f"{used(base, Kind.ADDRESS, number)}/32", "dev", "up0")
        gateway = used(base, Kind.GATEWAY, number)
        run("ip", "route", "add", f"192.0.2.{number}", "via", gateway, "dev", "up0", "onlink")
    return node


def with_services(lab: Lab, name: str, host: int, base: int, directory: Path) -> LabNode:
    """A node that asks COUNT name servers, knows as many more endpoints of its store, and has as many routes."""
    resolvers = directory / f"resolv-{name}.conf"
    resolvers.write_text("".join(f"nameserver {used(base, Kind.RESOLVER, n)}\n" for n in range(COUNT)))
    hosts, _, options = lab.etcd.url.partition("?")
    endpoints = "".join(f",{used(base, Kind.STORE, number)}:2379" for number in range(COUNT))
    node = LabNode(
        name,
        agent=("unshare", "-m", "sh", "-c", WITH_RESOLVERS, str(resolvers), *AGENT),
        store=f"{hosts}{endpoints}" + f"?{options}" * bool(options),
        switch=lab.switch,
        host=host,
    )
    node.create()
    for number in range(COUNT):
        destination = f"10.{base + KINDS.index(Kind.ROUTE)}.{16 * number}.0/22"
        node.namespace.run("ip", "route", "add", destination, "via", "198.18.0.254")
    return node


class Asking:
    """Asks the store from a node until it is told to end. failed: what was said when it did not answer."""

    def __init__(self, node: LabNode, store: str) -> None:
        self._node, self._store = node, store
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.asked = 0
        self.failed: list[str] = []

    def _ask(self) -> None:
        while not self._ending.is_set():
            self.asked += 1
            if not self._node.namespace.pings(self._store, wait=2):
                self.failed.append(f"{self._node.name} did not reach the store")
            if not self._node.ask("status")["in_sync"]:
                self.failed.append(f"{self._node.name} was out of sync")

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    with capsys.disabled():
        print("", *lines, sep="\n  ")


def test_pools_over_each_kind_before_and_after_nodes_join(tmp_path: Path, tell: list[str]) -> None:
    with Lab(nodes=1, etcd=1) as lab, contextlib.ExitStack() as stack:
        lab.start()
        (plain,) = lab.nodes
        asking = [stack.enter_context(Asking(plain, lab.etcd.members[0].ip))]
        for node in (with_links(lab, "a1", 11, EARLY), with_services(lab, "b1", 12, EARLY, tmp_path)):
            stack.callback(node.delete)
            node.start()
        after = {kind: make_after(plain, kind) for kind in KINDS}
        containers = {kind: stack.enter_context(plain.container()) for kind in KINDS}
        for kind, container in containers.items():
            make_before(plain, kind, container)
        for node in (with_links(lab, "a2", 13, LATE), with_services(lab, "b2", 14, LATE, tmp_path)):
            stack.callback(node.delete)
            node.start()
            asking.append(stack.enter_context(Asking(node, lab.etcd.members[0].ip)))
        before = {kind: look(plain, kind) for kind in KINDS}
        for kind, container in containers.items():
            container.delete(kind.value)
    tell.append("pools over      made after the node        made before the node")
    tell.append("                refused warned made        closed told open  assigned before, kept")
    for kind in KINDS:
        a, b = after[kind], before[kind]
        tell.append(
            f"{kind.value:15} {a['refused']:7} {a['warned']:6} {a['made']:4}        "
            f"{b['closed']:6} {b['told']:4} {b['open']:4}  {b['kept']}"
        )
    failed = [sentence for one in asking for sentence in one.failed]
    tell.append(f"the store was asked {sum(one.asked for one in asking)} times; not reached: {len(failed)}")
    assert failed == []
    for kind in KINDS:
        closes = kind is not Kind.ROUTE
        assert after[kind] == Counter(
            refused=COUNT * closes, warned=COUNT * (not closes), made=COUNT * (not closes)
        )
        assert before[kind] == Counter(
            closed=COUNT * closes, told=COUNT * closes, open=COUNT * (not closes), kept=1
        )


def make_after(plain: LabNode, kind: Kind) -> Counter[str]:
    """Pools over what nodes are known to use, one by one."""
    eventually(lambda: said_by_all(plain, kind) >= COUNT)
    found: Counter[str] = Counter()
    for number in range(COUNT):
        name = f"{kind.value}{number}"
        cidr = pool(EARLY, kind, number)
        answer = plain.cli("network", "create", name, "--pool", cidr, "--fabric", "none", check=False)
        found["made"] += answer.returncode == 0
        found["refused"] += answer.returncode != 0 and "collides with" in answer.stderr
        found["warned"] += "Warning: the pool" in answer.stderr
        if answer.returncode == 0:
            plain.cli("network", "delete", name)
    return found


def said_by_all(plain: LabNode, kind: Kind) -> int:
    """How many entries of a kind the nodes that are there have told."""
    nodes = [row["name"] for row in plain.ask("node", "list")]
    lines = [line for node in nodes for line in plain.ask("node", "show", node)["surroundings"]]
    return sum(line.startswith(f"{kind.value} 10.") for line in lines)


def make_before(plain: LabNode, kind: Kind, container: Container) -> None:
    """Pools over what nobody is known to use yet, and a container that has an address of the first."""
    cidrs = [argument for number in range(COUNT) for argument in ("--pool", pool(LATE, kind, number))]
    plain.cli("network", "create", kind.value, *cidrs, "--fabric", "none", "--allow-static", "all")
    answer = container.add(kind.value, labels={"moorage.ip": used(LATE, kind, 0)})
    assert answer.exit == 0, answer


def look(plain: LabNode, kind: Kind) -> Counter[str]:
    """What became of those pools when nodes had joined."""
    closes = kind is not Kind.ROUTE
    first = used(LATE, kind, 0)
    if closes:
        eventually(lambda: any(sentence.startswith(first) for sentence in plain.ask("status")["collisions"]))
    sentences = plain.ask("status")["collisions"]
    found: Counter[str] = Counter()
    for number in range(COUNT):
        cidr, ip = pool(LATE, kind, number), used(LATE, kind, number)
        shown = plain.ask("ip", "show", ip)
        found["closed"] += bool(shown.get("used_by")) or (number == 0 and closes)
        found["open"] += shown["state"] == "free" or (number == 0 and not closes)
        found["told"] += any(sentence.startswith(f"the pool {cidr} ") for sentence in sentences)
    found["kept"] += plain.ask("ip", "show", first)["state"] == "assigned"
    return found
