"""An etcd cluster of the lab: real members in namespaces of their own, on the lab's underlay."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import moorage
from moorage.lab.errors import with_log
from moorage.lab.namespace import Namespace
from moorage.lab.process import Daemon
from moorage.lab.resource import Resource
from moorage.lab.switch import Switch, address

FIRST_HOST = 201
"""Host number of the first member on the underlay; nodes have those from 1 on."""

HIDDEN = "http://127.0.0.1:2379"
"""Where a member serves clients in its own namespace alone."""

BUMPING = """
import asyncio, sys
from ipam.store import Put, Txn, open_store

async def bump():
    store = await open_store("etcd://127.0.0.1:2379?prefix=/bumped")
    await store.get("bumped")  # waits until it answers
    for _ in range(int(sys.argv[1])):
        await store.txn(Txn(then=(Put("bumped", b""),)))
    await store.close()

asyncio.run(bump())
"""

READY_WITHIN = 60.0
"""Seconds a cluster has to elect its first leader."""


@dataclass(frozen=True, slots=True)
class Files:
    """Of one side of mutual TLS: whom it trusts, and who it is."""

    ca: Path
    cert: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Tls:
    """What clients and members have on their disks; members are clients of etcdctl's as well."""

    server: Files
    client: Files

    @property
    def flags(self) -> tuple[str, ...]:
        """Of etcd's command line."""
        server = self.server
        return (
            "--cert-file", str(server.cert), "--key-file", str(server.key),
            "--trusted-ca-file", str(server.ca), "--client-cert-auth",
        )  # fmt: skip

    @property
    def query(self) -> str:
        """Of the store's URL."""
        return urlencode({"ca": self.client.ca, "cert": self.client.cert, "key": self.client.key})


class Member(Resource):
    """One etcd process in a namespace on the switch. flags: more of etcd's command line."""

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        namespace: Namespace,
        switch: Switch,
        host: int,
        flags: Sequence[str] = (),
        tls: Tls | None = None,
    ) -> None:
        self.name = name
        self.namespace = namespace
        self.directory = directory / name
        self.host = host
        self.log = self.directory.with_suffix(".log")
        self.etcd = Daemon(self.directory.with_suffix(".pid"))
        self._switch = switch
        self._flags = (*flags, *(tls.flags if tls else ()))
        self._tls = tls

    def create(self) -> None:
        self.namespace.create()
        self._switch.plug(self.namespace, self.host)

    def delete(self) -> None:
        self.kill()
        self.namespace.delete()

    @property
    def ip(self) -> str:
        return address(self.host)

    @property
    def client(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.ip}:2379"

    @property
    def peer(self) -> str:
        return f"http://{self.ip}:2380"

    @property
    def is_running(self) -> bool:
        return self.etcd.is_running

    @property
    def environment(self) -> dict[str, str]:
        """Ours, with what makes ``etcdctl`` speak to this member."""
        ours = {**os.environ, "ETCDCTL_API": "3", "ETCDCTL_ENDPOINTS": self.client}
        if self._tls is not None:
            files = self._tls.server
            ours |= {
                "ETCDCTL_CACERT": str(files.ca),
                "ETCDCTL_CERT": str(files.cert),
                "ETCDCTL_KEY": str(files.key),
            }
        return ours

    def start(self, cluster: str, *, hidden: bool = False) -> None:
        """Start it; ``cluster`` is etcd's --initial-cluster. Does not wait. hidden: nobody outside reaches it."""
        client = HIDDEN if hidden else self.client
        self.etcd.start(
            self.namespace.command(
                "etcd",
                "--name", self.name,
                "--data-dir", str(self.directory),
                "--listen-client-urls", client,
                "--advertise-client-urls", client,
                "--listen-peer-urls", self.peer,
                "--initial-advertise-peer-urls", self.peer,
                "--initial-cluster", cluster,
                "--heartbeat-interval", "100",
                "--election-timeout", "1000",
                *self._flags,
            ),
            self.log,
        )  # fmt: skip

    def kill(self) -> None:
        """kill -9, if it runs."""
        self.etcd.kill()

    def pause(self) -> None:
        """It stands still, and its connections stay open."""
        self.etcd.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.etcd.signal(signal.SIGCONT)

    def forget(self) -> None:
        """Throw away its data; it must not run."""
        shutil.rmtree(self.directory, ignore_errors=True)


class EtcdCluster(Resource):
    """``size`` real etcd members on a switch. They run as soon as it is created.

    prefix: what their namespaces' names begin with. directory: made by it, for data, logs and backups. tls: clients
    reach them by mutual TLS; else in plain text, as they reach each other.
    """

    def __init__(
        self,
        switch: Switch,
        size: int,
        *,
        prefix: str,
        directory: Path,
        flags: Sequence[str] = (),
        tls: Tls | None = None,
    ) -> None:
        self.directory = directory
        self._tls = tls
        self.members = [
            Member(
                name,
                directory,
                namespace=Namespace(prefix + name),
                switch=switch,
                host=FIRST_HOST + number,
                flags=flags,
                tls=tls,
            )
            for number, name in enumerate(f"etcd{number}" for number in range(size))
        ]

    def create(self) -> None:
        self.directory.mkdir(mode=0o700)
        for member in self.members:
            member.create()
        self.start()
        self.wait_ready()

    def delete(self) -> None:
        for member in self.members:
            member.delete()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def url(self) -> str:
        """The store's URL for agents on the switch."""
        query = f"?{self._tls.query}" if self._tls else ""
        return f"etcd://{','.join(self.addresses)}{query}"

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
        """Until every member answers. Raises LabError."""
        deadline = time.monotonic() + READY_WITHIN
        while self.ctl("endpoint", "health", check=False).returncode:
            if time.monotonic() > deadline:
                raise with_log(
                    f"etcd does not answer within {READY_WITHIN:.0f} s of its start", self.members[0].log
                )
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
            "--endpoints", endpoints, "--command-timeout", "10s", *arguments, check=check, stdin=stdin
        )

    def _etcdctl(
        self, *arguments: str, check: bool = True, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        # What the command line names is not to stand in the environment as well.
        environment = {**self.members[0].environment}
        del environment["ETCDCTL_ENDPOINTS"]
        return self.members[0].namespace.run(
            "etcdctl", *arguments, check=check, stdin=stdin, environment=environment
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

    def restore(self, backup: Path, *, token: str = "etcd-cluster", bump: int = 0) -> None:
        """All members lose their data and begin anew with a backup's, as after a disaster; returns when they serve.

        token: one that is not etcd's own makes them another cluster's. bump: by how much the only member's revision is
        raised, and its history compacted, before anybody can connect: as `etcdutl snapshot restore --bump-revision N
        --mark-compacted` does, which etcd 3.4 does not have.
        """
        self.kill()
        for member in self.members:
            member.forget()
            self._etcdctl(
                "snapshot", "restore", str(backup),
                "--name", member.name,
                "--data-dir", str(member.directory),
                "--initial-advertise-peer-urls", member.peer,
                "--initial-cluster", self.initial_cluster,
                "--initial-cluster-token", token,
            )  # fmt: skip
        if bump:
            self._bump(bump)
        self.start()
        self.wait_ready()

    def _bump(self, by: int) -> None:
        (member,) = self.members
        member.start(self.initial_cluster, hidden=True)
        source = {**os.environ, "PYTHONPATH": str(Path(moorage.__file__).parent.parent)}
        member.namespace.run(sys.executable, "-c", BUMPING, str(by), environment=source)
        status = json.loads(self._etcdctl("--endpoints", HIDDEN, "endpoint", "status", "-w", "json").stdout)
        self._etcdctl("--endpoints", HIDDEN, "compact", str(status[0]["Status"]["header"]["revision"]))
        member.kill()

    def leader(self) -> Member:
        """The member that leads now."""
        status = json.loads(self.ctl("endpoint", "status", "-w", "json").stdout)
        leading = next(
            s["Endpoint"] for s in status if s["Status"]["leader"] == s["Status"]["header"]["member_id"]
        )
        return next(member for member in self.members if member.client == leading)
