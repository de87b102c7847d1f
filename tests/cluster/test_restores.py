"""etcd is restored from a backup that does not know of the last containers, in every way in which that is done.

n1 has had containers since the backup; n2 was idle, so that all of what it wrote stands in the backup; n3 joins, or is
started again, in the moment in which the restored store serves.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ipam.holder import COOLDOWN
from moorage.lab import Answer, Container, Lab, LabNode
from tests.cluster.conftest import clean_again
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]


REVISIONS = 2000
"""By which one is bumped: more than a test writes."""


@dataclass
class Scene:
    """A lab and the containers that live in it. Its calls are the engine's. network: that they are on."""

    lab: Lab
    network: str = ""
    lives: list[tuple[LabNode, Container, str]] = field(default_factory=list)
    resources: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def add(self, node: LabNode) -> Answer:
        """Start a container, which lives to the end if it gets an address."""
        container = self.resources.enter_context(node.container())
        answer = container.add(self.network)
        if answer.exit == 0:
            self.lives.append((node, container, answer.ips[4]))
        return answer

    def settle(self, node: LabNode, count: int) -> None:
        for _ in range(count):
            answer = self.add(node)
            assert answer.exit == 0, answer

    def written(self) -> None:
        """Wait until the store has all that was done so far."""
        for node in self.lab.nodes:
            if node.is_running:
                eventually(lambda node=node: node.ask("status")["outbox"] == 0)

    def verify(self) -> None:
        """Nobody was cut off, no address is anybody's twice, and the store knows of all."""
        clean_again(self.lab)
        addresses = [ip for _, _, ip in self.lives]
        assert sorted(set(addresses)) == sorted(addresses)
        for node in self.lab.nodes:
            status = node.ask("status")
            assert (status["conflicts"], status["contested"]) == ([], [])
        for node, _, ip in self.lives:
            assert node.namespace.pings(ip), f"{ip} on {node.name} was cut off"
        rows = self.lab.nodes[0].ask("ip", "list", "--state", "assigned")
        stored = {(row["address"], row["node"]) for row in rows}
        assert {(ip, node.name) for node, _, ip in self.lives} <= stored


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Lab(nodes=3, etcd=1) as lab:
        for node in lab.nodes[:2]:
            node.start()
        scene = Scene(lab)
        with scene.resources:
            yield scene


def again(lab: Lab, backup: Path) -> None:
    lab.etcd.restore(backup)


def bumped(lab: Lab, backup: Path) -> None:
    lab.etcd.restore(backup, bump=REVISIONS)


def elsewhere(lab: Lab, backup: Path) -> None:
    lab.etcd.restore(backup, token="another-cluster")


RESTORES = [again, bumped, elsewhere]


@pytest.mark.parametrize("restore", RESTORES)
def test_no_address_that_a_restored_store_forgot_is_given_to_anybody_else(
    scene: Scene, restore: Callable[[Lab, Path], None], tell: list[str]
) -> None:
    lab = scene.lab
    busy, idle, new = lab.nodes
    scene.network = restore.__name__
    busy.cli(
        "network", "create", scene.network, "--pool", f"10.64.{RESTORES.index(restore)}.0/26",
        "--block-size", "29", "--warm", "2", "--allow-from", "nodes",
    )  # fmt: skip
    scene.settle(busy, 2)
    scene.settle(idle, 1)
    scene.written()
    backup = lab.etcd.back_up()
    # Two of eight blocks that the backup does not know.
    scene.settle(busy, 20)
    scene.written()
    if new.is_running:
        new.kill()
    restore(lab, backup)
    begun = time.monotonic()
    new.start()
    if restore is again:
        # As operators do. Within the grace, and before all have asserted what they hold.
        idle.kill()
        idle.start()
    # Each wants more than what may be warm from before, and both together nearly all that is left.
    got = {idle.name: 0, new.name: 0}
    while min(got.values()) < 12:
        assert time.monotonic() < begun + PATIENCE, got
        for node in (idle, new):
            if got[node.name] < 12:
                got[node.name] += scene.add(node).exit == 0
    scene.verify()
    tell.append(f"{restore.__name__}: new addresses on both after {time.monotonic() - begun:.1f} s")


def test_an_address_that_moved_since_the_backup_stays_with_who_has_it_now(scene: Scene) -> None:
    """The backup has it on the node that gave it away, which knows better, and says so a moment later."""
    lab = scene.lab
    before, now, other = lab.nodes
    if not other.is_running:
        other.start()
    scene.network = "moved"
    before.cli(
        "network", "create", scene.network, "--pool", "10.64.9.0/28", "--warm", "0", "--allow-from", "nodes",
        "--allow-static", "all",
    )  # fmt: skip
    with before.container() as gone:
        ip = gone.add(scene.network).ips[4]
        scene.written()
        backup = lab.etcd.back_up()
        gone.delete(scene.network)
    container = scene.resources.enter_context(now.container())
    eventually(lambda: container.add(scene.network, labels={"moorage.ip": ip}).exit == 0, COOLDOWN + PATIENCE)
    scene.lives.append((now, container, ip))
    scene.written()
    before.kill()
    again(lab, backup)
    eventually(lambda: now.ask("status")["contested"])
    assert now.namespace.pings(ip)
    before.start()
    eventually(lambda: now.ask("status")["contested"] == [])
    scene.verify()


def test_a_member_that_comes_back_with_an_old_disk_cuts_nobody_off_and_brings_no_address_back() -> None:
    with Lab(nodes=2, etcd=3) as lab:
        lab.start()
        scene = Scene(lab, network="disk")
        lab.nodes[0].cli(
            "network", "create", scene.network, "--pool", "10.64.0.0/26", "--block-size", "29", "--warm", "2",
            "--allow-from", "nodes",
        )  # fmt: skip
        with scene.resources:
            scene.settle(lab.nodes[0], 4)
            scene.written()
            old = next(member for member in lab.etcd.members if member is not lab.etcd.leader())
            disk = old.directory.with_suffix(".old")
            old.kill()
            shutil.copytree(old.directory, disk)
            old.start(lab.etcd.initial_cluster)
            lab.etcd.wait_ready()
            for node in lab.nodes:
                scene.settle(node, 10)
            scene.written()
            # While others lead it, etcd itself refuses to run with less than it had acknowledged.
            lab.etcd.kill()
            old.forget()
            shutil.move(disk, old.directory)
            lab.etcd.start()
            lab.etcd.wait_ready()
            for node in lab.nodes:
                eventually(lambda node=node: scene.add(node).exit == 0)
            scene.verify()
