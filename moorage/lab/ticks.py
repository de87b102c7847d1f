"""How the demos show what they do: a tick a step, and at the end nothing is left on this machine.

with step("two and two is four"):
    expect(2 + 2 == 4, "it is not")
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ipam.errors import MoorageError
from moorage.lab.container import Answer


class Failed(Exception):
    """A step did not show what it promises."""


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """A tick for a step that works, a cross and the reason for one that does not."""
    begun = time.monotonic()
    try:
        yield
    except Exception as error:
        print(f"  \033[31m✗\033[0m {text}\n    {error}", flush=True)
        raise
    print(f"  \033[32m✓\033[0m {text}  ({(time.monotonic() - begun) * 1000:.0f} ms)", flush=True)


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


def succeed(answer: Answer) -> Answer:
    expect(answer.exit == 0, f"the hook answered {answer.exit}: {answer.stdout or answer.stderr}")
    return answer


def show(title: str, text: str) -> None:
    print(f"\n{title}\n{text.rstrip()}\n", flush=True)


def eventually(holds: Callable[[], bool], otherwise: str, within: float = 10.0) -> None:
    deadline = time.monotonic() + within
    while not holds():
        expect(time.monotonic() < deadline, otherwise)
        time.sleep(0.05)


def perform(command: str, demo: Callable[[contextlib.ExitStack, list[Path]], None]) -> int:
    """Run a demo; 0 if every step of it holds, and nothing is left afterwards.

    command: how a user runs it. demo: what it makes it puts on the stack, and into the list the path of every
    file and namespace that has to be gone afterwards.
    """
    if os.geteuid() != 0:
        print(f"network namespaces need root: {command}", file=sys.stderr)
        return 1
    # An interrupt unwinds like an error, so that everything is cleaned up.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    before = _on_this_machine()
    made: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            demo(stack, made)
        with step("nothing is left on this machine"):
            _expect_nothing_left(before, made)
    except (Failed, subprocess.SubprocessError, MoorageError, OSError) as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    return 0


def _on_this_machine() -> set[str]:
    """Interfaces, routes and nft tables of ours where the demo itself runs."""
    found: set[str] = set()
    for command, marks in (
        (("ip", "-o", "link"), (": mrg", ": mfb")),
        (("ip", "route", "show", "table", "all", "proto", "157"), ("",)),
        (("ip", "-6", "route", "show", "table", "all", "proto", "157"), ("",)),
        (("nft", "list", "tables"), ("moorage", "mrg")),
    ):
        lines = subprocess.run(command, text=True, check=True, capture_output=True).stdout.splitlines()
        found |= {line for line in lines if any(mark in line for mark in marks)}
    return found


def _expect_nothing_left(before: set[str], made: Iterable[Path]) -> None:
    """before: what an agent beside us had there already. made: files and namespaces of this run."""
    left = sorted(_on_this_machine() - before) + [str(path) for path in made if path.exists()]
    expect(not left, f"left: {left}")
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    expect(not children, f"processes are left: {children}")
