"""etcd is there, and far away."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from moorage.lab import DelayingProxy, Lab, LabNode
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

BURST = 30
"""Containers at once; 8 addresses are warm."""


def test_a_burst_on_a_node_whose_etcd_takes_200_ms_a_round_trip_is_served_and_written() -> None:
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(nodes=0))
        switch, etcd = lab.switch, lab.etcd
        proxy = stack.enter_context(DelayingProxy(switch, 150, etcd.addresses[0]))
        node = stack.enter_context(LabNode("far", store=f"etcd://{proxy.address}", switch=switch))
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/24", "--no-nat")
        proxy.delay(round_trip=0.2)
        made = [stack.enter_context(node.container()) for _ in range(BURST)]
        with ThreadPoolExecutor(BURST) as pool:
            answers = list(pool.map(lambda container: container.add("web"), made))
        assert [answer.stdout for answer in answers if answer.exit] == []
        assert len({answer.ips[4] for answer in answers}) == BURST
        eventually(lambda: node.ask("status")["outbox"] == 0)
        assert node.cli("ip", "check").returncode == 0
        assert all(container.delete("web").exit == 0 for container in made)
