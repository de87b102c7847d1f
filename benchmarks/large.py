"""``large``: what a pool of a million addresses costs a node, of which others have MANY assigned, or only FEW.

Two nodes, each with its own part of one etcd, take turns. Neither an ADD nor a start may take longer for what other
nodes hold; but ``moorage ip check`` looks at everything, so does an agent whose journal is lost, and every agent
keeps a picture of all addresses for its fabric.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

from benchmarks.client import AgentClient
from benchmarks.cni import PAUSE
from benchmarks.figures import Budget, Row, Sample
from benchmarks.idle import megabytes
from benchmarks.subjects import NETWORK, containers
from moorage.lab import Lab, LabNode

POOL = "10.64.0.0/12"
"""1,048,576 addresses."""

FEW, MANY = 1_000, 100_000
STARTS = 5
SETTLE = 2.0
"""Seconds after which a started agent has listed what it follows."""

LIMIT = Budget(1.2)
FOLLOWING = Budget(120.0, of_peer=False)
"""The fabric has every agent follow all addresses (ipam/cluster.py): memory grows with them, within this budget."""

LINEAR = Budget(float(MANY // FEW))


def rows(rounds: int) -> list[Row]:
    adds, starts = max(20, rounds // 4), min(STARTS, max(3, rounds // 10))
    found: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(nodes=0))
        switch, etcd = lab.switch, lab.etcd
        nodes = {}
        for host, count in enumerate((FEW, MANY), 1):
            url = f"{etcd.url}?prefix=/{count}"
            nodes[count] = stack.enter_context(LabNode(f"n{count}", store=url, switch=switch, host=host))
            _fill(nodes[count], count)
        for _ in range(starts):
            for count, node in nodes.items():
                shutil.rmtree(node.state_dir, ignore_errors=True)
                found["start, new", count].append(_timed(node.start))
                found["resident, new", count].append(_resident(node))
                node.stop()
        for node in nodes.values():
            node.start()
        mine = {count: stack.enter_context(containers(1 + adds)) for count in nodes}
        clients = {count: AgentClient(node) for count, node in nodes.items()}
        time.sleep(SETTLE)
        for number in range(1 + adds):
            for count, client in clients.items():
                found["add" if number else "first add", count].append(
                    client.call("ADD", mine[count][number]).ms
                )
                time.sleep(PAUSE)
        for _ in range(starts):
            for count, node in nodes.items():
                node.stop()
                found["start", count].append(_timed(node.start))
                found["resident", count].append(_resident(node))
                found["check", count].append(_timed(partial(node.cli, "ip", "check")))

    def row(what: str, name: str, unit: str, limit: Budget | None) -> Row:
        return Row(
            f"{what}, {MANY} assigned elsewhere (peer: {FEW})",
            unit,
            Sample(found[name, MANY]),
            Sample(found[name, FEW]),
            limit,
        )

    return [
        row("ADD that waits for etcd", "add", "ms", LIMIT),
        row("agent's start", "start", "s", LIMIT),
        row("  without a journal", "start, new", "s", LINEAR),
        row("agent, resident", "resident", "MB", FOLLOWING),
        row("  after a start without a journal", "resident, new", "MB", None),
        row("moorage ip check", "check", "s", LINEAR),
    ]


def _fill(node: LabNode, count: int) -> None:
    """A network on POOL that keeps nothing warm, and ``count`` addresses of it assigned on other nodes."""
    node.cli("network", "create", NETWORK, "--pool", POOL, "--warm", "0")
    (pool,) = node.ask("network", "show", NETWORK)["pools"]
    node.namespace.run(sys.executable, "-m", "benchmarks.filling", node.store, pool["name"], str(count))


def _timed(act: Callable[[], object]) -> float:
    begun = time.monotonic()
    act()
    return time.monotonic() - begun


def _resident(node: LabNode) -> float:
    time.sleep(SETTLE)
    return megabytes(node.pid)
