"""The connection table's watch: what it says, and whom it stops."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from ipam.keys import IPAddress
from isolator.connections import Connections
from isolator.endpoints import Endpoints
from isolator.kernel import Kernel
from isolator.model import EndpointKey
from isolator.tracking import Table

A, B, WORLD = (ip_address(ip) for ip in ("10.0.0.5", "10.0.0.6", "192.0.2.2"))


@dataclass
class StubKernel:
    """A connection table as the test likes it; a real one is in tests/isolator/policy/test_limits.py."""

    table: Table = field(default_factory=lambda: Table(0, 1000))
    counted: Counter[IPAddress] = field(default_factory=Counter)
    halted: list[str] = field(default_factory=list)
    dumps: int = 0

    async def connection_table(self) -> Table:
        return self.table

    async def connection_sources(self) -> Counter[IPAddress]:
        self.dumps += 1
        return self.counted

    async def connection_limits(self) -> dict[str, int]:
        return {"mrga": 50, "mrgb": 50}

    async def halt(self, names: list[str]) -> None:
        self.halted = names


@dataclass
class StubEndpoint:
    host_ifname: str
    ips: tuple[IPAddress, ...]
    key: EndpointKey


class StubEndpoints:
    def __init__(self) -> None:
        self.everyone = [
            StubEndpoint("mrga", (A,), EndpointKey("a", "eth0")),
            StubEndpoint("mrgb", (B,), EndpointKey("b", "eth0")),
        ]

    def all(self) -> list[StubEndpoint]:
        return self.everyone

    def of_ip(self, ip: IPAddress) -> StubEndpoint | None:
        return next((one for one in self.everyone if ip in one.ips), None)


@pytest.fixture
def kernel() -> StubKernel:
    return StubKernel(counted=Counter({A: 700, WORLD: 200, B: 10}))


@pytest.fixture
def sizes() -> list[str]:
    return []


@pytest.fixture
def connections(kernel: StubKernel, sizes: list[str]) -> Connections:
    return Connections(
        cast("Kernel", kernel), cast("Endpoints", StubEndpoints()), lambda: sizes.append("told")
    )


def warnings(entries: list[Any]) -> list[str]:
    return [entry["event"] for entry in entries if entry["log_level"] == "warning"]


async def test_a_table_with_room_is_not_counted(connections: Connections, kernel: StubKernel) -> None:
    kernel.table = Table(499, 1000)
    await connections.look()
    assert (kernel.dumps, kernel.halted) == (0, [])
    assert connections.status() == {"tracked": 499, "most": 1000, "largest": []}


async def test_each_level_is_logged_once_with_who_has_most(
    connections: Connections, kernel: StubKernel
) -> None:
    with capture_logs() as entries:
        for tracked in (790, 800, 940, 950, 960):
            kernel.table = Table(tracked, 1000)
            await connections.look()
    full = [entry for entry in entries if "runs full" in entry["event"]]
    assert [entry["tracked"] for entry in full] == [800, 950]
    most = [entry["largest"] for entry in entries if "who began most" in entry["event"]]
    assert most == 2 * [["a/eth0: 700", "192.0.2.2: 200", "b/eth0: 10"]]
    assert connections.status()["largest"][0] == {"ip": "10.0.0.5", "count": 700, "endpoint": "a/eth0"}


async def test_who_has_more_than_its_limit_in_a_table_that_fills_begins_no_more(
    connections: Connections, kernel: StubKernel
) -> None:
    kernel.table = Table(500, 1000)
    await connections.look()
    assert kernel.halted == ["mrga"]
    kernel.counted = Counter({B: 60})
    await connections.look()
    assert kernel.dumps == 1, "it was counted only just now"
    kernel.table = Table(560, 1000)
    await connections.look()
    assert kernel.halted == ["mrgb"]
    kernel.table = Table(400, 1000)
    await connections.look()
    assert kernel.halted == []


async def test_limits_that_are_a_share_of_the_table_follow_its_size(
    connections: Connections, kernel: StubKernel, sizes: list[str]
) -> None:
    await connections.look()
    await connections.look()
    assert sizes == ["told"], "the first look tells, for an agent that started before anything was tracked"
    kernel.table = Table(0, 2000)
    await connections.look()
    assert sizes == ["told", "told"]


async def test_a_node_that_tracks_nothing_is_never_full(connections: Connections, kernel: StubKernel) -> None:
    kernel.table = Table(0, 0)
    await connections.look()
    assert connections.status() == {"tracked": 0, "most": 0, "largest": []}
