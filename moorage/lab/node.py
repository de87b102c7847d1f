"""A node of the lab: a namespace with a real agent process in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import moorage
from isolator.journal import Journal
from moorage.lab.container import Container
from moorage.lab.errors import with_log
from moorage.lab.namespace import Namespace, unique
from moorage.lab.process import Daemon
from moorage.lab.resource import Resource
from moorage.lab.switch import Switch, address

MOORAGE = (sys.executable, "-m", "moorage")
AGENT = (*MOORAGE, "agent")
ADDRESSES = ("198.18.0.1/32", "fd98::1/128")
"""What a node of its own, without an underlay, calls itself (benchmarking range, RFC 2544)."""

READY_WITHIN = 60.0
"""Seconds an agent has to serve."""

EARLIER_BOOT = "00000000-0000-0000-0000-000000000000"
"""What a machine that was switched off had as its boot id."""

STOPS_WITHIN = 60.0
"""Seconds an agent has to end in order: it finishes requests in flight."""


class LabNode(Resource):
    """See the module's docstring. Created it is switched on; the agent is started by ``start``.

    name: the node's. agent: the command line that runs the agent; options: more of the agent's. store: its URL;
    a SQLite file of the node's own without. switch, host: the underlay it is plugged into, and its number there.
    namespace, directory: what is its own; with names that nobody else has, unless given.
    """

    def __init__(
        self,
        name: str = "node",
        *,
        agent: Sequence[str] = AGENT,
        options: Sequence[str] = (),
        store: str = "",
        switch: Switch | None = None,
        host: int = 1,
        namespace: Namespace | None = None,
        directory: Path | None = None,
    ) -> None:
        self.name = name
        self.namespace = namespace or Namespace(unique(name))
        # A short path: unix sockets have room for 107 bytes.
        self.directory = directory or Path(tempfile.gettempdir(), unique("n"))
        self.host = host
        self.agent = Daemon(self.directory / "agent.pid")
        self._command = (*agent, *options)
        self._store = store
        self._switch = switch

    def create(self) -> None:
        self.directory.mkdir(mode=0o700)
        self.switch_on()

    def delete(self) -> None:
        self.agent.kill()
        self.namespace.delete()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- the machine

    def switch_on(self) -> None:
        """There is the machine's network, and nothing runs yet."""
        self.namespace.create()
        if self._switch is not None:
            self._switch.plug(self.namespace, self.host)
        else:
            for own in ADDRESSES:
                self.namespace.run("ip", "address", "add", own, "dev", "lo")

    def switch_off(self) -> None:
        """As if its power was cut: all that the kernel had of it is gone, what is in files stays."""
        self.namespace.end_processes()
        if self._switch is not None:
            self._switch.unplug(self.host)
        self.namespace.delete()
        self._boot_again()

    def _boot_again(self) -> None:
        """All that its journal knows is of another boot: the kernel under it has no other one to tell."""
        path = self.state_dir / "journal.db"
        if not path.exists():
            return
        with contextlib.closing(Journal(path, EARLIER_BOOT)) as journal:
            for endpoint in journal.load_endpoints():
                asked = replace(endpoint.asked, boot_id=EARLIER_BOOT)
                journal.save_endpoint(replace(endpoint, asked=asked))
            journal.own_boot()

    @property
    def is_on(self) -> bool:
        return self.namespace.exists

    @property
    def ip(self) -> str:
        """Its IPv4 address on the underlay."""
        return address(self.host)

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
        return self.agent.pid

    @property
    def environment(self) -> dict[str, str]:
        """Ours, with what makes ``moorage`` speak to this node instead of to an agent of this machine."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("MOORAGE_")}
        return {
            **others,
            "MOORAGE_STORE": self.store,
            "MOORAGE_SOCKET": str(self.socket),
            "MOORAGE_CONFIG": os.devnull,
        }

    # -- the agent

    def launch(self, **environment: str) -> None:
        """Start the agent and do not wait for it."""
        self.agent.start(
            self.namespace.command(
                *self._command,
                "--node", self.name,
                "--store", self.store,
                "--state-dir", str(self.state_dir),
                "--socket", str(self.socket),
            ),
            self.log,
            {**with_source(self.environment), **environment},
        )  # fmt: skip

    def start(self, **environment: str) -> None:
        """Start the agent; returns when it serves. Raises LabError with its log if it does not."""
        self.launch(**environment)
        self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while not self.answers():
            if not self.is_running or time.monotonic() > deadline:
                raise with_log(f"the agent of {self.name} does not serve", self.log)
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether somebody listens on the agent's socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    @property
    def is_running(self) -> bool:
        """Whether the agent does."""
        return self.agent.is_running

    def kill(self) -> None:
        """kill -9 of the agent, if it runs."""
        self.agent.kill()

    def stop(self) -> int:
        """SIGTERM, and wait for the end in order; returns the exit code."""
        self.agent.signal(signal.SIGTERM)
        return self.agent.wait(STOPS_WITHIN)

    # -- the command line

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``moorage ARGUMENTS`` against this node's store and agent."""
        return self.namespace.run(
            *MOORAGE, *arguments, check=check, environment=with_source(self.environment)
        )

    def ask(self, *arguments: str, check: bool = True) -> Any:
        """The JSON that ``moorage ARGUMENTS -o json`` prints. Raises CalledProcessError unless told not to check."""
        return json.loads(self.cli(*arguments, "-o", "json", check=check).stdout)

    def container(self, name: str = "container") -> Container:
        """A container that this node's agent serves; not yet created."""
        return Container(self.socket, name)


def with_source(environment: dict[str, str]) -> dict[str, str]:
    """Have Python find the moorage that runs here, wherever one stands."""
    return {**environment, "PYTHONPATH": str(Path(moorage.__file__).parent.parent), "PYTHONSAFEPATH": "1"}
