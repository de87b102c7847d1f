"""Whose an address is survives everything that loses memory, together and under load: four nodes, two of them idle.

Histories with an odd seed have one member of etcd, those with an even one three. All speak mutual TLS, and the nodes'
journals are on small disks of their own.

``MEMORY_SEEDS=20`` runs as many histories of ``MEMORY_STEPS`` faults each (12 unless said, some three minutes each);
``MEMORY_SEED=n`` a certain one. One fault of each kind has a test of its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moorage.lab import Files, Lab, LabNode, Tls
from moorage.lab.etcd import FIRST_HOST
from moorage.lab.switch import address
from tests.certificates import Rotated
from tests.cluster.conftest import HEALED_WITHIN, clean_again, nothing_is_left, stored_for
from tests.cluster.load import NETWORK, Load, Stay, no_address_was_had_twice
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

SEEDS = int(os.environ.get("MEMORY_SEEDS") or 1)
STEPS = int(os.environ.get("MEMORY_STEPS") or (12 if SEEDS > 1 else 2))
FIRST = int(os.environ.get("MEMORY_SEED") or 1)

NODES = 4
SKEWED = Path(__file__).with_name("skewed_agent.py")

REVISIONS = 20_000
"""By which a restored store is bumped: more than a history writes."""


DISK = "24m"
"""Of each node, for its journal: some times what that needs, and filled in an instant."""

CLOCKS = 7200.0
"""Seconds that a node's clock may be wrong, either way."""


class History:
    """Faults that befall a lab, chosen at random. done: how many of each. certificates: its etcd's and nodes'."""

    def __init__(self, lab: Lab, chance: random.Random, certificates: Rotated) -> None:
        self.done: Counter[str] = Counter()
        self._certificates = certificates
        self._skew: dict[str, float] = {}
        self._lab = lab
        self._chance = chance
        self._backup = lab.etcd.back_up()
        self._kept = Path(tempfile.mkdtemp(prefix="mrg-journals-"))
        self._keep_journals()

    def close(self) -> None:
        shutil.rmtree(self._kept)

    def step(self) -> None:
        fault = self._chance.choice(FAULTS[len(self._lab.etcd.members)])
        self.done[fault.__name__] += 1
        fault(self)
        for node in self._lab.nodes:
            if not node.is_running:
                self._start(node)
        if self._chance.random() < 0.5:
            self._backup = self._lab.etcd.back_up()
        if self._chance.random() < 0.5:
            self._keep_journals()

    def _start(self, node: LabNode) -> None:
        node.start(SKEW=str(self._skew.get(node.name, 0.0)))

    def _any(self) -> LabNode:
        return self._chance.choice(self._lab.nodes)

    def _keep_journals(self) -> None:
        for node in self._lab.nodes:
            shutil.rmtree(self._kept / node.name, ignore_errors=True)
            shutil.copytree(node.state_dir, self._kept / node.name)

    def _restore(self, **how: object) -> None:
        if self._chance.random() < 0.5:
            self._any().kill()
        for kept in self._lab.etcd.directory.glob("*.old"):
            shutil.rmtree(kept)
        self._lab.etcd.restore(self._backup, **how)
        if self._chance.random() < 0.5:
            restarted = self._any()
            restarted.kill()
            self._start(restarted)

    # -- the faults

    def restored_in_place(self) -> None:
        self._restore()

    def restored_and_bumped(self) -> None:
        self._restore(bump=REVISIONS)

    def restored_as_another_cluster(self) -> None:
        self._restore(token=f"cluster-{self._chance.random()}")

    def store_restarted(self) -> None:
        self._lab.etcd.kill()
        time.sleep(self._chance.uniform(0, 8))
        self._lab.etcd.start()
        self._lab.etcd.wait_ready()

    def agent_killed(self) -> None:
        self._any().kill()

    def cut_off(self) -> None:
        self._lab.partition(self._any(), *self._lab.etcd.members)
        time.sleep(self._chance.uniform(1, 20))
        self._lab.heal()

    def journal_lost(self) -> None:
        node = self._any()
        node.kill()
        for file in node.state_dir.glob("journal.db*"):
            file.unlink()

    def journal_lost_while_cut_off(self) -> None:
        node = self._any()
        self._lab.partition(node, *self._lab.etcd.members)
        time.sleep(self._chance.uniform(1, 4))
        node.kill()
        for file in node.state_dir.glob("journal.db*"):
            file.unlink()
        self._start(node)
        time.sleep(self._chance.uniform(0, 4))
        self._lab.heal()

    def journal_rolled_back(self) -> None:
        node = self._any()
        node.kill()
        for file in node.state_dir.glob("journal.db*"):
            file.unlink()
        for file in (self._kept / node.name).glob("journal.db*"):
            shutil.copy(file, node.state_dir)

    def journal_damaged(self) -> None:
        node = self._any()
        node.kill()
        with (node.state_dir / "journal.db").open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            for _ in range(20):
                file.seek(self._chance.randrange(size))
                file.write(self._chance.randbytes(8))

    def disk_full(self) -> None:
        node = self._chance.choice([node for node in self._lab.nodes if node.state_dir.resolve().is_mount()])
        filler = node.state_dir / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        time.sleep(self._chance.uniform(1, 6))
        if self._chance.random() < 0.5:
            node.kill()
            node.launch(SKEW=str(self._skew.get(node.name, 0.0)))
            time.sleep(self._chance.uniform(0, 3))
        filler.unlink()

    def clock_moved(self) -> None:
        node = self._any()
        self._skew[node.name] = self._chance.uniform(-CLOCKS, CLOCKS)
        node.kill()

    def certificates_replaced(self) -> None:
        """And the authority with them, at once or one side after the other."""
        old, new = self._certificates.rotate()
        if self._chance.random() < 0.5:
            self._certificates.replace(old, new)
            time.sleep(self._chance.uniform(0, 5))
        self._certificates.replace(new)
        self.store_restarted()

    def node_joins(self) -> None:
        if len(self._lab.nodes) > NODES:
            return self.agent_killed()
        self._start(self._lab.join())
        return None

    def member_with_an_old_disk(self) -> None:
        """The disk of one of three is kept, and put back the next time."""
        etcd = self._lab.etcd
        old = next(member for member in etcd.members if member is not etcd.leader())
        kept = old.directory.with_suffix(".old")
        if not kept.exists():
            old.kill()
            shutil.copytree(old.directory, kept)
            old.start(etcd.initial_cluster)
        else:
            etcd.kill()
            old.forget()
            shutil.move(kept, old.directory)
            etcd.start()
        etcd.wait_ready()


OF_ANY = [
    History.restored_in_place,
    History.restored_as_another_cluster,
    History.store_restarted,
    History.agent_killed,
    History.cut_off,
    History.journal_lost,
    History.journal_lost_while_cut_off,
    History.journal_rolled_back,
    History.journal_damaged,
    History.disk_full,
    History.clock_moved,
    History.certificates_replaced,
    History.node_joins,
]

FAULTS: dict[int, list[Callable[[History], None]]] = {
    1: [*OF_ANY, History.restored_and_bumped],
    3: [*OF_ANY, History.member_with_an_old_disk],
}
"""By the number of etcd's members."""


@contextlib.contextmanager
def small_disks(lab: Lab) -> Iterator[None]:
    """On which its nodes, all but those that join, have their journals."""
    with contextlib.ExitStack() as mounted:
        for node in lab.nodes:
            disk = node.directory / "disk"
            disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "mrg-small", str(disk)], check=True)
            mounted.callback(subprocess.run, ["umount", "-l", str(disk)], check=True)
            node.state_dir.symlink_to(disk)
        yield


@contextlib.contextmanager
def lab_of(seed: int, certificates: Rotated) -> Iterator[Lab]:
    tls = Tls(
        server=Files(certificates.trusted, certificates.server_cert, certificates.server_key),
        client=Files(certificates.ca, certificates.cert, certificates.key),
    )
    agent = (sys.executable, str(SKEWED), "agent")
    with Lab(nodes=NODES, etcd=1 if seed % 2 else 3, tls=tls, agent=agent) as lab, small_disks(lab):
        lab.start()
        yield lab
        for node in lab.nodes:
            node.kill()


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_no_living_container_loses_its_address_whatever_is_lost_restored_or_damaged(
    seed: int, tmp_path: Path, tell: list[str]
) -> None:
    chance = random.Random(seed)
    members = ",".join(f"IP:{address(host)}" for host in range(FIRST_HOST, FIRST_HOST + 3))
    certificates = Rotated(tmp_path, members)
    with lab_of(seed, certificates) as lab:
        lab.nodes[0].cli(
            "network", "create", NETWORK,
            "--pool", "10.64.0.0/22", "--block-size", "28", "--no-nat", "--allow-from", "nodes",
        )  # fmt: skip
        load = Load(lab.nodes[2:NODES], chance.getrandbits(32), workers=1)
        history = History(lab, chance, certificates)
        try:
            with load:
                staying: list[Stay] = []
                for _ in range(STEPS):
                    staying += [stay for node in lab.nodes for stay in load.settle(node, 2)]
                    history.step()
                    all_live(lab, staying)
                clean_again(lab)
                all_live(lab, staying)
                stored_for(lab.nodes[0], staying)
                load.finish()
                load.look()
                for node in lab.nodes:
                    nothing_is_left(node)
            assert load.carried_twice == []
            # A node that lost its journal does not know any more what cooled down.
            no_address_was_had_twice(load.stays, rest=0.0)
        except BaseException:
            print(f"seed {seed}: {dict(history.done)}")
            for node in lab.nodes:
                print(f"--- {node.name}\n{node.log.read_text()[-6000:]}")
            raise
        finally:
            history.close()
            tell.append(f"seed {seed}: {dict(history.done)}; {load.figures()}")


def all_live(lab: Lab, staying: list[Stay]) -> None:
    """Every container that has an address answers on it, and no agent thinks otherwise."""
    nodes = {node.name: node for node in lab.nodes}
    for stay in staying:
        if stay.ip:
            # The moments in which the firewall is made anew, at a start.
            eventually(lambda stay=stay: nodes[stay.node].namespace.pings(stay.ip, wait=1), HEALED_WITHIN)
    for node in lab.nodes:
        eventually(lambda node=node: node.ask("status")["conflicts"] == [], PATIENCE)
