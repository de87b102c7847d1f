"""A container reaches no endpoint of the store, by whichever address of its machine, until its network may."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from moorage.lab import Lab, LabNode, Namespace
from tests.cluster.attacking import STRANGER, Tally, inside, stranger
from tests.cluster.peers import FABRICS, Peer, create_networks, peers
from tests.cluster.tunnel import add_second_address, device_addresses, underlay
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

PORT = 2379
FAMILIES = (4, 6)
ATTEMPTS = 3
SILENCE = 0.4
"""Seconds after which a SYN that was not answered is taken for lost; the control is answered sooner."""


@dataclass
class Scene:
    """A node with a container on each network, and etcd on a machine that is a node as well, ``db``.

    targets: of etcd's machine, by a name, then family.
    """

    lab: Lab
    evil: dict[str, Peer]
    targets: dict[str, dict[int, str]]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    everywhere = ("--listen-client-urls", f"http://[::]:{PORT}")
    with Lab(nodes=1, etcd_flags=everywhere) as lab:
        lab.start()
        (n1,) = lab.nodes
        (etcd,) = lab.etcd.members
        create_networks(n1)
        db = LabNode("db", store=lab.etcd.url, host=etcd.host, namespace=etcd.namespace)
        db.directory.mkdir(mode=0o700)
        try:
            db.start()
            with peers(lab) as join:
                targets = {
                    "the store's": {family: underlay(etcd.host, family) for family in FAMILIES},
                    "its VXLAN device's": device_addresses(db),
                    "another interface's": add_second_address(db, [n1.namespace]),
                }
                evil = {FABRICS[name]: join(n1, name, "red") for name in ("vx", "hg", "nn")}
                evil["net-modules"] = join(n1, "vx", "red", engine="net-modules")
                yield Scene(lab, evil, targets)
        finally:
            db.agent.kill()
            shutil.rmtree(db.directory, ignore_errors=True)


def connects(source: Namespace, target: str, port: int = PORT, within: float = SILENCE) -> bool:
    """Whether a connection comes about."""

    def call() -> bool:
        try:
            socket.create_connection((target, port), timeout=within).close()
        except OSError:
            return False
        return True

    return inside(source, call)


def reached(source: Namespace, target: str) -> int:
    """Connections that came about, of ATTEMPTS."""
    return sum(connects(source, target) for _ in range(ATTEMPTS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", ["vxlan", "hostgw", "vxlan, no NAT", "net-modules"])
def test_a_container_of_a_new_network_does_not_reach_the_store(
    scene: Scene, tally: Tally, who: str, family: int
) -> None:
    """Its node does, and the container reaches that port of another machine."""
    found = {}
    for name, ips in scene.targets.items():
        assert connects(scene.lab.nodes[0].namespace, ips[family], within=PATIENCE)
        found[name] = reached(scene.evil[who].namespace, ips[family])
        tally.note(f"1d: etcd by {name} address", family, who, ATTEMPTS, found[name])
    assert found == dict.fromkeys(scene.targets, 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", ["vxlan", "hostgw", "net-modules"])
def test_it_reaches_that_port_of_another_machine(scene: Scene, who: str, family: int) -> None:
    with stranger(scene.lab) as other:
        server = inside(
            other, lambda: socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
        )
        with server:
            assert connects(scene.evil[who].namespace, underlay(STRANGER, family), within=PATIENCE)


@pytest.mark.parametrize("name", ["vx", "hg", "nn"])
def test_a_network_that_may_reach_the_store_does(scene: Scene, name: str) -> None:
    said = scene.lab.nodes[0].cli("network", "set", name, "--to-node", "store", check=False)
    assert said.returncode == 0, said.stderr
    source = scene.evil[FABRICS[name]].namespace
    for family in FAMILIES:
        target = scene.targets["the store's"][family]
        eventually(lambda target=target: connects(source, target))
