"""A network namespace of the lab, and processes inside it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moorage.lab import process
from moorage.lab.errors import LabError
from moorage.lab.resource import Resource

NAMESPACES = Path("/run/netns")


def unique(what: str) -> str:
    """A name for a lab object that no other run on this machine has."""
    return f"mrg-{what}-{os.urandom(3).hex()}"


class Namespace(Resource):
    """A network namespace with its loopback up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = NAMESPACES / name

    def create(self) -> None:
        subprocess.run(["ip", "netns", "add", self.name], check=True, capture_output=True, text=True)
        self.run("ip", "link", "set", "lo", "up")

    def delete(self) -> None:
        """Delete it; no error if it is gone. Processes inside are for the caller, or ``end_processes``."""
        subprocess.run(["ip", "netns", "delete", self.name], check=False, stderr=subprocess.DEVNULL)

    @property
    def exists(self) -> bool:
        return self.path.exists()

    def processes(self) -> list[int]:
        """Pids of everything that runs inside."""
        here = _identity(self.path)
        numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in numbers if here and _identity(Path(f"/proc/{pid}/ns/net")) == here]

    def end_processes(self) -> None:
        """kill -9 of everything that runs inside; returns when it is gone. Raises LabError if it cannot be ended."""
        self.refuse_inside()
        while pids := self.processes():
            with process.opened(pids) as held:
                # Looked at again once they are held: a pid of the list may be another's by now.
                process.end([held[pid] for pid in self.processes() if pid in held])

    def refuse_inside(self) -> None:
        """Raises LabError to whoever runs inside: it would end itself, with half of its work done."""
        if self.exists and _identity(self.path) == _identity(Path("/proc/self/ns/net")):
            raise LabError(f"this command runs inside {self.name} itself; run it outside of the lab")

    def command(self, *command: str) -> list[str]:
        """The command line that runs ``command`` inside. Only the network namespace changes."""
        return ["nsenter", f"--net={self.path}", "--", *command]

    def run(
        self,
        *command: str,
        check: bool = True,
        stdin: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run it inside and wait. Raises CalledProcessError unless told not to check."""
        return subprocess.run(
            self.command(*command), text=True, check=check, capture_output=True, input=stdin, env=environment
        )

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start it inside and do not wait; the caller ends it."""
        return subprocess.Popen(self.command(*command), **options)

    def pings(self, ip: str, *, count: int = 1, wait: int = 10) -> bool:
        """Whether ``ip`` answers an echo request from here within ``wait`` seconds."""
        result = self.run("ping", "-n", "-q", "-c", str(count), "-W", str(wait), ip, check=False)
        return result.returncode == 0


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells namespaces apart; None if there is none (any more)."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
