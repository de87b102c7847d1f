"""``cni``: ADD and DEL, process start to exit, one call at a time, against the reference plugins."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.figures import Budget, Row, Sample
from benchmarks.launch import run_in
from benchmarks.subjects import IPV4, IPV6, Container, Subject, containers, our_node, reference, subject_of

WARM_UPS = 5
PAUSE = 0.03
"""Seconds after each call, so that what a call leaves to be done later is not in the next one's time."""

COMMANDS = ("ADD", "DEL")


def rows(rounds: int) -> list[Row]:
    with contextlib.ExitStack() as stack:
        subjects = {
            "ours": subject_of(stack.enter_context(our_node(IPV4))),
            "peer": stack.enter_context(reference()),
            "dual": subject_of(stack.enter_context(our_node(IPV4, IPV6))),
        }
        mine = {name: stack.enter_context(containers(WARM_UPS + rounds)) for name in subjects}
        ms = measure(subjects, mine)
    budgets = {"ADD": Budget(0.25), "DEL": Budget(0.2)}
    return [
        *(
            Row(f"CNI {c}, IPv4, process start to exit", "ms", ms["ours", c], ms["peer", c], budgets[c])
            for c in COMMANDS
        ),
        *(
            Row(f"CNI {c}, dual stack (peer: IPv4 only)", "ms", ms["dual", c], ms["peer", c])
            for c in COMMANDS
        ),
    ]


def measure(
    subjects: Mapping[str, Subject],
    mine: Mapping[str, Sequence[Container]],
    commands: Sequence[str] = COMMANDS,
) -> dict[tuple[str, str], Sample]:
    """(subject, command) -> ms. Round by round all take turns, and each round begins with another."""
    names = list(subjects)
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(len(mine[names[0]])):
        first = number % len(names)
        for command in commands:
            for name in names[first:] + names[:first]:
                call = subjects[name].call(command, mine[name][number])
                seconds[name, command].append(run_in(subjects[name].node, call))
                time.sleep(PAUSE)
    return {key: Sample([s * 1e3 for s in values[WARM_UPS:]]) for key, values in seconds.items()}
