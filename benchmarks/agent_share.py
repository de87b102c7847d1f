"""``agent-share``: what of an ADD and a DEL is the agent's, and in which of its steps the time goes."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks import stepped
from benchmarks.client import AgentClient, Span
from benchmarks.cni import COMMANDS, PAUSE, WARM_UPS
from benchmarks.figures import Budget, Row, Sample
from benchmarks.subjects import IPV4, containers, our_node

AIM = Budget(3.0, of_peer=False)

STEPS = {
    "ADD": {
        "attach:begun": "receive, parse",
        "attach:lent": "look at the namespace, lend",
        "attach:journalled": "journal",
        "attach:admitted": "to the kernel thread, policy",
        "attach:wired": "wire",
        "attach:attached": "back from there, journal",
        "answered": "result, log, reply",
    },
    "DEL": {
        "detach:begun": "receive, parse",
        "detach:journalled": "tombstone, journal",
        "detach:withdrawn": "withdraw, policy",
        "answered": "log, reply",
    },
}
"""Command -> the step that ends a part -> what the part is."""


def rows(rounds: int) -> list[Row]:
    plain = _spans(rounds)
    with tempfile.TemporaryDirectory(prefix="mrg-") as directory:
        file = Path(directory) / "steps"
        parted = _spans(rounds, stepped.command(file))
        steps = stepped.read(file)
    found = []
    for command in COMMANDS:
        share = Sample([span.ms for span in plain[command]])
        found.append(Row(f"{command}, the agent's own share, IPv4", "ms", share, budget=AIM))
        for what, part in _parts(command, parted[command], steps).items():
            found.append(Row(f"  of it: {what}", "ms", part))
    return found


def _spans(rounds: int, agent: Sequence[str] = ()) -> dict[str, list[Span]]:
    with contextlib.ExitStack() as stack:
        node = stack.enter_context(our_node(IPV4, agent=agent))
        client = AgentClient(node)
        spans: defaultdict[str, list[Span]] = defaultdict(list)
        for container in stack.enter_context(containers(WARM_UPS + rounds)):
            for command in COMMANDS:
                spans[command].append(client.call(command, container))
                time.sleep(PAUSE)
        node.stop()
    return {command: values[WARM_UPS:] for command, values in spans.items()}


def _parts(command: str, spans: Sequence[Span], steps: Sequence[tuple[str, int]]) -> dict[str, Sample]:
    """What each part of a call took: a step belongs to the call in whose span it was reached."""
    parts: defaultdict[str, list[float]] = defaultdict(list)
    for span in spans:
        reached = [(step, at) for step, at in steps if span.sent <= at <= span.answered]
        marks = [("sent", span.sent), *reached, ("answered", span.answered)]
        for (_, before), (step, at) in pairwise(marks):
            if step in STEPS[command]:
                parts[STEPS[command][step]].append((at - before) / 1e6)
    return {what: Sample(parts[what]) for what in STEPS[command].values() if parts[what]}
