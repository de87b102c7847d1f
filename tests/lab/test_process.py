"""Processes that are known by their pid files, whoever started them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from moorage.lab.process import Daemon, ProcessId
from tests.patience import PATIENCE


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """One that sleeps."""
    daemon = Daemon(tmp_path / "pid")
    daemon.start(["sleep", "600"], tmp_path / "log")
    yield daemon
    daemon.kill()


def another(tmp_path: Path) -> Daemon:
    """What a later command knows of it."""
    return Daemon(tmp_path / "pid")


def test_a_later_command_finds_and_ends_it(daemon: Daemon, tmp_path: Path) -> None:
    assert another(tmp_path).is_running
    assert another(tmp_path).pid == daemon.pid
    another(tmp_path).kill()
    assert not daemon.is_running
    assert not another(tmp_path).is_running


def test_it_has_a_session_of_its_own_so_that_an_interrupt_at_the_terminal_spares_it(daemon: Daemon) -> None:
    assert os.getsid(daemon.pid) == daemon.pid


def test_one_that_ended_but_was_not_collected_by_its_parent_does_not_run(
    daemon: Daemon, tmp_path: Path
) -> None:
    another(tmp_path).kill()
    assert Path(f"/proc/{daemon.pid}").exists()
    assert not another(tmp_path).is_running


@pytest.mark.parametrize("changed", [{"started": 1}, {"boot": "an earlier one"}], ids=str)
def test_a_process_that_has_its_pid_by_now_is_spared(tmp_path: Path, changed: dict[str, object]) -> None:
    with subprocess.Popen(["sleep", "600"]) as stranger:
        try:
            real = ProcessId.of(stranger.pid)
            assert real is not None
            (tmp_path / "pid").write_bytes(msgspec.json.encode(msgspec.structs.replace(real, **changed)))
            assert not another(tmp_path).is_running
            another(tmp_path).kill()
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_one_that_was_never_started_or_whose_pid_file_is_damaged_does_not_run(tmp_path: Path) -> None:
    assert not another(tmp_path).is_running
    another(tmp_path).kill()
    (tmp_path / "pid").write_text('{"pid": "x"')
    assert not another(tmp_path).is_running
    another(tmp_path).kill()


def test_what_it_prints_is_in_its_log(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "pid")
    for word in ("one", "two"):
        daemon.start(["echo", word], tmp_path / "log")
        assert daemon.wait(PATIENCE) == 0
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
