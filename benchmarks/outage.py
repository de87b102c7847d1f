"""``outage``: whether an ADD takes longer while etcd is slow or gone, as long as addresses are warm.

Three nodes with an etcd of one member: one reaches it straight, one through a proxy that makes a round trip
200 ms long, one is cut off from it. They take turns, so that what the machine does besides meets all. No
container is deleted meanwhile: what a DEL leaves to be written later would be in another node's time.
"""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Iterator

from benchmarks.cni import WARM_UPS, measure
from benchmarks.figures import Budget, Row, Sample
from benchmarks.launch import CallFailed
from benchmarks.subjects import IPV4, NETWORK, containers, subject_of, write_config
from isolator.netlink import Node
from moorage.lab import DelayingProxy, Lab, LabNode, Switch

ROUND_TRIP = 0.2
WARM = 256
AT_LEAST = 200
"""ADDs on each node; all of them, with the warm-ups, are fewer than are warm, so that none needs etcd."""

PROXY = 150
"""Host number on the underlay."""

STOCKED_WITHIN = 30.0
"""Seconds a node has to fetch what it keeps warm."""

LIMIT = Budget(1.2)
HEALTHY, SLOW, DOWN = "healthy", "slow", "down"


def rows(rounds: int) -> list[Row]:
    count = min(max(AT_LEAST, rounds), WARM - WARM_UPS)
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(nodes=0))
        switch, etcd = lab.switch, lab.etcd
        proxy = stack.enter_context(DelayingProxy(switch, PROXY, etcd.addresses[0]))
        urls = {HEALTHY: etcd.url, SLOW: f"etcd://{proxy.address}", DOWN: etcd.url}
        nodes = {
            name: stack.enter_context(_node(name, url, switch, host))
            for host, (name, url) in enumerate(urls.items(), 1)
        }
        nodes[HEALTHY].cli("network", "create", NETWORK, "--pool", IPV4, "--warm", str(WARM), "--preload")
        for node in nodes.values():
            _await_stock(node)
        mine = {name: stack.enter_context(containers(WARM_UPS + count)) for name in nodes}
        proxy.delay(ROUND_TRIP)
        lab.partition(nodes[DOWN], etcd.members[0])
        round_trip = _round_trip(nodes[SLOW], proxy.address)
        subjects = {name: subject_of(node) for name, node in nodes.items()}
        took = measure(subjects, mine, ("ADD",))
        problems = {name: node.ask("status")["problem"] for name, node in nodes.items()}
    if [name for name, problem in problems.items() if problem] != [DOWN]:
        raise CallFailed(f"etcd was to be out of reach of one node: {problems}")
    healthy = took[HEALTHY, "ADD"]
    return [
        Row("etcd through the slow link, one round trip", "ms", Sample([round_trip * 1e3])),
        Row(f"CNI ADD from warm, etcd slow (peer: {HEALTHY})", "ms", took[SLOW, "ADD"], healthy, LIMIT),
        Row(
            f"CNI ADD from warm, etcd out of reach (peer: {HEALTHY})", "ms", took[DOWN, "ADD"], healthy, LIMIT
        ),
    ]


@contextlib.contextmanager
def _node(name: str, url: str, switch: Switch, host: int) -> Iterator[LabNode]:
    with LabNode(name, store=url, switch=switch, host=host) as node:
        node.start()
        write_config(node)
        yield node


def _await_stock(node: LabNode) -> None:
    deadline = time.monotonic() + STOCKED_WITHIN
    while (warm := _warm(node)) < WARM:
        if time.monotonic() > deadline:
            raise CallFailed(f"{node.name} has {warm} addresses warm and not {WARM}")
        time.sleep(0.2)


def _warm(node: LabNode) -> int:
    return sum(row["count"] for row in node.ask("status")["addresses"] if row["state"] == "warm")


def _round_trip(node: LabNode, address: str) -> float:
    """Seconds that etcd takes for an answer, asked from a node over a connection that stands."""
    link = http.client.HTTPConnection(address, timeout=10)
    with Node() as home, home.open_namespace(str(node.namespace.path)) as place, place.inside():
        link.connect()
    with contextlib.closing(link):
        begun = time.monotonic()
        link.request("GET", "/health")
        link.getresponse().read()
        return time.monotonic() - begun
