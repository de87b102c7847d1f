"""No container, and no machine that is no node, writes into the tunnel: whatever it sends, and to whichever address."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from scapy.layers.l2 import Ether

from isolator.fabric.plan import VXLAN_PORT
from moorage.lab import Lab
from moorage.lab.switch import MAC
from tests.cluster.attacking import STRANGER, Listener, Shot, Tally, fire, mark
from tests.cluster.peers import Peer
from tests.cluster.tunnel import FORMS4, from_container, on_underlay, outer, underlay
from tests.cluster.tunnel_scene import (
    USUAL,
    Scene,
    by_socket,
    payloads,
    scene_of,
    shots,
    to_tunnels,
    truths,
)

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

EVIL = {"vxlan": "vx", "hostgw": "hg", "no NAT": "nn", "net-modules": "vx"}
"""Attackers, and the networks that they are on."""


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Lab(nodes=2) as lab:
        lab.start()
        with scene_of(lab) as scene:
            yield scene


@pytest.fixture(scope="module")
def evil(scene: Scene) -> dict[str, Peer]:
    return {
        who: scene.join(scene.lab.nodes[0], network, "red", engine=who if who == "net-modules" else "cni")
        for who, network in EVIL.items()
    }


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("who", EVIL)
def test_no_container_writes_into_the_tunnel_of_any_node_by_any_of_its_addresses(
    scene: Scene, tally: Tally, evil: dict[str, Peer], who: str, family: int
) -> None:
    fired = to_tunnels(
        scene,
        evil[who].namespace,
        lambda node: (node.ip, *scene.own[node.name][4], "169.254.1.1"),
        family,
    )
    tally.judge("1a: UDP to the tunnel's port", family, who, fire(fired, truths(scene, family), scene.ears))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("form", FORMS4)
def test_no_form_of_packet_gets_into_the_tunnel(
    scene: Scene, tally: Tally, evil: dict[str, Peer], form: str, family: int
) -> None:
    """The control is the same packet from the other node."""
    source = evil["vxlan"]
    fired, control = [], []
    for sender, receiver in scene.pairs:
        wire = scene.wires[sender.name]
        for label, payload in payloads(scene, sender, receiver, family):
            packets = FORMS4[form](outer(source.ips[4], receiver.ip, payload))
            frames = [from_container(source, packet) for packet in packets]
            fired.append(Shot(label, lambda frames=frames: source.wire.send(*frames)))
        for label, payload in payloads(scene, sender, receiver, family, "truth ", USUAL):
            packets = FORMS4[form](outer(sender.ip, receiver.ip, payload))
            frames = [on_underlay(sender.host, receiver.host, packet) for packet in packets]
            control.append(Shot(label, lambda wire=wire, frames=frames: wire.send(*frames)))
    tally.judge(f"1a: {form}", family, "vxlan", fire(fired, control, scene.ears))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("who", ["vxlan", "hostgw"])
def test_a_containers_packets_to_the_tunnels_port_go_nowhere_in_the_world_either(
    scene: Scene, tally: Tally, evil: dict[str, Peer], who: str, family: int
) -> None:
    """A NAT address or a second interface of a node may be anywhere; only the port tells."""
    target, source = underlay(STRANGER, family), evil[who].namespace
    with (
        contextlib.closing(Listener(scene.outsider, VXLAN_PORT)) as tunnel,
        contextlib.closing(Listener(scene.outsider, VXLAN_PORT - 1)) as beside,
    ):
        result = fire(
            shots(by_socket(source, target, VXLAN_PORT), [("tunnel", mark("tunnel"))]),
            shots(by_socket(source, target, VXLAN_PORT - 1), [("truth", mark("truth"))]),
            [tunnel, beside],
        )
    tally.judge("1a: the tunnel's port of a machine that is no node", family, who, result)


@pytest.mark.parametrize("family", [4, 6])
def test_a_machine_that_is_no_node_does_not_write_into_the_tunnel(
    scene: Scene, tally: Tally, family: int
) -> None:
    fired = to_tunnels(scene, scene.outsider, lambda node: (node.ip, scene.own[node.name][4][1]), family)
    result = fire(fired, truths(scene, family), scene.ears)
    tally.judge("1b: a machine on the underlay that is no node", family, "vxlan", result)


@pytest.mark.parametrize("form", FORMS4)
def test_a_machine_that_is_no_node_does_not_write_into_the_tunnel_in_any_form(
    scene: Scene, tally: Tally, form: str
) -> None:
    sender, receiver = scene.lab.nodes
    wire = scene.wires["outsider"]
    fired = []
    for family in (4, 6):
        for label, payload in payloads(scene, sender, receiver, family):
            packets = FORMS4[form](outer(underlay(STRANGER, 4), receiver.ip, payload))
            frames = [on_underlay(STRANGER, receiver.host, packet) for packet in packets]
            fired.append(Shot(label, lambda frames=frames: wire.send(*frames)))
    result = fire(fired, truths(scene, 4), scene.ears)
    tally.judge(f"1b: no node, {form}", "both", "vxlan", result)


@pytest.mark.parametrize(
    ("target", "mac"),
    [
        ("198.18.0.255", "ff:ff:ff:ff:ff:ff"),
        ("255.255.255.255", "ff:ff:ff:ff:ff:ff"),
        ("224.0.0.1", "01:00:5e:00:00:01"),
    ],
)
def test_a_broadcast_of_a_machine_that_is_no_node_gets_into_no_tunnel(
    scene: Scene, tally: Tally, target: str, mac: str
) -> None:
    """The kernel gives those to every socket that listens on all addresses."""
    sender, receiver = scene.lab.nodes
    wire = scene.wires["outsider"]
    fired = []
    for family in (4, 6):
        for label, payload in payloads(scene, sender, receiver, family):
            packet = outer(underlay(STRANGER, 4), target, payload)
            frame = bytes(Ether(src=MAC.format(STRANGER), dst=mac) / packet)
            fired.append(Shot(label, lambda frame=frame: wire.send(frame)))
    result = fire(fired, truths(scene, 4), scene.ears)
    tally.judge(f"1b: no node, to {target}", "both", "vxlan", result)


@pytest.mark.parametrize("family", [4, 6])
def test_a_nodes_tunnel_packets_are_accepted_at_the_registered_address_alone(
    scene: Scene, tally: Tally, family: int
) -> None:
    sender, receiver = scene.lab.nodes
    fired = [
        shot
        for target in scene.own[receiver.name][4]
        for shot in shots(
            by_socket(sender.namespace, target, VXLAN_PORT),
            payloads(scene, sender, receiver, family, f"{target} "),
        )
    ]
    result = fire(fired, truths(scene, family), scene.ears)
    tally.judge("1b: a node, to another address of a node", family, "vxlan", result)
