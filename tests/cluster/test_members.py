"""Members of etcd die, stand still, forget their history, run out of space."""

from __future__ import annotations

import time

import pytest

from moorage.lab import LabNode
from tests.cluster.conftest import Story, clean_again, refused_quickly, under_way
from tests.cluster.load import NETWORK
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]


MORE_THAN_WARM = 20
"""Containers a node cannot start without the store: 8 addresses are warm, more are being fetched at most."""


def connections(node: LabNode) -> int:
    """How many connections of a node to etcd stand."""
    return len(node.namespace.run("ss", "-Htn", "state", "established", "dport = :2379").stdout.splitlines())


def test_the_leader_is_killed_and_restarted(story: Story) -> None:
    with story() as (lab, load):
        staying = load.settle(lab.nodes[0], 2)
        leader = lab.etcd.leader()
        leader.kill()
        under_way(load, count=MORE_THAN_WARM)
        leader.start(lab.etcd.initial_cluster)
        lab.etcd.wait_ready()
        clean_again(lab)
        assert all(lab.nodes[0].namespace.pings(stay.ip) for stay in staying)


def test_each_member_stands_still_for_a_while(story: Story) -> None:
    with story() as (lab, load):
        for member in lab.etcd.members:
            member.pause()
            try:
                under_way(load, count=MORE_THAN_WARM)
            finally:
                member.resume()
            lab.etcd.wait_ready()
        clean_again(lab)


def test_history_is_compacted_while_an_agent_is_cut_off(story: Story) -> None:
    with story() as (lab, load):
        alone, other, _ = lab.nodes
        lab.partition(alone, *lab.etcd.members)
        eventually(lambda: connections(alone) == 0)
        other.cli("ip", "reserve", "10.64.3.3", "--key", "kept")
        under_way_without = time.monotonic()
        eventually(lambda: len(load.adds(other, under_way_without)) >= 5)
        lab.etcd.ctl("compact", str(lab.etcd.revision()))
        lab.heal()
        clean_again(lab)
        eventually(lambda: "store is listed anew" in alone.log.read_text())
        with alone.container() as container:
            answer = container.add(NETWORK, labels={"moorage.ip": "10.64.3.3"})
            assert "reserved" in answer.json["msg"]
            container.delete(NETWORK)


def test_space_runs_out_and_is_made(story: Story) -> None:
    with story(flags=("--quota-backend-bytes", str(16 << 20))) as (lab, load):
        for number in range(40):
            if lab.etcd.ctl("put", f"junk/{number}", check=False, stdin="x" * 1_000_000).returncode:
                break
        assert "NOSPACE" in lab.etcd.ctl("alarm", "list").stdout
        full = time.monotonic()
        for node in lab.nodes:
            refused_quickly(load, node, full)
            assert "out of space" in node.ask("status")["problem"]
        lab.etcd.ctl("del", "--prefix", "junk/")
        lab.etcd.ctl("compact", str(lab.etcd.revision()))
        lab.etcd.ctl("defrag")
        lab.etcd.ctl("alarm", "disarm")
        clean_again(lab)
