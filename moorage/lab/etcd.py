"""An etcd cluster of the lab: real members in namespaces of their own, on the lab's underlay."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from moorage.lab.namespace import Namespace, unique
from moorage.lab.switch import Switch

FIRST_HOST = 201
"""Host number of the first member on the underlay; nodes have those from 1 on."""

READY_WITHIN = 30.0
"""Seconds a cluster has to elect its first leader."""


class Member:
    """One etcd process in a namespace. flags: more of etcd's command line."""

    def __init__(self, name: str, directory: Path, flags: Sequence[str] = ()) -> None:
        self.name = name
        self.namespace = Namespace(unique(name))
        self.directory = directory / name
        self.ip = ""
        self._flags = tuple(flags)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def client(self) -> str:
        return f"http://{self.ip}:2379"

    @property
    def peer(self) -> str:
        return f"http://{self.ip}:2380"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the member was not started"
        return self._process.pid

    def start(self, cluster: str) -> None:
        """Start it; ``cluster`` is etcd's --initial-cluster. Does not wait."""
        with (self.directory.with_suffix(".log")).open("ab") as log:
            self._process = self.namespace.start(
                "etcd",
                "--name", self.name,
                "--data-dir", str(self.directory),
                "--listen-client-urls", self.client,
                "--advertise-client-urls", self.client,
                "--listen-peer-urls", self.peer,
                "--initial-advertise-peer-urls", self.peer,
                "--initial-cluster", cluster,
                "--heartbeat-interval", "100",
                "--election-timeout", "1000",
                *self._flags,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )  # fmt: skip

    def kill(self) -> None:
        """kill -9, if it runs."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """It stands still, and its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def forget(self) -> None:
        """Throw away its data; it must not run."""
        shutil.rmtree(self.directory, ignore_errors=True)


class EtcdCluster:
    """``members`` real etcd members on a switch. A context manager; they run inside it."""

    def __init__(self, switch: Switch, members: int = 3, flags: Sequence[str] = ()) -> None:
        self._switch = switch
        self._size = members
        self._flags = flags
        self._resources = contextlib.ExitStack()
        self.members: list[Member] = []

    def __enter__(self) -> EtcdCluster:
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mrg-etcd-")))
            for number in range(self._size):
                member = Member(f"etcd{number}", self.directory, self._flags)
                stack.enter_context(member.namespace)
                stack.callback(member.kill)
                member.ip = self._switch.plug(member.namespace, FIRST_HOST + number)
                self.members.append(member)
            self.start()
            self.wait_ready()
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    @property
    def url(self) -> str:
        """The store's URL for agents on the switch."""
        return f"etcd://{','.join(self.addresses)}"

    @property
    def addresses(self) -> list[str]:
        """Where the members serve clients, ``ip:port``."""
        return [f"{member.ip}:2379" for member in self.members]

    @property
    def initial_cluster(self) -> str:
        return ",".join(f"{member.name}={member.peer}" for member in self.members)

    def start(self) -> None:
        """Start every member."""
        for member in self.members:
            member.start(self.initial_cluster)

    def wait_ready(self) -> None:
        """Until every member answers. Raises RuntimeError with a log."""
        deadline = time.monotonic() + READY_WITHIN
        while self.ctl("endpoint", "health", check=False).returncode:
            if time.monotonic() > deadline:
                log = self.members[0].directory.with_suffix(".log").read_text()
                raise RuntimeError(f"etcd does not answer:\n{log[-3000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """kill -9 of every member."""
        for member in self.members:
            member.kill()

    def ctl(
        self, *arguments: str, check: bool = True, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run etcdctl against all members, from the first one's namespace."""
        endpoints = ",".join(member.client for member in self.members)
        return self._etcdctl(
            "--endpoints", endpoints, "--command-timeout", "2s", *arguments, check=check, stdin=stdin
        )

    def _etcdctl(
        self, *arguments: str, check: bool = True, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.members[0].namespace.run(
            "env", "ETCDCTL_API=3", "etcdctl", *arguments, check=check, stdin=stdin
        )

    def revision(self) -> int:
        """The store's revision now."""
        status = json.loads(self.ctl("endpoint", "status", "-w", "json").stdout)
        return max(int(s["Status"]["header"]["revision"]) for s in status)

    def back_up(self) -> Path:
        """A snapshot of the store as it is now; the file."""
        file = self.directory / f"backup-{os.urandom(3).hex()}"
        self._etcdctl("--endpoints", self.members[0].client, "snapshot", "save", str(file))
        return file

    def restore(self, backup: Path) -> None:
        """All members lose their data and begin anew with a backup's, as after a disaster; returns when they serve."""
        self.kill()
        for member in self.members:
            member.forget()
            self._etcdctl(
                "snapshot", "restore", str(backup),
                "--name", member.name,
                "--data-dir", str(member.directory),
                "--initial-advertise-peer-urls", member.peer,
                "--initial-cluster", self.initial_cluster,
            )  # fmt: skip
        self.start()
        self.wait_ready()

    def leader(self) -> Member:
        """The member that leads now."""
        status = json.loads(self.ctl("endpoint", "status", "-w", "json").stdout)
        leading = next(
            s["Endpoint"] for s in status if s["Status"]["leader"] == s["Status"]["header"]["member_id"]
        )
        return next(member for member in self.members if member.client == leading)
