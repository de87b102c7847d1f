"""Containers of a lab that attack and are attacked: in netgroups, on networks of every fabric, by either engine.

with peers(lab) as join:
    evil = join(lab.nodes[0], "vx", "red")
    victim = join(lab.nodes[1], "vx", "blue", engine="net-modules")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from moorage.lab import Lab, LabNode, Namespace
from moorage.lab.modules import ModulesContainer
from tests.cluster.attacking import Ear, Listener, Wire

NETWORKS = {
    "vx": ("10.64.0.0/16", "fd64::/64", ("--fabric", "vxlan")),
    "hg": ("10.65.0.0/16", "fd65::/64", ("--fabric", "hostgw")),
    "nn": ("10.66.0.0/16", "fd66::/64", ("--fabric", "vxlan", "--no-nat")),
    "op": ("10.67.0.0/16", "fd67::/64", ("--fabric", "vxlan", "--isolation", "open")),
}
"""Network -> its pools and what it is told: one of each fabric, one without NAT, an open one."""

FABRICS = {"vx": "vxlan", "hg": "hostgw", "nn": "vxlan, no NAT", "op": "vxlan, open"}


PORT = 7
"""UDP, on which every container listens."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A container. ips: by family. wire: into its interface; ear: at it."""

    node: LabNode
    network: str
    namespace: Namespace
    id: str
    ips: dict[int, str]
    wire: Wire
    ear: Ear


class Join(Protocol):
    def __call__(
        self, node: LabNode, network: str, *netgroups: str, engine: str = "cni", labels: dict[str, str] = ...
    ) -> Peer:
        """A container that is gone when the context ends. engine: cni or net-modules; labels: cni's only."""
        ...


def create_networks(node: LabNode, *names: str, **options: tuple[str, ...]) -> None:
    """Those named of NETWORKS, all without. options: more of a network's."""
    for name in names or NETWORKS:
        pool4, pool6, said = NETWORKS[name]
        node.cli(
            "network", "create", name, "--pool", pool4, "--pool", pool6, *said,
            "--allow-netgroup", "*", "--allow-public", "--allow-from", "nodes", *options.get(name, ()),
        )  # fmt: skip


@contextlib.contextmanager
def peers(lab: Lab) -> Iterator[Join]:
    """See Join."""
    with contextlib.ExitStack() as stack:

        def join(
            node: LabNode,
            network: str,
            *netgroups: str,
            engine: str = "cni",
            labels: dict[str, str] | None = None,
        ) -> Peer:
            start = {"cni": _by_cni, "net-modules": _by_modules}[engine]
            namespace, id, ips = start(stack, node, network, netgroups, labels or {})
            wire, ear = Wire(namespace), Ear(namespace)
            # Else it would answer with ICMP errors, which quote what they are about.
            listener = Listener(namespace, PORT)
            stack.callback(listener.close)
            stack.callback(wire.close)
            stack.callback(ear.close)
            return Peer(node, network, namespace, id, ips, wire, ear)

        yield join


def _by_cni(
    stack: contextlib.ExitStack,
    node: LabNode,
    network: str,
    netgroups: tuple[str, ...],
    labels: dict[str, str],
) -> tuple[Namespace, str, dict[int, str]]:
    container = stack.enter_context(node.container("peer"))
    told = {"moorage.netgroups": ",".join(netgroups)} if netgroups else {}
    answer = container.add(network, labels=told | labels)
    assert answer.exit == 0, answer
    stack.callback(container.delete, network)
    return container.namespace, container.id, answer.ips


def _by_modules(
    stack: contextlib.ExitStack,
    node: LabNode,
    network: str,
    netgroups: tuple[str, ...],
    labels: dict[str, str],
) -> tuple[Namespace, str, dict[int, str]]:
    assert not labels, "net-modules has none that moorage looks at"
    container = stack.enter_context(ModulesContainer(node.socket, "peer", network=network))
    answer = container.allocate(1, 1, netgroups=list(netgroups))
    assert answer["error"] is None, answer
    ips = [*answer["ipv4"], *answer["ipv6"]]
    stack.callback(container.cleanup)
    isolated = container.isolate(ips, netgroups)
    assert isolated["error"] is None, isolated
    return container.namespace, container.id, {6 if ":" in ip else 4: ip for ip in ips}
