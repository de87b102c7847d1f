"""A container's ICMP error reaches whoever sent to that container what it quotes, and nobody else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from isolator.fabric.plan import VXLAN_PORT
from moorage.lab import Lab, Namespace
from tests.cluster.attacking import (
    STRANGER,
    Hears,
    IcmpListener,
    Shot,
    Tally,
    fire,
    stranger,
)
from tests.cluster.icmp import ERRORS, Flow, error, open_flow
from tests.cluster.peers import Peer, create_networks, peers
from tests.cluster.tunnel import device_addresses, from_container, underlay

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

FAMILIES = (4, 6)
EVIL = {
    "red": ("vx", "red", "cni"),
    "public": ("vx", "public", "cni"),
    "hostgw": ("hg", "public", "cni"),
    "open": ("op", "red", "cni"),
    "net-modules": ("vx", "public", "net-modules"),
}
"""Attackers on n1: network, netgroup, engine."""
VICTIMS = {
    "near": (1, "vx", "blue"),
    "far": (2, "vx", "blue"),
    "near, hostgw": (1, "hg", "blue"),
    "far, hostgw": (2, "hg", "blue"),
    "public near": (1, "vx", "public,blue"),
    "public far": (2, "vx", "public,blue"),
    "open near": (1, "op", "green"),
    "open far": (2, "op", "green"),
}
"""Node, network, netgroups."""
FLOWS = {
    "near": "far",
    "far": "near",
    "near, hostgw": "far, hostgw",
    "far, hostgw": "near, hostgw",
    "public near": "far",
    "public far": "near",
    "open near": "open far",
    "open far": "open near",
}
"""Who calls whom, one flow of everybody."""
REPEAT = 2


@dataclass
class Scene:
    """flows: by who began them and family; world: flows of victims to a machine that is none of ours, alike.

    to_evil: a node's own flow to each attacker, by the two and family.
    """

    lab: Lab
    victims: dict[str, Peer]
    evil: dict[str, Peer]
    flows: dict[tuple[str, int], Flow]
    world: dict[tuple[str, int], Flow]
    to_evil: dict[tuple[str, str, int], Flow]
    nodes: dict[str, IcmpListener]
    outsider: Namespace

    @property
    def ears(self) -> list[Hears]:
        return [*(victim.ear for victim in self.victims.values()), *self.nodes.values()]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(nodes=2))
        lab.start()
        create_networks(lab.nodes[0], "vx", "hg", "op")
        outsider = stack.enter_context(stranger(lab))
        join = stack.enter_context(peers(lab))
        victims = {
            name: join(lab.nodes[number - 1], network, *netgroups.split(","))
            for name, (number, network, netgroups) in VICTIMS.items()
        }
        evil = {
            name: join(lab.nodes[0], network, netgroup, engine=engine)
            for name, (network, netgroup, engine) in EVIL.items()
        }
        own = {node.name: device_addresses(node) for node in lab.nodes}
        flows, world, to_evil = {}, {}, {}
        for family in FAMILIES:
            for name, called in FLOWS.items():
                source, target = victims[name], victims[called]
                flows[name, family] = open_flow(
                    source.namespace, source.ips[family], target.namespace, target.ips[family]
                )
            for name in ("near", "public far"):
                source = victims[name]
                world[name, family] = open_flow(
                    source.namespace, source.ips[family], outsider, underlay(STRANGER, family)
                )
            for node in lab.nodes:
                for name, target in evil.items():
                    to_evil[node.name, name, family] = open_flow(
                        node.namespace, own[node.name][family], target.namespace, target.ips[family]
                    )
        listeners = {node.name: IcmpListener(node.namespace) for node in lab.nodes}
        for listener in listeners.values():
            stack.callback(listener.close)
        yield Scene(lab, victims, evil, flows, world, to_evil, listeners, outsider)


def tunnel_flow(scene: Scene, sender: int, receiver: int, family: int) -> Flow:
    return Flow(underlay(sender, family), 54321, underlay(receiver, family), VXLAN_PORT)


def foreign(scene: Scene, name: str, family: int) -> dict[str, Flow]:
    """Flows of others, for an error to one of ``targets``: its own, both ways, and some more."""
    flows = {n: flow for (n, f), flow in scene.flows.items() if f == family}
    found = {
        "tunnel of n1": tunnel_flow(scene, 1, 2, family),
        "tunnel of n2": tunnel_flow(scene, 2, 1, family),
        "its call": flows.get(name, flows["near"]),
        "its answer": next((flows[n].back() for n in FLOWS if FLOWS[n] == name), flows["far"].back()),
    }
    if flow := scene.world.get((name, family)):
        found["its call of the world"] = flow
    return found


def targets(scene: Scene, family: int) -> dict[str, str]:
    """Containers, and addresses of the nodes."""
    found = {name: victim.ips[family] for name, victim in scene.victims.items()}
    return found | {node.name: underlay(node.host, family) for node in scene.lab.nodes}


def genuine(scene: Scene, who: str, family: int) -> list[Shot]:
    """An error from whomever each victim calls; and from the attacker, whom each node calls."""
    found = []
    for name, called in FLOWS.items():
        peer, flow = scene.victims[called], scene.flows[name, family]
        found.append(_shot(peer, flow.source, flow, f"truth {name}", "port unreachable", family))
    for node in scene.lab.nodes:
        flow = scene.to_evil[node.name, who, family]
        found.append(
            _shot(scene.evil[who], flow.source, flow, f"truth {node.name}", "port unreachable", family)
        )
    return found


def _shot(source: Peer, target: str, flow: Flow, label: str, kind: str, family: int) -> Shot:
    frame = from_container(source, error(kind, source.ips[family], target, flow, label))
    return Shot(label, lambda: source.wire.send(frame))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", EVIL)
def test_nobody_gets_a_containers_errors_about_flows_of_others(
    scene: Scene, tally: Tally, who: str, family: int
) -> None:
    """Neither containers, which may be public or open, nor nodes; the control are errors of who was called."""
    evil = scene.evil[who]
    shots = [
        _shot(evil, address, flow, f"{name}, {kind}, {about}", kind, family)
        for name, address in targets(scene, family).items()
        for about, flow in foreign(scene, name, family).items()
        for kind in ERRORS[family]
    ]
    result = fire(shots, genuine(scene, who, family), scene.ears, REPEAT)
    tally.judge("2: ICMP errors about flows of others", family, who, result)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", EVIL)
def test_an_error_about_what_was_sent_to_a_container_goes_to_nobody_but_its_sender(
    scene: Scene, tally: Tally, who: str, family: int
) -> None:
    evil = scene.evil[who]
    flow = scene.to_evil["n1", who, family]
    shots = [
        _shot(evil, address, flow, f"{name}, {kind}", kind, family)
        for name, address in targets(scene, family).items()
        if name != "n1"
        for kind in ERRORS[family]
    ]
    result = fire(shots, genuine(scene, who, family), scene.ears, REPEAT)
    tally.judge("2: ICMP errors about its own flow, to others", family, who, result)
