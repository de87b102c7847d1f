"""The same over an underlay that has IPv6 alone, and between nodes whose tunnels have different ports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from isolator.fabric.plan import VXLAN_PORT
from moorage.lab import Lab, LabNode
from moorage.lab.switch import UNDERLAY4, UPLINK
from tests.cluster.attacking import STRANGER, Listener, Shot, Tally, fire, mark
from tests.cluster.peers import Peer
from tests.cluster.tunnel import FORMS6, from_container, on_underlay, outer, underlay
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

PORTS = {"n1": VXLAN_PORT, "n2": VXLAN_PORT + 1}


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Lab(nodes=2) as lab:
        for node in lab.nodes:
            take_ipv4_off_the_underlay(node)
            node.launch(MOORAGE_UNDERLAY=UPLINK, MOORAGE_VXLAN_PORT=str(PORTS[node.name]))
        for node in lab.nodes:
            node.wait_ready()
        with scene_of(lab, 6, list(PORTS.values())) as scene:
            yield scene


@pytest.fixture(scope="module")
def evil(scene: Scene) -> Peer:
    return scene.join(scene.lab.nodes[0], "vx", "red")


def take_ipv4_off_the_underlay(node: LabNode) -> None:
    """It goes on reaching etcd from an address of another interface."""
    own = UNDERLAY4.format(node.host)
    node.namespace.run("ip", "address", "delete", own, "dev", UPLINK)
    node.namespace.run("ip", "address", "add", f"{node.ip}/32", "dev", "lo")
    node.namespace.run("ip", "route", "add", "198.18.0.0/24", "dev", UPLINK, "src", node.ip)


@pytest.mark.parametrize("family", [4, 6])
def test_no_container_writes_into_the_tunnel_of_a_node_whichever_its_port(
    scene: Scene, tally: Tally, evil: Peer, family: int
) -> None:
    fired = to_tunnels(
        scene, evil.namespace, lambda node: (underlay(node.host, 6), *scene.own[node.name][6]), family
    )
    result = fire(fired, truths(scene, family), scene.ears)
    tally.judge("1a: UDP to the tunnel's port, ports differ", family, "vxlan, IPv6", result)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("form", FORMS6)
def test_no_form_of_packet_gets_into_the_tunnel(
    scene: Scene, tally: Tally, evil: Peer, form: str, family: int
) -> None:
    """The control is the same packet from the other node."""
    fired, control = [], []
    for sender, receiver in scene.pairs:
        wire, target, port = scene.wires[sender.name], underlay(receiver.host, 6), scene.ports[receiver.name]
        for label, payload in payloads(scene, sender, receiver, family):
            packets = FORMS6[form](outer(evil.ips[6], target, payload, port))
            frames = [from_container(evil, packet) for packet in packets]
            fired.append(Shot(label, lambda frames=frames: evil.wire.send(*frames)))
        for label, payload in payloads(scene, sender, receiver, family, "truth ", USUAL):
            packets = FORMS6[form](outer(underlay(sender.host, 6), target, payload, port))
            frames = [on_underlay(sender.host, receiver.host, packet) for packet in packets]
            control.append(Shot(label, lambda wire=wire, frames=frames: wire.send(*frames)))
    tally.judge(f"1a: {form}", family, "vxlan, IPv6", fire(fired, control, scene.ears))


@pytest.mark.parametrize("port", PORTS.values())
@pytest.mark.parametrize("family", [4, 6])
def test_a_containers_packets_to_any_nodes_port_go_nowhere_in_the_world_either(
    scene: Scene, tally: Tally, evil: Peer, family: int, port: int
) -> None:
    target, free = underlay(STRANGER, family), VXLAN_PORT - 1
    with (
        contextlib.closing(Listener(scene.outsider, port)) as tunnel,
        contextlib.closing(Listener(scene.outsider, free)) as beside,
    ):
        result = fire(
            shots(by_socket(evil.namespace, target, port), [("tunnel", mark("tunnel"))]),
            shots(by_socket(evil.namespace, target, free), [("truth", mark("truth"))]),
            [tunnel, beside],
        )
    tally.judge(f"1a: port {port} of a machine that is no node", family, "vxlan, IPv6", result)


@pytest.mark.parametrize("family", [4, 6])
def test_a_machine_that_is_no_node_does_not_write_into_the_tunnel(
    scene: Scene, tally: Tally, family: int
) -> None:
    fired = to_tunnels(
        scene, scene.outsider, lambda node: (underlay(node.host, 6), scene.own[node.name][6][1]), family
    )
    result = fire(fired, truths(scene, family), scene.ears)
    tally.judge("1b: a machine on the underlay that is no node", family, "vxlan, IPv6", result)


@pytest.mark.parametrize("family", [4, 6])
def test_a_nodes_tunnel_packets_are_accepted_at_the_registered_address_alone(
    scene: Scene, tally: Tally, family: int
) -> None:
    sender, receiver = scene.lab.nodes
    fired = [
        shot
        for target in scene.own[receiver.name][6]
        for shot in shots(
            by_socket(sender.namespace, target, PORTS[receiver.name]),
            payloads(scene, sender, receiver, family, f"{target} "),
        )
    ]
    result = fire(fired, truths(scene, family), scene.ears)
    tally.judge("1b: a node, to another address of a node", family, "vxlan, IPv6", result)
