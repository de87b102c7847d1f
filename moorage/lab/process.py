"""Processes that may outlive whoever started them, and are found and ended by somebody else."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from isolator.identity import boot_id
from moorage.lab.errors import LabError

ENDS_WITHIN = 60.0
"""Seconds a killed process has to be gone: it may have to wait for a disk."""

_STATE, _STARTED = 0, 19
"""Fields of /proc/PID/stat, counted behind the command's name (proc(5) numbers them 3 and 22)."""


class ProcessId(msgspec.Struct, frozen=True):
    """One process of all times: a pid is used again, a pid with its start time and boot is not.

    started: clock ticks since boot.
    """

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has this pid now, if there is one."""
        fields = _stat(pid)
        return None if fields is None else cls(pid, int(fields[_STARTED]), boot_id())

    @property
    def is_running(self) -> bool:
        """A process that only waits to be collected by its parent does not run."""
        fields = _stat(self.pid)
        return (
            fields is not None
            and int(fields[_STARTED]) == self.started
            and fields[_STATE] not in ("Z", "X")
            and self.boot == boot_id()
        )


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


class Daemon:
    """A process in a session of its own, known by its pid file. Nobody needs to be its parent."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        """Start it and do not wait; what it prints is appended to ``log``."""
        with log.open("ab") as printed:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                env=environment,
                start_new_session=True,
            )
        self._file.write_bytes(msgspec.json.encode(ProcessId.of(self._child.pid)))

    @property
    def identity(self) -> ProcessId | None:
        """The process that was started last, whether or not it runs; None if none ever was."""
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=ProcessId)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        identity = self.identity
        assert identity is not None, f"{self._file.stem} was not started"
        return identity.pid

    @property
    def is_running(self) -> bool:
        identity = self.identity
        return identity is not None and identity.is_running

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens if it is gone."""
        with self._opened() as process:
            if process is not None:
                signal.pidfd_send_signal(process, number)

    def kill(self) -> None:
        """kill -9 if it runs; returns when it is gone."""
        with self._opened() as process:
            if process is not None:
                end([process])
        if self._child is not None:
            self._child.wait()

    def wait(self, timeout: float) -> int:
        """The exit code of a process that was started here. Raises TimeoutExpired."""
        assert self._child is not None, "only its parent learns a process's exit code"
        return self._child.wait(timeout)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        """A descriptor that can only mean this very process; None if it is gone."""
        identity = self.identity
        if identity is None:
            yield None
            return
        with opened([identity.pid]) as held:
            # Looked at once it is held: the pid cannot pass to another process any more.
            yield held.get(identity.pid) if identity.is_running else None


@contextlib.contextmanager
def opened(pids: Iterable[int]) -> Iterator[dict[int, int]]:
    """pid -> a descriptor of the process, for those that there are."""
    with contextlib.ExitStack() as stack:
        held = {}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                held[pid] = os.pidfd_open(pid)
                stack.callback(os.close, held[pid])
        yield held


def end(processes: Collection[int]) -> None:
    """kill -9 by descriptor; returns when all are gone. Raises LabError if one stays."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    deadline = time.monotonic() + ENDS_WITHIN
    for process in processes:
        if not select.select([process], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise LabError(f"a process is still there {ENDS_WITHIN:.0f} s after kill -9; try again later")
