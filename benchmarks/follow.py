"""``follow``: an agent that follows 1,000 nodes of 4 blocks each, and 100,000 addresses of theirs that change.

The agent and its kernel are real, and so is the etcd that it follows; the other nodes are records (crowd.py).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import crowd
from benchmarks.figures import Budget, Row, Sample
from benchmarks.idle import megabytes, processor_seconds
from isolator.fabric import VXLAN_DEVICE
from moorage.lab import Lab, LabNode

SETTLE = 5.0
"""Seconds after a start or a great change, for what follows it."""

CHANGES = 20
CHURN = 30.0
"""Seconds."""

ROUTES = crowd.NODES * crowd.BLOCKS_EACH


class Crowd:
    """The other nodes: commands to benchmarks.crowd, in the node's namespace."""

    def __init__(self, node: LabNode) -> None:
        self._process = node.namespace.start(
            sys.executable,
            "-m",
            "benchmarks.crowd",
            node.store,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def tell(self, *command: object) -> None:
        assert self._process.stdin is not None, "it was started with a pipe"
        self._process.stdin.write(f"{' '.join(map(str, command))}\n".encode())
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Of the last command. Raises RuntimeError."""
        assert self._process.stdout is not None, "it was started with a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the other nodes of the benchmark ended early; what they said is above")
        return json.loads(line)

    def ask(self, *command: object) -> Any:
        self.tell(*command)
        return self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def rows(rounds: int) -> list[Row]:
    starts = max(3, rounds // 25)
    with _crowd() as (node, others):
        scratch = [_from_scratch(node, others) for _ in range(starts)]
        time.sleep(SETTLE)
        small = megabytes(node.pid)
        idle = _share(node, SETTLE * 2)
        changes, spent = _one_change(node, others)
        others.ask("populate")
        time.sleep(SETTLE)
        populated = megabytes(node.pid)
        others.tell("churn", CHURN)
        busy = _share(node, CHURN)
        rate = others.answer()
        large = megabytes(node.pid)
        again = _from_scratch(node, others)
    who = f"{crowd.NODES} nodes x {crowd.BLOCKS_EACH} blocks"
    return [
        Row(
            f"{who}: agent's start to the last route",
            "s",
            Sample([s for s, _ in scratch]),
            budget=_at_most(2.0),
        ),
        Row("  the agent's processor time until then", "s", Sample([s for _, s in scratch])),
        Row(
            "  one block more or less, of its processor time",
            "ms",
            Sample([spent * 1e3]),
            budget=_at_most(20.0),
        ),
        *(
            Row(f"  a block is {how}: until the kernel has it", "ms", Sample([s * 1e3 for s in took]))
            for how, took in changes.items()
        ),
        Row("  agent, of one core at rest", "%", Sample([idle * 100])),
        Row("  resident", "MB", Sample([small]), budget=_at_most(120.0)),
        Row(
            f"  and {crowd.ADDRESSES} addresses, resident", "MB", Sample([populated]), budget=_at_most(120.0)
        ),
        Row(
            f"  and {rate:.0f} changes/s for {CHURN:g} s, of one core",
            "%",
            Sample([busy * 100]),
            budget=_at_most(5.0),
        ),
        Row("  a start with those addresses, to the last route", "s", Sample([again[0]])),
        Row("  the agent's processor time until then", "s", Sample([again[1]])),
        Row("  resident after 500 changes/s", "MB", Sample([large]), budget=_at_most(120.0)),
    ]


def _at_most(limit: float) -> Budget:
    return Budget(limit, of_peer=False)


@contextlib.contextmanager
def _crowd() -> Iterator[tuple[LabNode, Crowd]]:
    """A node whose agent does not run yet, and the others, settled."""
    with Lab(nodes=1, etcd=1) as lab:
        node = lab.nodes[0]
        node.cli("network", "create", crowd.NETWORK, "--pool", str(crowd.POOL), "--fabric", "vxlan")
        others = Crowd(node)
        try:
            others.ask("settle")
            yield node, others
        finally:
            others.end()


def _from_scratch(node: LabNode, others: Crowd) -> tuple[float, float]:
    """A start in a kernel that has nothing: seconds until it has all, and processor seconds that the agent took."""
    if node.is_running:
        node.stop()
        node.namespace.run("ip", "link", "delete", VXLAN_DEVICE)
    begun = time.monotonic()
    node.launch()
    others.ask("reached", ROUTES)
    took = time.monotonic() - begun
    node.wait_ready()
    return took, processor_seconds(node.pid)


def _one_change(node: LabNode, others: Crowd) -> tuple[dict[str, list[float]], float]:
    """What each change took until the kernel had it, and the processor seconds that one costs, rest included."""
    used = processor_seconds(node.pid)
    took = others.ask("blocks", CHANGES)
    return dict(took), (processor_seconds(node.pid) - used) / (2 * CHANGES)


def _share(node: LabNode, seconds: float) -> float:
    """Of one core, over so many seconds from now."""
    used, begun = processor_seconds(node.pid), time.monotonic()
    time.sleep(seconds)
    return (processor_seconds(node.pid) - used) / (time.monotonic() - begun)
