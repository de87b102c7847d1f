"""Addresses first, the container later: order, time, and calls that come twice, late or never. The kernel is a stub."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import cast

import pytest

from ipam.boottime import boottime
from ipam.catalogue import Catalogue
from ipam.errors import InvalidInput, NotAllocated, NotFound
from ipam.holder import Holder
from ipam.keys import Family, IPAddress
from ipam.netgroups import Netgroup
from ipam.networks import NetworkChange, PoolSpec, create_network, set_network
from ipam.records import AddressState, Label, Network
from ipam.store import Store, open_store
from isolator import allocated
from isolator.allocated import Allocated, AllocateSpec, IsolateSpec
from isolator.endpoints import Endpoints
from isolator.engines import NET_MODULES
from isolator.errors import (
    EndpointExists,
    JournalUnwritable,
    KernelRefused,
    NamespaceGone,
    Refused,
    Superseded,
)
from isolator.identity import boot_id
from isolator.journal import Journal
from isolator.kernel import Kernel
from isolator.model import Asked, AttachSpec, EndpointKey
from isolator.neighbours import surroundings
from tests.isolator.test_endpoints import StubKernel

BOOT = boot_id()
_calls = itertools.count(1)


class Processes(StubKernel):
    """Processes that are there by their numbers; each has a namespace of its own unless it is said to share one."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces = {pid: pid for pid in range(100, 200)}

    @contextlib.contextmanager
    def namespace_of(self, pid: int) -> Iterator[str]:
        if pid not in self.namespaces:
            raise NamespaceGone(f"process {pid} has ended")
        yield f"/proc/{pid}/ns/net#{self.namespaces[pid]}"


class Node:
    """An isolator's allocated addresses and endpoints, on a journal and a store of their own."""

    def __init__(self, path: Path, store: Store) -> None:
        self.path, self.store = path, store
        self.kernel = Processes()
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self, unused_for: float = 300.0) -> None:
        self.journal = Journal(self.path / "journal.db", BOOT)
        self.catalogue = Catalogue(self.store, self.journal, lambda: None)
        self.holder = Holder(
            "a", self.store, self.catalogue, self.journal,
            instance="i", boot_id=BOOT, on_conflict=lambda _: None, cooldown=0.05,
            is_live=lambda _, record: record.state is AddressState.ALLOCATED,
        )  # fmt: skip
        self.holder.load()
        await self.holder.sync()
        kernel = cast("Kernel", self.kernel)
        self.endpoints = Endpoints(
            BOOT, kernel, self.journal, self.catalogue, self.holder, lambda _: 1500,
            prepare=self.kernel.prepare,
            around=lambda: surroundings(self.catalogue, self.holder.assigned()),
        )  # fmt: skip
        self.endpoints.load()
        self.allocated = Allocated(
            kernel, self.journal, self.catalogue, self.holder, self.endpoints, lambda: None, unused_for
        )
        works = (self.holder.serve, self.endpoints.reap, self.allocated.run)
        self.tasks = [asyncio.create_task(work()) for work in works]

    async def crash(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.journal.close()

    # -- calls, as they come in

    async def allocate(
        self, uid: str = "u", ipv4: int = 1, ipv6: int = 0, call: str = "", **fields: object
    ) -> list[IPAddress]:
        counts: dict[Family, int] = {4: ipv4, 6: ipv6}
        spec = AllocateSpec(uid, call or f"{next(_calls):032x}", "web", counts)
        return await self.allocated.allocate(replace(spec, **fields))

    def spec(self, *ips: IPAddress, container: str = "c", pid: int = 100) -> IsolateSpec:
        return IsolateSpec(container, f"{next(_calls):032x}", now(), pid, ips)

    async def isolate(self, *ips: IPAddress, container: str = "c", pid: int = 100) -> EndpointKey:
        return (await self.allocated.isolate(self.spec(*ips, container=container, pid=pid))).key

    async def release(self, uid: str = "", *ips: IPAddress) -> None:
        await self.allocated.release(uid, ips, now())

    async def cleanup(self, container: str = "c") -> None:
        await self.allocated.cleanup(container, now())

    # -- looking in

    def state(self, ip: IPAddress) -> str:
        held = self.holder.held(ip)
        return held.state.value if held is not None and held.state is not None else "none"

    async def eventually(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.01)


def now() -> Asked:
    return Asked(BOOT, boottime())


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    monkeypatch.setattr(allocated, "LOOK_EVERY", 0.02)
    store = await open_store(f"sqlite://{tmp_path}/store.db")
    specs = [PoolSpec("10.0.0.0/24"), PoolSpec("fd00::/64")]
    await create_network(store, Network(name="web", pools=[]), specs)
    node = Node(tmp_path, store)
    await node.start()
    yield node
    await node.crash()
    await store.close()


async def test_the_life_of_a_container_in_the_order_of_a_mesos_agent(node: Node) -> None:
    ips = await node.allocate(ipv4=1, ipv6=1)
    assert [node.state(ip) for ip in ips] == ["allocated"] * 2
    assert await node.isolate(*ips) == EndpointKey("c", "eth0")
    assert [node.state(ip) for ip in ips] == ["assigned"] * 2
    await node.release("u")
    assert [node.state(ip) for ip in ips] == ["assigned"] * 2, "the interface is still there"
    await node.cleanup()
    await node.eventually(lambda: not any(node.state(ip) == "assigned" for ip in ips))
    assert node.endpoints.all() == []
    assert node.kernel.there == set()


async def test_a_cleanup_without_a_release_leaks_nothing_and_a_release_after_it_is_done_already(
    node: Node,
) -> None:
    (ip,) = await node.allocate()
    await node.isolate(ip)
    await node.cleanup()
    await node.eventually(lambda: node.state(ip) != "assigned")
    await node.release("u")
    assert node.holder.allocations.of("u") == []


async def test_release_and_cleanup_of_what_nobody_knows_succeed(node: Node) -> None:
    await node.release("nobody")
    await node.release("", ip_address("10.0.0.77"), ip_address("192.0.2.1"), ip_address("fd00::77"))
    await node.cleanup("nobody")
    await node.cleanup("nobody")


async def test_a_release_by_addresses_of_both_families_frees_those_alone(node: Node) -> None:
    ips = await node.allocate(ipv4=2, ipv6=1)
    await node.release("", ips[0], ips[2])
    assert [node.state(ip) for ip in ips] == ["cooling", "allocated", "cooling"]


async def test_an_address_of_another_engines_container_cannot_be_released(node: Node) -> None:
    spec = AttachSpec(EndpointKey("docker", "eth0"), "r", now(), "cni", "web", "/netns")
    endpoint = await node.endpoints.attach(spec)
    with pytest.raises(NotAllocated, match=r"belongs to docker \(eth0\), which cni asked for"):
        await node.release("", endpoint.ips[0])
    await node.cleanup("docker")
    assert node.endpoints.get(endpoint.key) == endpoint, "nor is it this protocol's to clean up"


async def test_a_release_that_is_late_leaves_the_next_one_that_has_the_address_alone(node: Node) -> None:
    (ip,) = await node.allocate("u1")
    called = now()
    await node.release("u1")
    await node.eventually(lambda: node.state(ip) == "warm")
    await node.allocate("u2", ips=(ip,))
    await node.allocated.release("", [ip], called)
    assert node.state(ip) == "allocated"
    await node.release("", ip)
    assert node.state(ip) != "allocated"


async def test_the_same_isolate_again_changes_nothing(node: Node) -> None:
    (ip,) = await node.allocate()
    first = await node.allocated.isolate(node.spec(ip))
    calls = list(node.kernel.calls)
    assert await node.allocated.isolate(node.spec(ip)) == first
    assert node.kernel.calls == calls


async def test_the_same_addresses_in_another_namespace_are_refused(node: Node) -> None:
    (ip,) = await node.allocate()
    await node.isolate(ip)
    with pytest.raises(EndpointExists, match="process 101 is in another"):
        await node.isolate(ip, pid=101)
    with pytest.raises(NotAllocated, match=r"belongs to c \(eth0\)"):
        await node.isolate(ip, container="thief")


async def test_a_container_that_is_isolated_twice_has_two_interfaces_and_one_cleanup(node: Node) -> None:
    (one,) = await node.allocate()
    (two,) = await node.allocate()
    assert [await node.isolate(one), await node.isolate(two)] == [("c", "eth0"), ("c", "eth1")]
    await node.release("u")
    await node.cleanup()
    await node.eventually(lambda: node.endpoints.all() == [])
    assert "assigned" not in {node.state(one), node.state(two)}


async def test_a_process_that_has_ended_gets_nothing_and_its_addresses_stay_allocated(node: Node) -> None:
    (ip,) = await node.allocate()
    with pytest.raises(NamespaceGone):
        await node.isolate(ip, pid=999)
    assert node.state(ip) == "allocated"
    await node.isolate(ip)


async def test_an_isolate_that_the_kernel_refuses_leaves_no_endpoint_and_its_address_cools(
    node: Node,
) -> None:
    (ip,) = await node.allocate()
    node.kernel.fail["connect"] = lambda _: KernelRefused("no")
    with pytest.raises(KernelRefused):
        await node.isolate(ip)
    await node.eventually(lambda: node.endpoints.all() == [])
    assert node.state(ip) in ("cooling", "warm")
    await node.release("u")


async def test_an_isolate_that_comes_after_its_cleanup_is_refused(node: Node) -> None:
    (ip,) = await node.allocate()
    late = node.spec(ip)
    await node.cleanup()
    with pytest.raises(Superseded):
        await node.allocated.isolate(late)
    assert node.state(ip) == "allocated"


async def test_what_is_not_isolated_in_time_is_released(node: Node) -> None:
    used, *unused = await node.allocate(ipv4=3)
    await node.isolate(used)
    await node.crash()
    await node.start(unused_for=0.0)
    await node.eventually(lambda: not any(node.state(ip) == "allocated" for ip in unused))
    assert node.state(used) == "assigned"
    with pytest.raises(NotAllocated, match="not allocated"):
        await node.isolate(unused[0], container="late")


async def test_the_time_goes_on_while_the_agent_is_down(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (ip,) = await node.allocate()
    await node.crash()
    real = time.time
    monkeypatch.setattr("isolator.allocated.time.time", lambda: real() + 299)
    await node.start()
    assert node.state(ip) == "allocated", "a second is left"
    await node.crash()
    monkeypatch.setattr("isolator.allocated.time.time", lambda: real() + 301)
    await node.start()
    await node.eventually(lambda: node.state(ip) != "allocated")


async def test_a_wall_clock_that_is_set_back_gives_nobody_more_than_the_whole_time(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ip,) = await node.allocate()
    await node.crash()
    real = time.time
    monkeypatch.setattr("isolator.allocated.time.time", lambda: real() - 10**6)
    await node.start(unused_for=0.2)
    await node.eventually(lambda: node.state(ip) != "allocated")


async def test_the_same_call_again_gets_the_same_addresses_also_from_the_next_agent(node: Node) -> None:
    ips = await node.allocate(ipv4=2, call="ab" * 16)
    await node.crash()
    await node.start()
    assert await node.allocate(ipv4=2, call="ab" * 16) == ips
    assert len(node.holder.allocations.all()) == 2


async def test_what_was_allocated_before_a_restart_is_isolated_after_it(node: Node) -> None:
    ips = await node.allocate(ipv4=1, ipv6=1)
    await node.crash()
    await node.start()
    await node.isolate(*ips)


async def test_an_allocate_whose_caller_is_gone_is_taken_back_and_so_is_an_isolate(node: Node) -> None:
    (ip,) = await node.allocate(call="cd" * 16)
    await node.allocated.take_back("cd" * 16, now())
    assert node.state(ip) != "allocated"
    (other,) = await node.allocate()
    spec = node.spec(other)
    await node.allocated.isolate(spec)
    await node.allocated.take_back(spec.request_id, spec.asked)
    await node.eventually(lambda: node.endpoints.all() == [])


async def test_what_was_released_ends_with_its_last_process_and_what_was_not_stays(node: Node) -> None:
    (released,) = await node.allocate("u1")
    (kept,) = await node.allocate("u2")
    await node.isolate(released, container="c1")
    await node.isolate(kept, container="c2", pid=101)
    await node.release("u1")
    node.kernel.vacant = set(node.kernel.there)
    await node.eventually(lambda: [e.key.container_id for e in node.endpoints.all()] == ["c2"])
    assert node.state(released) != "assigned"
    assert node.state(kept) == "assigned"


async def test_what_the_network_does_not_allow_is_refused_when_it_is_asked_for(node: Node) -> None:
    await set_network(node.store, "web", NetworkChange(allow_netgroups=("db",), allow_static=()))
    await node.catalogue.refresh()
    with pytest.raises(Refused, match="uid u asks for the netgroup secret"):
        await node.allocate(netgroups=(Netgroup("secret"),))
    with pytest.raises(Refused, match=r"10\.0\.0\.9"):
        await node.allocate(ips=(ip_address("10.0.0.9"),))
    assert node.holder.allocations.all() == []
    (ip,) = await node.allocate(netgroups=(Netgroup("db"),))
    with pytest.raises(Refused, match="secret"):
        await node.allocated.isolate(replace(node.spec(ip), netgroups=(Netgroup("secret"),)))
    assert node.state(ip) == "allocated"
    endpoint = await node.allocated.isolate(node.spec(ip))
    assert endpoint.netgroups == ("db",), "those it was allocated with, where isolate names none"


async def test_an_allocated_address_needs_no_second_permission(node: Node) -> None:
    ip = ip_address("10.0.0.9")
    await node.allocate(ips=(ip,))
    await set_network(node.store, "web", NetworkChange(allow_static=()))
    await node.catalogue.refresh()
    await node.isolate(ip)


async def test_a_network_that_the_addresses_are_not_of_is_refused(node: Node) -> None:
    (ip,) = await node.allocate()
    with pytest.raises(InvalidInput, match="allocated in network web, and the call is for network other"):
        await node.allocated.isolate(replace(node.spec(ip), network="other"))
    with pytest.raises(NotFound, match="nowhere"):
        await node.allocate(network="nowhere")


async def test_labels_of_allocate_are_told_to_who_isolates(node: Node) -> None:
    (ip,) = await node.allocate(labels=(Label("role", "db"),))
    assert node.allocated.promised([ip]) == (Label("role", "db"),)
    assert node.allocated.promised([ip_address("10.0.0.99")]) == ()


async def test_a_full_disk_allocates_nothing_and_hinders_no_release(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ip,) = await node.allocate("u1")

    def full(_: object) -> None:
        raise JournalUnwritable("the disk is full")

    monkeypatch.setattr(node.journal, "save_addresses", full)
    with pytest.raises(JournalUnwritable):
        await node.allocate("u2")
    await node.release("u1")
    assert node.state(ip) != "allocated"
    assert node.holder.allocations.all() == []


async def test_endpoints_of_allocated_addresses_say_which_engine_they_are_of(node: Node) -> None:
    (ip,) = await node.allocate()
    endpoint = await node.allocated.isolate(node.spec(ip))
    held = node.holder.held(ip)
    assert held is not None
    assert held.record is not None
    assert (endpoint.engine, held.record.engine) == (NET_MODULES, NET_MODULES)
