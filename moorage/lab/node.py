"""A node of the lab: a namespace with a real agent process in it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moorage.lab.container import Container
from moorage.lab.namespace import Namespace, unique
from moorage.lab.switch import Switch

MOORAGE = (sys.executable, "-m", "moorage")
ADDRESSES = ("198.18.0.1/32", "fd98::1/128")
"""What a node of its own, without an underlay, calls itself (benchmarking range, RFC 2544)."""

READY_WITHIN = 20.0
"""Seconds an agent has to serve."""


class LabNode:
    """See the module's docstring. A context manager; the agent is started by ``start``.

    name: the node's. agent: the command line that runs the agent, less its options. store: its URL; a
    SQLite file of the node's own without. switch, host: the underlay it is plugged into, and its number there.
    """

    def __init__(
        self,
        name: str = "node",
        *,
        agent: Sequence[str] = (*MOORAGE, "agent"),
        store: str = "",
        switch: Switch | None = None,
        host: int = 1,
    ) -> None:
        self.name = name
        self.namespace = Namespace(unique(name))
        self._agent_command = tuple(agent)
        self._store = store
        self._switch = switch
        self._host = host
        self._resources = contextlib.ExitStack()
        self._agent: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LabNode:
        with contextlib.ExitStack() as stack:
            # A short path: unix sockets have room for 107 bytes.
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mrg-")))
            stack.enter_context(self.namespace)
            if self._switch is not None:
                self._switch.plug(self.namespace, self._host)
            else:
                for address in ADDRESSES:
                    self.namespace.run("ip", "address", "add", address, "dev", "lo")
            stack.callback(self.kill)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "agent.sock"

    @property
    def store(self) -> str:
        return self._store or f"sqlite://{self.directory}/store.db"

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    @property
    def log(self) -> Path:
        return self.directory / "agent.log"

    @property
    def pid(self) -> int:
        """The agent's process id."""
        assert self._agent is not None, "the agent was not started"
        return self._agent.pid

    # -- the agent

    def launch(self, **environment: str) -> None:
        """Start the agent and do not wait for it."""
        with self.log.open("ab") as log:
            self._agent = self.namespace.start(
                *self._agent_command,
                "--node", self.name,
                "--store", self.store,
                "--state-dir", str(self.state_dir),
                "--socket", str(self.socket),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_without_moorage(os.environ), **environment},
            )  # fmt: skip

    def start(self, **environment: str) -> None:
        """Start the agent; returns when it serves. Raises RuntimeError with its log if it does not."""
        self.launch(**environment)
        self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while not self.answers():
            if not self.is_running or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the agent of {self.name} does not serve:\n{self.log.read_text()[-4000:]}"
                )
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether somebody listens on the agent's socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    @property
    def is_running(self) -> bool:
        return self._agent is not None and self._agent.poll() is None

    def kill(self) -> None:
        """kill -9, if it runs."""
        if self._agent is not None:
            if self._agent.poll() is None:
                self._agent.kill()
            self._agent.wait()

    def stop(self) -> int:
        """SIGTERM, and wait for the end in order; returns the exit code."""
        assert self._agent is not None, "the agent was not started"
        self._agent.send_signal(signal.SIGTERM)
        return self._agent.wait(timeout=60)

    # -- the command line

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``moorage ARGUMENTS`` against this node's store and agent."""
        return self.namespace.run(
            "env", *(f"--unset={name}" for name in os.environ if name.startswith("MOORAGE_")),
            *MOORAGE, "--store", self.store, "--socket", str(self.socket), *arguments,
            check=check,
        )  # fmt: skip

    def ask(self, *arguments: str) -> Any:
        """The JSON that ``moorage ARGUMENTS -o json`` prints. Raises CalledProcessError."""
        return json.loads(self.cli(*arguments, "-o", "json").stdout)

    def container(self, name: str = "container") -> Container:
        """A container that this node's agent serves; not yet created."""
        return Container(self.socket, name)


def _without_moorage(environment: os._Environ[str]) -> dict[str, str]:
    """The lab's agents and commands are told everything by flags."""
    return {name: value for name, value in environment.items() if not name.startswith("MOORAGE_")}
