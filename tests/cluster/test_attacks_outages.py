"""What keeps others out of the tunnel outlives agents, and a store that is away, empty or has gone back."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from isolator.fabric.plan import VXLAN_PORT
from moorage.lab import Lab, LabNode
from tests.cluster.attacking import Result, Shot, Tally, fire, mark, udp_socket
from tests.cluster.peers import PORT, Peer, create_networks
from tests.cluster.tunnel import device_addresses
from tests.cluster.tunnel_scene import USUAL, Scene, by_socket, payloads, scene_of, shots, to_tunnels, truths
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

FAMILIES = (4, 6)


@pytest.fixture(params=["running", "started again"])
def agents(request: pytest.FixtureRequest) -> str:
    """What agents do while the store is not what it was."""
    return str(request.param)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """n2 joins after a backup was made. Tests that take more away from the store come later."""
    with Lab(nodes=2) as lab:
        n1, n2 = lab.nodes
        n1.start()
        create_networks(n1)
        backup = lab.etcd.back_up()
        n2.start()
        with scene_of(lab, networks=False) as scene:
            scene.backup = backup
            yield scene


def calls(scene: Scene, family: int) -> list[Shot]:
    """Datagrams of containers to each other, as their kernels send them."""
    return [
        call(source, target, family)
        for name in scene.near
        for source, target in (
            (scene.near[name], scene.far[name]),
            (scene.far[name], scene.near[name]),
        )
    ]


def call(source: Peer, target: Peer, family: int) -> Shot:
    label = f"truth {source.network} {source.node.name} calls {target.node.name}"
    sock = udp_socket(source.namespace, family)
    return Shot(label, lambda: sock.sendto(mark(label), (target.ips[family], PORT)))


def attacked(scene: Scene, family: int) -> Result:
    """What a machine that is no node writes into both tunnels; nodes and containers use them meanwhile."""
    fired = to_tunnels(scene, scene.outsider, lambda node: (node.ip,), family)
    return fire(fired, [*truths(scene, family), *calls(scene, family)], scene.ears)


def judge(scene: Scene, tally: Tally, when: str) -> None:
    results = [attacked(scene, family) for family in FAMILIES]
    for family, result in zip(FAMILIES, results, strict=True):
        tally.judge(f"1c: no node, {when}", family, "both", result)


def start_again(node: LabNode) -> None:
    """Its agent is killed and started, with or without a store."""
    node.kill()
    node.launch()
    eventually(node.answers)


def all_well(lab: Lab) -> None:
    for node in lab.nodes:
        eventually(lambda node=node: node.ask("status")["problem"] == "")


def test_nobody_else_is_let_in_while_the_store_is_away_and_the_agent_is_started_again(
    scene: Scene, tally: Tally
) -> None:
    n2 = scene.lab.nodes[1]
    scene.lab.partition(n2, *scene.lab.etcd.members)
    try:
        start_again(n2)
        judge(scene, tally, "n2's agent restarted without a store")
    finally:
        scene.lab.heal()
        all_well(scene.lab)
    judge(scene, tally, "the store is back")


def test_a_node_that_was_removed_is_no_longer_let_in(scene: Scene, tally: Tally) -> None:
    here, there = scene.lab.nodes
    with LabNode("n3", store=scene.lab.etcd.url, switch=scene.lab.switch, host=3) as third:
        third.start()
        send = by_socket(third.namespace, there.ip, VXLAN_PORT)

        def by_third(prefix: str = "") -> list[Shot]:
            return [
                shot
                for family in FAMILIES
                for shot in shots(send, payloads(scene, here, there, family, f"{prefix}{family} ", USUAL))
            ]

        fire([], by_third("truth by a node "), scene.ears)
        assert third.stop() == 0
        here.cli("node", "remove", "n3")
        deadline = time.monotonic() + PATIENCE
        while (result := fire(by_third(), truths(scene, 4), scene.ears)).delivered:
            if time.monotonic() > deadline:
                break
        tally.judge("1c: a node that was removed", "both", "both", result)


def test_nobody_else_is_let_in_after_an_older_backup_was_restored(
    scene: Scene, tally: Tally, agents: str
) -> None:
    assert scene.backup is not None
    scene.lab.etcd.restore(scene.backup)
    if agents == "started again":
        for node in scene.lab.nodes:
            start_again(node)
    try:
        judge(scene, tally, f"older backup, agents {agents}")
    finally:
        all_well(scene.lab)
    judge(scene, tally, f"older backup, later, agents {agents}")


def test_nobody_else_is_let_in_after_the_store_was_emptied_and_networks_are_made_again(
    scene: Scene, tally: Tally
) -> None:
    """Nodes have an address on their devices again when what was given out before is known to the store."""
    empty_the_store(scene)
    create_networks(scene.lab.nodes[0])
    for node in scene.lab.nodes:
        for family, ip in device_addresses(node).items():
            scene.own[node.name][family][0] = ip
    judge(scene, tally, "the store was emptied, and filled again")


def empty_the_store(scene: Scene) -> None:
    """And have the agents start again on it."""
    scene.lab.etcd.ctl("del", "", "--from-key")
    for node in scene.lab.nodes:
        start_again(node)
