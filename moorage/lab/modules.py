"""An old Mesos agent's network isolator module, as far as a node's agent sees of it: moorage-netmodules is executed with
one JSON document on stdin, and its exit code means nothing (facts of the protocol: docs/facts/mesos.md).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HOOK = Path(sys.executable).parent / "moorage-netmodules"
"""The program as it is installed beside this interpreter."""

HOSTNAME = "agent.example"


class Module:
    """Calls for the agent at ``socket``. network: for --network, "" for none."""

    def __init__(self, socket: Path, network: str = "") -> None:
        self._command = [str(HOOK), "--socket", str(socket), *(["--network", network] if network else [])]

    def start_call(self, command: str, **arguments: Any) -> subprocess.Popen[bytes]:
        """Start the program; collect its answer with ``finish_call``."""
        document = json.dumps({"command": command, "args": {"hostname": HOSTNAME, **arguments}}).encode()
        return self.start_raw(document)

    def start_raw(self, stdin: bytes) -> subprocess.Popen[bytes]:
        """The same with whatever bytes."""
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdin is not None, "it was started with a pipe"
        try:
            process.stdin.write(stdin)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it does not read what is too long to the end
        process.stdin = None
        return process

    @staticmethod
    def finish_call(process: subprocess.Popen[bytes], timeout: float = 90.0) -> dict[str, Any]:
        """The document that it answered. Raises ValueError for anything else, as the module would fail then."""
        stdout, stderr = process.communicate(timeout=timeout)
        try:
            return dict(json.loads(stdout))
        except ValueError as error:
            raise ValueError(f"no JSON object: {stdout[:300]!r}; stderr: {stderr[-300:]!r}") from error

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Run the program and wait for its answer."""
        return self.finish_call(self.start_call(command, **arguments))
