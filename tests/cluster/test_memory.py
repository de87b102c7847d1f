"""Whose an address is survives everything that loses memory, together and under load: four nodes, two of them idle.

``MEMORY_SEEDS=20`` runs as many histories of ``MEMORY_STEPS`` faults each (12 unless said, some three minutes each);
``MEMORY_SEED=n`` a certain one. One fault of each kind has a test of its own.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from moorage.lab import Lab, LabNode
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

REVISIONS = 20_000
"""By which a restored store is bumped: more than a history writes."""


class History:
    """Faults that befall a lab, chosen at random. done: how many of each."""

    def __init__(self, lab: Lab, chance: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self._lab = lab
        self._chance = chance
        self._backup = lab.etcd.back_up()
        self._kept = Path(tempfile.mkdtemp(prefix="mrg-journals-"))
        self._keep_journals()

    def close(self) -> None:
        shutil.rmtree(self._kept)

    def step(self) -> None:
        fault = self._chance.choice(FAULTS)
        self.done[fault.__name__] += 1
        fault(self)
        for node in self._lab.nodes:
            if not node.is_running:
                node.start()
        if self._chance.random() < 0.5:
            self._backup = self._lab.etcd.back_up()
        if self._chance.random() < 0.5:
            self._keep_journals()

    def _any(self) -> LabNode:
        return self._chance.choice(self._lab.nodes)

    def _keep_journals(self) -> None:
        for node in self._lab.nodes:
            shutil.rmtree(self._kept / node.name, ignore_errors=True)
            shutil.copytree(node.state_dir, self._kept / node.name)

    def _restore(self, **how: object) -> None:
        if self._chance.random() < 0.5:
            self._any().kill()
        self._lab.etcd.restore(self._backup, **how)
        if self._chance.random() < 0.5:
            restarted = self._any()
            restarted.kill()
            restarted.start()

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
        node.start()
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


FAULTS: list[Callable[[History], None]] = [
    History.restored_in_place,
    History.restored_and_bumped,
    History.restored_as_another_cluster,
    History.store_restarted,
    History.agent_killed,
    History.cut_off,
    History.journal_lost,
    History.journal_lost_while_cut_off,
    History.journal_rolled_back,
    History.journal_damaged,
]


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_no_living_container_loses_its_address_whatever_is_lost_restored_or_damaged(
    seed: int, tell: list[str]
) -> None:
    chance = random.Random(seed)
    with Lab(nodes=4, etcd=1) as lab:
        lab.start()
        lab.nodes[0].cli(
            "network", "create", NETWORK,
            "--pool", "10.64.0.0/22", "--block-size", "28", "--no-nat", "--allow-from", "nodes",
        )  # fmt: skip
        load = Load(lab.nodes[2:], chance.getrandbits(32), workers=1)
        history = History(lab, chance)
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
