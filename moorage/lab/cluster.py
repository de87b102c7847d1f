"""A cluster of the lab: nodes on one underlay, each with its own agent, and the etcd they share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from moorage.lab.etcd import EtcdCluster, Member
from moorage.lab.node import LabNode
from moorage.lab.switch import Switch


class Lab:
    """``nodes`` nodes and ``etcd`` members on one switch; nodes are called n1, n2, ... A context manager.

        with Lab(nodes=3, etcd=3) as lab:
            lab.start()
            lab.partition(lab.nodes[0], *lab.etcd.members)

    Agents are started by ``start``, or one by one by their nodes. etcd_flags: more of etcd's command line.
    """

    def __init__(self, nodes: int, etcd: int = 1, etcd_flags: Sequence[str] = ()) -> None:
        self._node_count = nodes
        self._member_count = etcd
        self._etcd_flags = etcd_flags
        self._resources = contextlib.ExitStack()
        self.nodes: list[LabNode] = []

    def __enter__(self) -> Lab:
        with contextlib.ExitStack() as stack:
            self.switch = stack.enter_context(Switch())
            self.etcd = stack.enter_context(EtcdCluster(self.switch, self._member_count, self._etcd_flags))
            for number in range(1, self._node_count + 1):
                node = LabNode(f"n{number}", store=self.etcd.url, switch=self.switch, host=number)
                self.nodes.append(stack.enter_context(node))
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def start(self) -> None:
        """Start every agent; returns when all serve."""
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_ready()

    def partition(self, one: LabNode | Member, *others: LabNode | Member) -> None:
        """Cut ``one`` off from ``others``, silently, in both directions."""
        for other in others:
            self.switch.cut(one.namespace, other.namespace)

    def heal(self) -> None:
        """Undo every partition."""
        self.switch.heal()
