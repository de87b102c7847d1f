"""A network namespace of the lab, and processes inside it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

NAMESPACES = Path("/run/netns")


def unique(what: str) -> str:
    """A name for a lab object that no other run on this machine has."""
    return f"mrg-{what}-{os.urandom(3).hex()}"


class Namespace:
    """A network namespace with its loopback up; a context manager that deletes it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = NAMESPACES / name

    def __enter__(self) -> Namespace:
        self.create()
        return self

    def __exit__(self, *_: object) -> None:
        self.delete()

    def create(self) -> None:
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self.run("ip", "link", "set", "lo", "up")

    def delete(self) -> None:
        """Delete it; no error if it is gone."""
        subprocess.run(["ip", "netns", "delete", self.name], check=False, stderr=subprocess.DEVNULL)

    def command(self, *command: str) -> list[str]:
        """The command line that runs ``command`` inside. Only the network namespace changes."""
        return ["nsenter", f"--net={self.path}", "--", *command]

    def run(
        self, *command: str, check: bool = True, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run it inside and wait. Raises CalledProcessError unless told not to check."""
        return subprocess.run(
            self.command(*command), text=True, check=check, capture_output=True, input=stdin
        )

    def start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start it inside and do not wait; the caller ends it."""
        return subprocess.Popen(self.command(*command), **options)

    def pings(self, ip: str, *, count: int = 1, wait: int = 2) -> bool:
        """Whether ``ip`` answers an echo request from here within ``wait`` seconds."""
        result = self.run("ping", "-n", "-q", "-c", str(count), "-W", str(wait), ip, check=False)
        return result.returncode == 0
