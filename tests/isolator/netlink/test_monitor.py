"""Noticing that links vanish, and what else changes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_network

import pytest

from isolator.netlink import messages
from isolator.netlink.inventory import link_by_name
from isolator.netlink.monitor import ChangeMonitor, LinkMonitor
from isolator.netlink.socket import NetlinkSocket
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import Room
from tests.patience import PATIENCE

pytestmark = pytest.mark.kernel


class Seen:
    """What a monitor called back with."""

    def __init__(self) -> None:
        self.vanished: set[str] = set()
        self.resyncs = 0

    def on_vanished(self, names: frozenset[str]) -> None:
        self.vanished |= names

    def on_resync(self) -> None:
        self.resyncs += 1

    async def until(self, *names: str) -> None:
        """Wait until exactly these names vanished."""
        async with asyncio.timeout(PATIENCE):
            while not self.vanished >= set(names):
                await asyncio.sleep(0.01)
        assert self.vanished == set(names)


@contextlib.asynccontextmanager
async def running(monitor: LinkMonitor | ChangeMonitor) -> AsyncIterator[None]:
    task = asyncio.create_task(monitor.run())
    await asyncio.sleep(0)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_vanished_endpoint_links_are_told_and_no_others(container: Room) -> None:
    seen = Seen()
    monitor = container.do(LinkMonitor, seen.on_vanished, seen.on_resync)
    async with running(monitor):
        container.sh(
            "for name in mrga mrgb other; do ip link add $name type veth peer name peer-$name; done\n"
            "ip link set mrga up; ip link set mrga mtu 1400; ip link del other; ip link del mrga; ip link del mrgb"
        )
        await seen.until("mrga", "mrgb")
    assert seen.resyncs == 0


async def test_a_link_of_ours_that_is_renamed_is_told_by_the_name_it_had(container: Room) -> None:
    seen = Seen()
    monitor = container.do(LinkMonitor, seen.on_vanished, seen.on_resync)
    async with running(monitor):
        for name in ("mrga", "mrgb"):
            container.sh(
                f"ip link add {name} type veth peer name {name}1; ip link set {name} alias 'moorage {name}'"
            )
        container.sh("ip link set mrga name lan0; ip link set mrgb mtu 1400")
        await seen.until("mrga")


async def test_a_dying_namespace_takes_its_link_and_is_noticed(
    container: Room, make_container: MakeRoom
) -> None:
    seen = Seen()
    monitor = container.do(LinkMonitor, seen.on_vanished, seen.on_resync)
    dying = make_container()
    container.sh(f"ip link add mrga type veth peer name eth0 netns {dying.name}")
    async with running(monitor):
        dying.__exit__(None, None, None)
        await seen.until("mrga")


async def test_leaving_a_bridge_is_not_vanishing(container: Room) -> None:
    seen = Seen()
    monitor = container.do(LinkMonitor, seen.on_vanished, seen.on_resync)
    async with running(monitor):
        container.sh(
            "ip link add br0 type bridge; ip link add mrga type veth peer name peer; ip link set mrga master br0\n"
            "ip link set mrga nomaster; ip link add mrgb type veth peer name peer2; ip link del mrgb"
        )
        await seen.until("mrgb")


async def test_lost_events_ask_for_a_resync(container: Room) -> None:
    seen = Seen()
    monitor = container.do(LinkMonitor, seen.on_vanished, seen.on_resync)
    monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    container.sh("for i in $(seq 20); do ip link add mrg$i type veth peer name p$i; ip link del mrg$i; done")
    async with running(monitor):
        async with asyncio.timeout(PATIENCE):
            while not seen.resyncs:
                await asyncio.sleep(0.01)


class Changes:
    """How often a ChangeMonitor called back since it was asked last."""

    def __init__(self) -> None:
        self.count = 0

    def on_change(self) -> None:
        self.count += 1

    async def told(self, within: float = PATIENCE) -> bool:
        """Whether it did."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while not self.count:
                    await asyncio.sleep(0.01)
        told, self.count = self.count > 0, 0
        return told


PREPARED = (
    "ip link add up0 type veth peer name p0; ip link set p0 up; ip link set up0 up; "
    "ip address add 192.0.2.1/24 dev up0; ip address add 2001:db8::1/64 dev up0 nodad; "
    "ip link add mrgabc index 600000000 type veth peer name p1; ip link set mrgabc up; ip link set p1 up; "
    "ip route add 10.64.2.0/26 via 192.0.2.2 proto 157 metric 2048; "
    "ip -6 route add fd64::200/122 via 2001:db8::2 proto 157 metric 2048"
)


@contextlib.asynccontextmanager
async def changes(room: Room) -> AsyncIterator[Changes]:
    room.sh(PREPARED)
    seen = Changes()
    monitor = room.do(ChangeMonitor, seen.on_change)
    async with running(monitor):
        while await seen.told(within=0.3):
            pass  # carriers, and what the kernel does in the background
        yield seen


@pytest.mark.parametrize(
    "what",
    [
        "ip link set up0 mtu 1400",
        "ip link set up0 down",
        "ip link add other type bridge",
        "ip link delete up0",
        "ip address add 192.0.2.9/24 dev up0",
        "ip address delete 192.0.2.1/24 dev up0",
        "ip address add 2001:db8::9/64 dev up0",
        "ip route add default via 192.0.2.2",
        "ip -6 route add default via 2001:db8::2 dev up0",
        "ip route delete 10.64.2.0/26 proto 157",
        "ip -6 route delete fd64::200/122 proto 157",
    ],
)
async def test_what_underlay_and_fabric_rest_on_is_told(container: Room, what: str) -> None:
    async with changes(container) as seen:
        container.sh(what)
        assert await seen.told()


@pytest.mark.parametrize(
    "what",
    [
        "ip link set mrgabc mtu 1400; ip link set mrgabc address ee:ee:ee:ee:ee:ee",
        "ip address add 10.0.0.9/32 dev mrgabc",
        "ip route add 10.64.1.7 dev mrgabc proto 157; ip route delete 10.64.1.7 dev mrgabc proto 157",
        "ip -6 route add fd64::107 dev mrgabc proto 157; ip -6 route delete fd64::107 dev mrgabc proto 157",
        "ip route add 10.64.3.0/26 via 192.0.2.2 proto 157 metric 2048",
        "ip route add 203.0.113.0/24 via 192.0.2.2; ip route delete 203.0.113.0/24",
        "ip route add default via 192.0.2.2 table 4711",
        "ip neigh add 192.0.2.7 lladdr 02:00:00:00:00:07 dev up0",
    ],
)
async def test_what_comes_and_goes_with_endpoints_is_not(container: Room, what: str) -> None:
    async with changes(container) as seen:
        container.sh(what)
        assert not await seen.told(within=0.2)


async def test_lost_events_count_as_a_change(container: Room) -> None:
    container.sh(PREPARED)
    seen = Changes()
    monitor = container.do(ChangeMonitor, seen.on_change)
    monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    container.sh("for i in $(seq 40); do ip route add 203.0.113.$i via 192.0.2.2; done")
    async with running(monitor):
        assert await seen.told()


async def test_the_fabrics_own_changes_are_not_told_and_others_are(container: Room) -> None:
    container.sh("ip link add d0 type veth peer name d1; ip link set d0 up; ip link set d1 up")
    ours, other = container.do(NetlinkSocket), container.do(NetlinkSocket)
    told = asyncio.Event()
    monitor = container.do(ChangeMonitor, told.set, ours.port)
    link = link_by_name(ours, "d0")
    assert link is not None
    destination = ip_network("10.9.0.0/26")
    add = messages.add_fabric_route(
        destination, ip_address("fe80::1"), index=link.index, onlink=True, source=None
    )
    delete = messages.delete_fabric_route(destination)
    async with running(monitor):
        await asyncio.sleep(0.2)  # the new links have settled
        told.clear()
        ours.execute([add, delete])
        await asyncio.sleep(0.2)
        assert not told.is_set()
        other.execute([add, delete])
        await asyncio.wait_for(told.wait(), PATIENCE)
    ours.close()
    other.close()


async def test_what_is_called_back_and_fails_is_raised_and_not_called_for_ever(container: Room) -> None:
    def refuse(_: frozenset[str]) -> None:
        raise RuntimeError("no")

    monitor = container.do(LinkMonitor, refuse, lambda: None)
    container.sh("ip link add mrga type veth peer name p1; ip link del mrga")
    with pytest.raises(RuntimeError, match="no"):
        await asyncio.wait_for(monitor.run(), PATIENCE)
