"""The agent, noting when it reaches each named step: ``python -m benchmarks.stepped FILE agent ...``.

FILE gets a line a step when the agent ends in order: the step and CLOCK_MONOTONIC in ns.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from isolator import steps
from moorage.cli import main


def command(file: Path) -> tuple[str, ...]:
    """The command line of such an agent, less the agent's options."""
    return (sys.executable, "-m", "benchmarks.stepped", str(file), "agent")


def read(file: Path) -> list[tuple[str, int]]:
    """What an agent that has ended wrote."""
    lines = (line.split() for line in file.read_text().splitlines())
    return [(step, int(at)) for step, at in lines]


if __name__ == "__main__":
    noted: list[tuple[str, int]] = []
    steps.observer = lambda step: noted.append((step, time.monotonic_ns()))
    written_to = Path(sys.argv.pop(1))
    try:
        main()
    finally:
        written_to.write_text("".join(f"{step} {at}\n" for step, at in noted))
