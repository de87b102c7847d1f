"""A container of a standing lab, the networks it has joined, and the command that runs in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

import msgspec

from moorage.lab.container import Answer, Container
from moorage.lab.errors import LabError
from moorage.lab.namespace import Namespace
from moorage.lab.node import LabNode
from moorage.lab.process import Daemon

RECORD = "task.json"


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a container is to be. Its interfaces are eth0, eth1, ... in the order of ``networks``; each has
    all ``labels``. command: none if somebody else runs it.
    """

    networks: tuple[str, ...]
    labels: dict[str, str]
    command: tuple[str, ...] = ()


class Record(Wanted, frozen=True, kw_only=True):
    """task.json. socket: where its node's agent is called. addresses: by network; none until it has them."""

    id: str
    node: str
    socket: str
    since: float
    addresses: dict[str, list[str]] = {}


class Task:
    """See the module's docstring. directory: its own; its last part is the container's name."""

    def __init__(self, record: Record, directory: Path, namespace: Namespace) -> None:
        self.record = record
        self.directory = directory
        self.namespace = namespace
        self.log = directory / "log"
        self._command = Daemon(directory / "pid")
        self._container = Container(Path(record.socket), id=record.id, namespace=namespace)

    @classmethod
    def find(cls, directory: Path, namespace: Namespace) -> Task | None:
        """The one that was started there; None if nothing of it is known."""
        try:
            record = msgspec.json.decode((directory / RECORD).read_bytes(), type=Record)
        except (OSError, msgspec.MsgspecError):
            return None
        return cls(record, directory, namespace)

    @classmethod
    def start(cls, directory: Path, namespace: Namespace, node: LabNode, wanted: Wanted) -> Task:
        """Make it on a node, as a Mesos agent does: a namespace, an ADD per network, then its command.

        Raises LabError with the node's sentence if it refuses. Nothing is left of it then, unless the node does not
        let go of it either: so it is listed, and can be removed later.
        """
        container = Container(node.socket)
        record = Record(
            **msgspec.structs.asdict(wanted),
            id=container.id,
            node=node.name,
            socket=str(node.socket),
            since=time.time(),
        )
        task = cls(record, directory, namespace)
        # Known before it is made: whoever comes after a kill finds it, and can remove it.
        task._write()
        try:
            namespace.create()
            task._join()
        except BaseException:
            with contextlib.suppress(LabError):
                task.remove()
            raise
        if wanted.command:
            task._command.start(namespace.command(*wanted.command), task.log, task.environment)
        return task

    def _join(self) -> None:
        addresses = {}
        for ifname, network in self._interfaces():
            answer = self._container.add(network, ifname, labels=self.record.labels)
            _succeed(answer, f"{self.name} cannot join {network} on {self.record.node}")
            addresses[network] = list(answer.ips.values())
        self.record = msgspec.structs.replace(self.record, addresses=addresses)
        self._write()

    def _interfaces(self) -> list[tuple[str, str]]:
        return [(f"eth{number}", network) for number, network in enumerate(self.record.networks)]

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def pid(self) -> int | None:
        """Of its command; None if that has ended, or there never was one."""
        return self._command.pid if self._command.is_running else None

    @property
    def environment(self) -> dict[str, str]:
        """Ours; a container is told nothing of agents."""
        return {name: value for name, value in os.environ.items() if not name.startswith("MOORAGE_")}

    def remove(self) -> None:
        """End what runs in it, have its node let go of it, and forget it.

        Raises LabError if the node does not let go; then it can be removed again.
        """
        self.namespace.end_processes()
        for ifname, network in self._interfaces():
            answer = self._container.delete(network, ifname, labels=self.record.labels)
            _succeed(answer, f"{self.name} cannot leave {network} on {self.record.node}")
        self.forget()

    def forget(self) -> None:
        """It is gone, and nobody tells its node: what is left when a machine dies."""
        self.namespace.end_processes()
        self.namespace.delete()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _write(self) -> None:
        (self.directory / RECORD).write_bytes(msgspec.json.encode(self.record))


def _succeed(answer: Answer, otherwise: str) -> None:
    if answer.exit != 0:
        reason = answer.json.get("msg") if answer.stdout.strip().startswith("{") else None
        raise LabError(f"{otherwise}: {reason or answer.stdout.strip() or answer.stderr.strip()}")
