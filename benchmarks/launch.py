"""Programs started in a namespace and timed, from their start to their exit.

This process steps into the namespace, starts the program there with posix_spawn(3) and steps back, so no
``nsenter`` is in the time, neither in ours nor in the peer's. stdin is a regular file and stdout a pipe, as
the Mesos agent has it. Only the main thread may use this.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isolator.netlink import Node


@dataclass(frozen=True, slots=True)
class Call:
    """A program to be started: its path, all of its environment, and the file that is its stdin."""

    program: Path
    environment: Mapping[str, str]
    stdin: Path


class CallFailed(Exception):
    """A program that is measured did not do what it should."""


class _Running:
    """A started program."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._stdout, stdout = os.pipe()
        try:
            self.pid = os.posix_spawn(
                call.program,
                [str(call.program)],
                call.environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, str(call.stdin), os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, stdout, 1),
                ],
            )
        except BaseException:
            os.close(self._stdout)
            raise
        finally:
            os.close(stdout)

    def wait(self) -> None:
        """Until it has ended; its answer is far smaller than a pipe."""
        self.status = os.waitpid(self.pid, 0)[1]

    def finish(self) -> bytes:
        """What it printed. Raises CallFailed unless it ended with 0."""
        printed = os.read(self._stdout, 65536)
        os.close(self._stdout)
        if self.status != 0:
            code = os.waitstatus_to_exitcode(self.status)
            command = self.call.environment.get("CNI_COMMAND", "")
            raise CallFailed(f"{self.call.program.name} {command} ended with {code}: {printed.decode()}")
        return printed

    def abort(self) -> None:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._stdout)


def run_in(namespace: Path, call: Call) -> float:
    """Run one program; the seconds it took. Raises CallFailed."""
    with Node() as home, home.open_namespace(str(namespace)) as place:
        with place.inside():
            begun = time.monotonic()
            running = _Running(call)
        try:
            running.wait()
            seconds = time.monotonic() - begun
        except BaseException:
            running.abort()
            raise
    running.finish()
    return seconds


def run_many_in(namespace: Path, calls: Sequence[Call], at_once: int) -> float:
    """Run programs, ``at_once`` at any moment; the seconds until the last has ended. Raises CallFailed."""
    waiting = list(reversed(calls))
    running: dict[int, _Running] = {}
    ended: list[_Running] = []
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(Node())
        place = stack.enter_context(home.open_namespace(str(namespace)))
        poll = stack.enter_context(select.epoll())
        stack.callback(_abort, running)
        begun = time.monotonic()
        while waiting or running:
            with place.inside():
                while waiting and len(running) < at_once:
                    program = _Running(waiting.pop())
                    descriptor = os.pidfd_open(program.pid)
                    running[descriptor] = program
                    poll.register(descriptor, select.EPOLLIN)
            for descriptor, _ in poll.poll():
                # Closing is not enough: a program started meanwhile may still hold the descriptor.
                poll.unregister(descriptor)
                running[descriptor].wait()
                ended.append(running.pop(descriptor))
                os.close(descriptor)
        seconds = time.monotonic() - begun
    failures = [failure for failure in map(_failure, ended) if failure is not None]
    if failures:
        raise CallFailed(f"{len(failures)} of {len(calls)} calls failed, the first: {failures[0]}")
    return seconds


def _failure(program: _Running) -> CallFailed | None:
    try:
        program.finish()
    except CallFailed as error:
        return error
    return None


def _abort(running: dict[int, _Running]) -> None:
    for descriptor, program in running.items():
        program.abort()
        os.close(descriptor)
