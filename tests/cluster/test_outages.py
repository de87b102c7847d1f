"""The store is out of reach: for one agent, for all of them, or for one that is just starting."""

from __future__ import annotations

import time

import pytest

from moorage.lab import LabNode
from tests.cluster.conftest import QUICKLY, Story, clean_again, refused_quickly, stored_for
from tests.cluster.load import refused, succeeded
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]


def warm(node: LabNode) -> int:
    """How many addresses lie ready on a node."""
    rows = node.ask("status")["addresses"]
    return sum(row["count"] for row in rows if row["state"] == "warm")


def test_an_agent_cut_off_from_etcd_serves_what_is_warm_then_refuses_and_drains_when_healed(
    story: Story,
) -> None:
    with story() as (lab, load):
        alone, *others = lab.nodes
        lab.partition(alone, *lab.etcd.members)
        cut = time.monotonic()
        staying = load.settle(alone, 2)
        refused_quickly(load, alone, cut)
        assert succeeded(load.adds(alone, cut))
        assert load.deletes(alone, cut)
        status = alone.ask("status")
        assert not status["in_sync"] or status["problem"]
        assert status["outbox"] > 0
        for node in others:
            assert refused(load.adds(node, cut)) == []
        lab.heal()
        clean_again(lab)
        stored_for(others[0], staying)


def test_all_members_down_for_30_s_and_back_is_noticed_by_idle_nodes_too(story: Story) -> None:
    with story(quiet=1) as (lab, load):
        idle, *busy = lab.nodes
        staying = [load.settle(node, 2) for node in lab.nodes]
        eventually(lambda: idle.ask("status")["outbox"] == 0)
        lab.etcd.kill()
        down = time.monotonic()
        for node in busy:
            refused_quickly(load, node, down)
            assert node.ask("status")["problem"]
        # It has nothing to write by which it would notice.
        eventually(lambda: not idle.ask("status")["in_sync"])
        assert "etcd cannot be reached at" in idle.ask("status")["problem"]
        (found, *_) = idle.ask("doctor", check=False)
        assert (found["check"], "etcd cannot be reached at" in found["problem"]) == ("agent", True)
        while time.monotonic() < down + 30 or len(load.deletes(since=down)) <= 20:
            assert time.monotonic() < down + 30 + PATIENCE, "the load is stuck"
            load.look()
            time.sleep(0.5)
        deletes = load.deletes(since=down)
        assert succeeded(deletes) == deletes
        for node, stays in zip(lab.nodes, staying, strict=True):
            assert all(node.namespace.pings(stay.ip) for stay in stays)
        lab.etcd.start()
        lab.etcd.wait_ready()
        clean_again(lab)
        for stays in staying:
            stored_for(lab.nodes[0], stays)


def test_an_agent_started_while_etcd_is_down_serves_its_warm_addresses_and_syncs_later(story: Story) -> None:
    with story(quiet=1) as (lab, load):
        early, *others = lab.nodes
        before = load.settle(early, 3)
        eventually(lambda: (early.ask("status")["outbox"], warm(early)) == (0, 8))
        early.kill()
        lab.etcd.kill()
        early.start()
        assert early.ask("status")["problem"]
        assert all(early.namespace.pings(stay.ip) for stay in before)
        staying = load.settle(early, 8)
        assert [stay.add.kind for stay in staying] == ["ok"] * 8
        for stay in load.settle(early, 3):
            assert stay.add.kind == "error 11"
            assert stay.add.took < QUICKLY
        lab.etcd.start()
        lab.etcd.wait_ready()
        clean_again(lab)
        stored_for(others[0], before + staying)
        assert [stay.add.kind for stay in load.settle(early, 3)] == ["ok"] * 3
