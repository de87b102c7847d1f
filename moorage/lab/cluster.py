"""A cluster of the lab: nodes on one underlay, each with its own agent, and the etcd they share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from moorage.lab.etcd import EtcdCluster, Member, Tls
from moorage.lab.namespace import Namespace, unique
from moorage.lab.node import AGENT, LabNode
from moorage.lab.resource import Resource
from moorage.lab.switch import Switch

GATEWAY_HOST = 200
"""Host number of the gateway on the underlay; nodes have those below."""


def in_silence(_: str) -> None:
    """Progress that nobody follows."""


class Lab(Resource):
    """``nodes`` nodes and ``etcd`` members on one switch; nodes are called n1, n2, ..., members etcd0, etcd1, ...

        with Lab(nodes=3, etcd=3) as lab:
            lab.start()
            lab.partition(lab.nodes[0], *lab.etcd.members)

    Agents are started by ``start``, or one by one by their nodes. etcd_flags: more of etcd's command line.
    tls: clients reach etcd by it. agent: the command line that runs an agent. gateway: one more node, ``gw``, whose
    agent joins the fabric without containers. prefix: what namespaces' names begin with; directory: one that is
    there already, for everything in files; both are made up unless given. progress: is called with a word or two as
    each part is begun, ``parts`` times until all is started.
    """

    def __init__(
        self,
        nodes: int,
        etcd: int = 1,
        etcd_flags: Sequence[str] = (),
        *,
        tls: Tls | None = None,
        agent: Sequence[str] = AGENT,
        gateway: bool = False,
        prefix: str | None = None,
        directory: Path | None = None,
        progress: Callable[[str], None] = in_silence,
    ) -> None:
        prefix = prefix or unique("lab") + "-"
        self.directory = directory or Path(tempfile.gettempdir(), unique("l"))
        self._own_directory = directory is None
        self._progress = progress
        self.switch = Switch(Namespace(f"{prefix}switch"))
        self.etcd = EtcdCluster(
            self.switch, etcd, prefix=prefix, directory=self.directory / "etcd", flags=etcd_flags, tls=tls
        )

        self._prefix = prefix
        self._agent = tuple(agent)
        self.nodes = [self._node(f"n{number}", number) for number in range(1, nodes + 1)]
        self.gateway = self._node("gw", GATEWAY_HOST, "--gateway") if gateway else None

    def _node(self, name: str, host: int, *options: str) -> LabNode:
        return LabNode(
            name,
            agent=self._agent,
            options=options,
            store=self.etcd.url,
            switch=self.switch,
            host=host,
            namespace=Namespace(self._prefix + name),
            directory=self.directory / name,
        )

    def join(self) -> LabNode:
        """One more node, switched on; its agent is not started yet."""
        number = len(self.nodes) + 1
        node = self._node(f"n{number}", number)
        node.create()
        self.nodes.append(node)
        return node

    @property
    def everyone(self) -> list[LabNode]:
        """All that have an agent: the nodes, and the gateway if there is one."""
        return [*self.nodes, *([self.gateway] if self.gateway else [])]

    @property
    def parts(self) -> int:
        return 2 + 2 * len(self.everyone)

    def create(self) -> None:
        if self._own_directory:
            self.directory.mkdir(mode=0o700)
        self._progress("underlay")
        self.switch.create()
        self._progress("etcd")
        self.etcd.create()
        for node in self.everyone:
            self._progress(f"node {node.name}")
            node.create()

    def delete(self) -> None:
        for node in self.everyone:
            node.delete()
        self.etcd.delete()
        self.switch.delete()
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        """Start every agent; returns when all serve."""
        for node in self.everyone:
            node.launch()
        for node in self.everyone:
            self._progress(f"agent of {node.name}")
            node.wait_ready()

    def partition(self, one: LabNode | Member, *others: LabNode | Member) -> None:
        """Cut ``one`` off from ``others``, silently, in both directions."""
        for other in others:
            self.switch.cut(one.host, other.host)

    def heal(self) -> None:
        """Undo every partition."""
        self.switch.heal()
