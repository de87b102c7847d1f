"""Containers that need an address from etcd while it has no leader, or is not there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ipam.refill import REFILL_PATIENCE
from moorage.lab import Answer, Container, Lab, LabNode
from tests.cluster.conftest import QUICKLY
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

AT_ONCE = 4
"""Containers started on each node at a time."""

ADD_WITHIN = REFILL_PATIENCE + 20.0
"""Seconds an ADD may take on a machine under load."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Two nodes with a network of which nothing is kept warm: every ADD waits for etcd."""
    with Lab(nodes=2, etcd=3) as lab:
        lab.start()
        lab.nodes[0].cli("network", "create", "cold", "--pool", "10.64.0.0/22", "--warm", "0", "--no-nat")
        yield lab


def started(nodes: Sequence[LabNode], **asked: object) -> list[tuple[Answer, float]]:
    """Containers started at once on every node, and ended again: how they were answered, and in how many seconds."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(AT_ONCE * len(nodes)) as pool:
        made = [stack.enter_context(node.container()) for node in nodes for _ in range(AT_ONCE)]

        def add(container: Container) -> tuple[Answer, float]:
            begun = time.monotonic()
            return container.add("cold", **asked), time.monotonic() - begun

        answers = list(pool.map(add, made))
        for container in made:
            assert container.delete("cold").exit == 0
    return answers


def all_have_addresses(answers: Sequence[tuple[Answer, float]]) -> bool:
    return len({answer.ips.get(4) for answer, _ in answers} - {None}) == len(answers)


@pytest.mark.parametrize("how", ["kill", "pause"])
def test_no_add_is_refused_while_a_new_leader_is_elected(lab: Lab, how: str) -> None:
    assert all_have_addresses(started(lab.nodes))
    for last in (
        False,
        False,
        True,
    ):  # an election may take longer than the grace on a busy machine: not each time
        leader = lab.etcd.leader()
        getattr(leader, how)()
        try:
            answers = started(lab.nodes)
            assert max(took for _, took in answers) < ADD_WITHIN
        finally:
            leader.resume() if how == "pause" else leader.start(lab.etcd.initial_cluster)
        if all_have_addresses(answers):
            break
        assert not last, [answer.stdout for answer, _ in answers if answer.exit]
        lab.etcd.wait_ready()


def is_well(status: dict[str, Any]) -> bool:
    """No agent that was out of touch for ten seconds while all servers began anew takes anything for some time."""
    return status["problem"] == "" and status["grace"]["seconds"] == 0


def test_while_etcd_is_down_the_first_wait_in_vain_and_the_others_are_refused_at_once(lab: Lab) -> None:
    assert all_have_addresses(started(lab.nodes))
    lab.etcd.kill()
    for answer, took in started(lab.nodes):
        assert answer.json["code"] == 11
        assert took < ADD_WITHIN
    for answer, took in started(lab.nodes):
        assert answer.json["code"] == 11
        assert "the store does not answer" in answer.json["msg"]
        assert took < QUICKLY
    assert {node.container().status("cold").json["code"] for node in lab.nodes} == {50}
    lab.etcd.start()
    lab.etcd.wait_ready()
    eventually(lambda: all(is_well(node.ask("status")) for node in lab.nodes))
    assert [node.container().status("cold").exit for node in lab.nodes] == [0, 0]
    assert all_have_addresses(started(lab.nodes))
