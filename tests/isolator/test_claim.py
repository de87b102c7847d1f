"""Who claims a network namespace: one agent at a time, by what only root can take and nobody can take away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.claim import TABLE, Claim
from isolator.errors import AgentBusy, KernelRefused
from tests.isolator.rooms import Room

pytestmark = pytest.mark.kernel

HOLD = "from isolator.claim import Claim; held = Claim(); print(flush=True); input()"
SOURCE = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": os.environ["PATH"]}


@pytest.fixture
def other(container: Room) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has claimed the namespace."""
    command = ("ip", "netns", "exec", container.name, sys.executable, "-c", HOLD)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=SOURCE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process
        process.kill()


def test_a_second_agent_is_refused_and_told_the_pid_of_the_first(
    container: Room, other: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(AgentBusy, match=rf"another moorage agent .*\(pid {other.pid}\)"):
        container.do(Claim)


def test_an_agent_that_was_killed_holds_nothing(container: Room, other: subprocess.Popen[bytes]) -> None:
    other.kill()
    other.wait()
    container.do(Claim).close()
    container.do(Claim).close()


def test_nobody_takes_it_away(container: Room, other: subprocess.Popen[bytes]) -> None:
    container.sh(f"nft flush ruleset; ! nft delete table inet {TABLE}")
    with pytest.raises(AgentBusy):
        container.do(Claim)


def test_a_table_of_that_name_that_nobody_holds_is_named_with_the_command_that_helps(container: Room) -> None:
    container.sh(f"nft add table inet {TABLE}")
    with pytest.raises(AgentBusy, match=f"nft delete table inet {TABLE}$"):
        container.do(Claim)
    container.sh(f"nft delete table inet {TABLE}")
    container.do(Claim).close()


def test_a_process_without_the_capability_cannot_claim(container: Room) -> None:
    def tried() -> str:
        pid = os.fork()
        if pid:
            return str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        try:
            os.setuid(65534)
            Claim()
        except KernelRefused as error:
            os._exit(17 if "CAP_NET_ADMIN" in str(error) else 18)
        finally:
            os._exit(1)

    assert container.do(tried) == "17"
