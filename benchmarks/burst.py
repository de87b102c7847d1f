"""``burst``: 200 ADDs, 16 at a time and all at once; containers per second, against the reference plugins."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict

from benchmarks.figures import Budget, Row, Sample
from benchmarks.launch import run_many_in
from benchmarks.subjects import IPV4, Subject, containers, our_node, reference, subject_of

COUNT = 200
AT_ONCE = (16, COUNT)
DEL_AT_ONCE = 16
SETTLE = 1.0
"""Seconds after the DELs, for interfaces to be removed."""


def rows(rounds: int) -> list[Row]:
    repeats = max(3, rounds // 25)
    rates: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        subjects = {
            "ours": subject_of(stack.enter_context(our_node(IPV4))),
            "peer": stack.enter_context(reference()),
        }
        for number in range(1 + repeats):
            for at_once in AT_ONCE:
                for name, subject in subjects.items():
                    rate = _burst(subject, at_once)
                    if number:
                        rates[name, at_once].append(rate)
    return [
        Row(
            f"burst of {COUNT} ADDs, {at_once} at a time",
            "per s",
            Sample(rates["ours", at_once]),
            Sample(rates["peer", at_once]),
            Budget(5.0, at_least=True),
        )
        for at_once in AT_ONCE
    ]


def _burst(subject: Subject, at_once: int) -> float:
    """Containers per second; all are deleted again."""
    with containers(COUNT) as everyone:
        seconds = run_many_in(subject.node, [subject.call("ADD", c) for c in everyone], at_once)
        run_many_in(subject.node, [subject.call("DEL", c) for c in everyone], DEL_AT_ONCE)
        time.sleep(SETTLE)
    return COUNT / seconds
