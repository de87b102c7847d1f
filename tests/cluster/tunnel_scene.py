"""Two nodes with containers that somebody wants to reach through the tunnel, and what he writes into it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from isolator.fabric.plan import VXLAN_PORT
from moorage.lab import Lab, LabNode, Namespace
from moorage.lab.switch import UPLINK
from tests.cluster.attacking import Hears, Listener, Shot, Wire, stranger, udp_socket
from tests.cluster.peers import PORT, Join, Peer, create_networks, peers
from tests.cluster.tunnel import add_second_address, device_addresses, tunnelled, underlay

USUAL = ("vx friend", "vx other node", "service node")
"""What nodes themselves send, of ``inner``."""


@dataclass
class Scene:
    """Two nodes. near, far: the blue container of n1 and of n2, by network. join: makes more.

    family: of the underlay; ports: of each node's tunnel.
    own: the addresses that a node has beside its underlay's, by node, then family: of its VXLAN device and of another
    interface. services: UDP ones of nodes. wires: at the underlay. outsider: a machine there that is no node.
    backup: of the store, for who restores it.
    """

    lab: Lab
    family: int
    ports: dict[str, int]
    near: dict[str, Peer]
    far: dict[str, Peer]
    join: Join
    own: dict[str, dict[int, list[str]]]
    services: dict[str, Listener]
    wires: dict[str, Wire]
    outsider: Namespace
    backup: Path | None = None

    @property
    def ears(self) -> list[Hears]:
        return [peer.ear for peer in (*self.near.values(), *self.far.values())] + list(self.services.values())

    @property
    def pairs(self) -> list[tuple[LabNode, LabNode]]:
        """Sender and receiver, both ways."""
        one, other = self.lab.nodes
        return [(one, other), (other, one)]


@contextlib.contextmanager
def scene_of(
    lab: Lab,
    family: int = 4,
    ports: Sequence[int] = (VXLAN_PORT, VXLAN_PORT),
    *,
    networks: bool = True,
) -> Iterator[Scene]:
    """The scene in a lab of two nodes whose agents run. networks: whether they are yet to be made."""
    with contextlib.ExitStack() as stack:
        n1, n2 = lab.nodes
        if networks:
            create_networks(n1)
        outsider = stack.enter_context(stranger(lab))
        join = stack.enter_context(peers(lab))
        near = {name: join(n1, name, "blue") for name in ("vx", "hg")}
        far = {name: join(n2, name, "blue") for name in ("vx", "hg")}
        own = {}
        for node in lab.nodes:
            others = [n.namespace for n in lab.nodes if n is not node] + [outsider]
            first, second = device_addresses(node), add_second_address(node, others)
            own[node.name] = {family: [first[family], second[family]] for family in (4, 6)}
        services = {node.name: Listener(node.namespace, PORT) for node in lab.nodes}
        machines = {node.name: node.namespace for node in lab.nodes} | {"outsider": outsider}
        wires = {name: Wire(namespace, UPLINK) for name, namespace in machines.items()}
        for each in (*wires.values(), *services.values()):
            stack.callback(each.close)
        of_node = dict(zip(("n1", "n2"), ports, strict=True))
        yield Scene(lab, family, of_node, near, far, join, own, services, wires, outsider)


def inner(scene: Scene, sender: LabNode, receiver: LabNode, family: int) -> dict[str, tuple[str, str]]:
    """What an attacker writes into the tunnel of a node as if from another: by a name, source and target."""
    here, there = (scene.far, scene.near) if receiver.name == "n2" else (scene.near, scene.far)
    cases = {
        f"{name} {kind}": (source, here[name].ips[family])
        for name in here
        for kind, source in (
            ("friend", there[name].ips[family]),
            ("other node", scene.own[sender.name][family][0]),
            ("other node's underlay", underlay(sender.host, family)),
        )
    }
    cases["service friend"] = (there["vx"].ips[family], underlay(receiver.host, family))
    cases["service node"] = (scene.own[sender.name][family][0], scene.own[receiver.name][family][0])
    return cases


def payloads(
    scene: Scene,
    sender: LabNode,
    receiver: LabNode,
    family: int,
    prefix: str = "",
    only: tuple[str, ...] = ("",),
) -> list[tuple[str, bytes]]:
    """Label and UDP payload of everything of ``inner``. only: of names that end so."""
    return [
        (
            label := f"{prefix}{receiver.name} {name}",
            tunnelled(sender.name, receiver.name, source, target, label),
        )
        for name, (source, target) in inner(scene, sender, receiver, family).items()
        if name.endswith(only)
    ]


def by_socket(source: Namespace, target: str, port: int) -> Callable[[bytes], object]:
    """Sends by an ordinary socket."""
    sock = udp_socket(source, 6 if ":" in target else 4)
    return lambda payload: sock.sendto(payload, (target, port))


def shots(send: Callable[[bytes], object], what: list[tuple[str, bytes]]) -> list[Shot]:
    return [Shot(label, lambda payload=payload: send(payload)) for label, payload in what]


def to_tunnels(
    scene: Scene, source: Namespace, targets: Callable[[LabNode], Sequence[str]], family: int
) -> list[Shot]:
    """Everything, from an ordinary socket to each of these addresses of each node."""
    return [
        shot
        for sender, receiver in scene.pairs
        for target in targets(receiver)
        for shot in shots(
            by_socket(source, target, scene.ports[receiver.name]),
            payloads(scene, sender, receiver, family, f"{target} "),
        )
    ]


def truths(scene: Scene, family: int) -> list[Shot]:
    """The same, written by nodes to each other."""
    return [
        shot
        for sender, receiver in scene.pairs
        for shot in shots(
            by_socket(sender.namespace, underlay(receiver.host, scene.family), scene.ports[receiver.name]),
            payloads(scene, sender, receiver, family, "truth ", USUAL),
        )
    ]
