"""A container as an old Mesos agent has it: a process, and calls of moorage-netmodules in the order of that agent."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moorage.lab.container import PATH
from moorage.lab.namespace import Namespace, unique

PROGRAM = Path(sys.executable).parent / "moorage-netmodules"
"""The program as it is installed beside this interpreter."""

CALL_WITHIN = 90.0
"""Seconds for one call; the program itself gives up before."""


class ModulesContainer:
    """One container: id, uid, a namespace and, inside, its process. A context manager for the two last.

    id: made up unless given. network: of --network, None to leave it out.
    """

    def __init__(self, socket: Path, name: str = "module", *, network: str | None = None) -> None:
        self.id = str(uuid.uuid4())
        self.uid = str(uuid.uuid4())
        self.namespace = Namespace(unique(name))
        self._socket = socket
        self._network = network
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ModulesContainer:
        self.namespace.create()
        self._process = self.namespace.start("sleep", "infinity")
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.namespace.delete()

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process is not None, "the container is a context"
        return self._process.pid

    def end(self) -> None:
        """End its process, and with it what goes by its number."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def start_call(self, command: str, **args: Any) -> subprocess.Popen[str]:
        """Start the program; collect its answer with ``finish_call``."""
        document = {"command": command, "args": {"hostname": "lab", **args}}
        options = () if self._network is None else ("--network", self._network)
        process = subprocess.Popen(
            [str(PROGRAM), "--socket", str(self._socket), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": PATH},
        )
        assert process.stdin is not None, "it was asked for"
        process.stdin.write(json.dumps(document))
        process.stdin.close()
        process.stdin = None
        return process

    @staticmethod
    def finish_call(process: subprocess.Popen[str]) -> dict[str, Any]:
        """The answer of a started call."""
        stdout, _ = process.communicate(timeout=CALL_WITHIN)
        answer: dict[str, Any] = json.loads(stdout)
        return answer

    def call(self, command: str, **args: Any) -> dict[str, Any]:
        """Run the program and wait for its answer."""
        return self.finish_call(self.start_call(command, **args))

    def allocate(self, num_ipv4: int = 1, num_ipv6: int = 1, **args: Any) -> dict[str, Any]:
        """Addresses for its uid."""
        return self.call("allocate", num_ipv4=num_ipv4, num_ipv6=num_ipv6, uid=self.uid, **args)

    def isolate(self, ips: Sequence[str], netgroups: Sequence[str] = (), **args: Any) -> dict[str, Any]:
        """An interface with these addresses, for its process."""
        families = {
            "ipv4_addrs": [ip for ip in ips if ":" not in ip],
            "ipv6_addrs": [ip for ip in ips if ":" in ip],
        }
        given = {"container_id": self.id, "pid": self.pid, "netgroups": list(netgroups), **families}
        return self.call("isolate", **{**given, **args})

    def release(self) -> dict[str, Any]:
        """What its uid has is given up."""
        return self.call("release", uid=self.uid)

    def cleanup(self) -> dict[str, Any]:
        """The container is over."""
        return self.call("cleanup", container_id=self.id)
