"""``scale``: whether an ADD takes longer on a node with 1,000 endpoints than on one with 10.

Two nodes take turns, so that what the machine does besides meets both. What 1,000 interfaces cost the
kernel as a whole meets both, too; so the small node is also measured before the other is filled.
"""

from __future__ import annotations

import contextlib
import time

from benchmarks.client import AgentClient
from benchmarks.cni import PAUSE, WARM_UPS, measure
from benchmarks.figures import Budget, Row, Sample
from benchmarks.idle import megabytes
from benchmarks.subjects import IPV4, containers, our_node, subject_of

FEW, MANY = 10, 1000
LIMIT = Budget(1.2)
AFTER_DEL = 0.1
"""Seconds; removing an interface holds a lock of the whole kernel, which the other node's ADD would wait for."""


def rows(rounds: int) -> list[Row]:
    with contextlib.ExitStack() as stack:
        nodes = {name: stack.enter_context(our_node(IPV4)) for name in ("few", "many")}
        subjects = {name: subject_of(node) for name, node in nodes.items()}
        clients = {name: AgentClient(node) for name, node in nodes.items()}
        for container in stack.enter_context(containers(FEW)):
            clients["few"].call("ADD", container)
        with containers(WARM_UPS + rounds) as alone:
            before = measure({"few": subjects["few"]}, {"few": alone})
        for container in stack.enter_context(containers(MANY)):
            clients["many"].call("ADD", container)
        mine = {name: stack.enter_context(containers(WARM_UPS + rounds)) for name in nodes}
        whole = measure(subjects, mine)
        share: dict[str, list[float]] = {name: [] for name in nodes}
        for number in range(rounds):
            for name, client in clients.items():
                share[name].append(client.call("ADD", mine[name][number]).ms)
                time.sleep(PAUSE)
                client.call("DEL", mine[name][number])
                time.sleep(AFTER_DEL)
        resident = megabytes(nodes["many"].pid)
    small = whole["few", "ADD"]
    return [
        Row(f"CNI ADD with {MANY} endpoints live (peer: {FEW})", "ms", whole["many", "ADD"], small, LIMIT),
        Row("  and before there were others (peer)", "ms", whole["many", "ADD"], before["few", "ADD"]),
        Row(
            f"ADD, agent's share, {MANY} endpoints live (peer: {FEW})",
            "ms",
            Sample(share["many"]),
            Sample(share["few"]),
            LIMIT,
        ),
        Row(f"agent with {MANY} endpoints, resident", "MB", Sample([resident])),
    ]
