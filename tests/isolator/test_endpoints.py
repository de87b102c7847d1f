"""What endpoints make of a kernel, a disk and callers that misbehave; the kernel here is a stub that can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, cast

import pytest

import isolator.conflicts as conflicts_module
import isolator.removal as removal_module
from ipam import keys
from ipam.boottime import boottime
from ipam.catalogue import Catalogue
from ipam.errors import NotFound, TryAgain
from ipam.holder import Holder
from ipam.holdings import Conflict
from ipam.keys import IPAddress, IPNetwork
from ipam.namesakes import Identity, Namesakes
from ipam.netgroups import Netgroup
from ipam.networks import NetworkChange, PoolSpec, create_network, set_network
from ipam.records import Address, AddressState, Alive, Network
from ipam.records import Node as NodeRecord
from ipam.reservations import reserve
from ipam.store import Store, open_store
from ipam.store.base import Delete, Op, Put, Txn
from isolator.conflicts import Conflicts
from isolator.drivers.naming import host_ifname, shaper_ifname
from isolator.endpoints import Endpoints
from isolator.errors import JournalUnwritable, KernelRefused, PortTaken, Refused, Superseded
from isolator.journal import Journal
from isolator.kernel import Kernel
from isolator.missing import Missing, missing
from isolator.model import (
    UNLIMITED,
    Asked,
    AttachSpec,
    Bandwidth,
    Endpoint,
    EndpointKey,
    EndpointState,
    Limit,
    PortMapping,
    ValidAttachments,
)
from isolator.neighbours import surroundings
from isolator.netlink import HostLink
from isolator.recovery import recall
from isolator.written import assembled, for_alias, from_record
from tests.patience import PATIENCE

BOOT = "boot"


@dataclass
class StubKernel:
    """Remembers what it was told, and fails where a test says."""

    there: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    fail: dict[str, Callable[[Endpoint], Exception | None]] = field(default_factory=dict)
    intact: bool = True
    prepared: list[str] = field(default_factory=list)
    limited: set[str] = field(default_factory=set)
    vacant: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)
    taken: str = ""

    def _told(self, what: str, endpoint: Endpoint) -> None:
        self.calls.append(f"{what} {endpoint.key.container_id}")
        error = self.fail.get(what, lambda _: None)(endpoint)
        if error is not None:
            raise error

    def check_namespace(self, path: str) -> None:
        pass

    async def check_ports(self, spec: AttachSpec, families: set[int]) -> None:
        self.calls.append(f"ports of {spec.key.container_id} over {families}")
        await asyncio.sleep(0)
        if self.taken:
            raise PortTaken(self.taken)

    async def connect(self, endpoint: Endpoint, _: object) -> None:
        await asyncio.sleep(0)
        self._told("connect", endpoint)
        self.there.add(endpoint.host_ifname)

    async def disconnect(self, endpoint: Endpoint) -> None:
        await asyncio.sleep(0)
        self._told("disconnect", endpoint)

    async def remove(self, endpoints: list[Endpoint]) -> None:
        await asyncio.sleep(0)
        for endpoint in endpoints:
            self._told("remove", endpoint)
        self.there -= {endpoint.host_ifname for endpoint in endpoints}

    async def readmit(self, endpoint: Endpoint, _: object) -> None:
        self._told("readmit", endpoint)

    async def repair(self, endpoint: Endpoint) -> None:
        self._told("repair", endpoint)

    async def forget_connections(self, ips: Sequence[IPAddress]) -> None:
        self.calls.append("forget")

    async def links(self) -> dict[str, HostLink]:
        await asyncio.sleep(0)
        return {
            name: HostLink(
                name, 7, up=True, mac="", mtu=1500, marked=name if name not in self.foreign else ""
            )
            for name in self.there
        }

    async def is_vacant(self, endpoint: Endpoint) -> bool:
        return endpoint.host_ifname in self.vacant

    async def macs(self) -> dict[str, str]:
        return {}

    async def shapers(self) -> set[str]:
        return {name for name in self.there if name.startswith("mrg-")}

    async def delete_links(self, names: list[str]) -> None:
        self.there -= set(names)

    async def limit_differences(self, endpoints: list[Endpoint]) -> dict[str, list[str]]:
        await asyncio.sleep(0)
        return {e.host_ifname: ["no limit"] for e in endpoints if e.host_ifname not in self.limited}

    async def restore_limits(self, endpoint: Endpoint) -> None:
        await asyncio.sleep(0)
        self._told("limit", endpoint)
        self.limited.add(endpoint.host_ifname)

    async def reroute(self, endpoint: Endpoint, pools: Sequence[IPNetwork]) -> bool:
        await asyncio.sleep(0)
        self._told("reroute", endpoint)
        return endpoint.host_ifname in self.there

    async def prepare(self, network: str) -> None:
        self.prepared.append(network)

    async def wrong_chains(self) -> list[str]:
        return [] if self.intact else ["arriving"]

    async def wrong_sets(self) -> dict[str, set[str]]:
        return {}

    async def restore_policy(self, *_: object, **__: object) -> dict[str, str]:
        self.calls.append("restore")
        self.intact = True
        return {}


@dataclass
class Node:
    endpoints: Endpoints
    kernel: StubKernel
    holder: Holder
    journal: Journal
    store: Store
    catalogue: Catalogue
    conflicts: list[Conflict]

    def spec(self, container: str = "c1", at: int = 1000, request: str = "r1") -> AttachSpec:
        return AttachSpec(EndpointKey(container, "eth0"), request, Asked(BOOT, at), "cni", "web", "/netns")

    async def gone(self, container: str = "c1") -> None:
        async with asyncio.timeout(PATIENCE):
            while self.endpoints.get(EndpointKey(container, "eth0")) is not None:
                await asyncio.sleep(0.01)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    store = await open_store(f"sqlite://{tmp_path}/store.db")
    await create_network(store, Network(name="web", pools=[]), [PoolSpec("10.0.0.0/24")])
    journal = Journal(tmp_path / "journal.db", BOOT)
    catalogue = Catalogue(store, journal, lambda: None)
    conflicts: list[Conflict] = []
    holder = Holder(
        "a", store, catalogue, journal,
        instance="i", boot_id=BOOT, is_live=lambda *_: False, on_conflict=conflicts.append, cooldown=0.05,
    )  # fmt: skip
    await holder.sync()
    kernel = StubKernel()
    endpoints = Endpoints(
        BOOT, cast("Kernel", kernel), journal, catalogue, holder, lambda _: 1500,
        prepare=kernel.prepare, around=lambda: surroundings(catalogue, holder.assigned()),
    )  # fmt: skip
    tasks = [asyncio.create_task(holder.serve()), asyncio.create_task(endpoints.reap())]
    yield Node(endpoints, kernel, holder, journal, store, catalogue, conflicts)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    journal.close()
    await store.close()


async def test_a_flushed_firewall_is_restored_within_the_add_that_meets_it(node: Node) -> None:
    node.kernel.intact = False
    node.kernel.fail["connect"] = lambda _: (
        None if node.kernel.intact else KernelRefused("no such table", errno=2)
    )
    assert (await node.endpoints.attach(node.spec())).state is EndpointState.ATTACHED
    assert node.kernel.calls == ["connect c1", "restore", "connect c1"]


async def test_a_failed_add_leaves_no_endpoint_and_no_assigned_address(node: Node) -> None:
    node.kernel.fail["connect"] = lambda _: KernelRefused("no")
    with pytest.raises(KernelRefused):
        await node.endpoints.attach(node.spec())
    assert node.endpoints.all() == []
    assert node.journal.load_endpoints() == []
    assert node.holder.assigned() == {}


async def test_a_port_of_the_node_that_is_taken_leaves_nothing_behind(node: Node) -> None:
    node.kernel.taken = "sshd"
    with pytest.raises(PortTaken, match="sshd"):
        await node.endpoints.attach(replace(node.spec(), port_mappings=(PortMapping("tcp", 31022, 22),)))
    assert node.kernel.calls == ["ports of c1 over {4}"], "before anything is wired"
    assert node.endpoints.all() == []
    assert node.journal.load_endpoints() == []
    assert node.holder.assigned() == {}


async def test_the_tunnels_port_is_refused(node: Node) -> None:
    await set_network(node.store, "web", NetworkChange(allow_hostports=("4789",)))
    await node.catalogue.refresh()
    with pytest.raises(PortTaken, match="tunnel"):
        await node.endpoints.attach(replace(node.spec(), port_mappings=(PortMapping("udp", 4789, 53),)))
    assert node.endpoints.all() == []


async def test_an_add_without_mappings_does_not_look_at_ports(node: Node) -> None:
    await node.endpoints.attach(node.spec())
    assert node.kernel.calls == ["connect c1"]


@pytest.mark.parametrize("state", [EndpointState.ATTACHED, EndpointState.ATTACHING])
async def test_the_same_add_again_is_not_refused_for_a_port_that_it_has(
    node: Node, state: EndpointState
) -> None:
    spec = replace(node.spec(), port_mappings=(PortMapping("tcp", 31080, 80),))
    first = await node.endpoints.attach(spec)
    node.endpoints.adopt(replace(first, state=state))
    node.kernel.taken = "a process that began to listen since"
    assert await node.endpoints.attach(spec) == first


async def test_of_two_adds_at_once_for_one_port_one_is_refused(node: Node) -> None:
    """Both have looked at the node before either is journalled."""
    ports = (PortMapping("tcp", 31080, 80),)
    specs = [
        replace(node.spec(name, request=name), port_mappings=ports, netns=f"/{name}") for name in ("c1", "c2")
    ]
    ends = await asyncio.gather(*map(node.endpoints.attach, specs), return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["Endpoint", "PortTaken"]
    assert node.kernel.calls[:2] == ["ports of c1 over {4}", "ports of c2 over {4}"]


async def test_an_unknown_network_takes_no_address(node: Node) -> None:
    with pytest.raises(NotFound, match="web"):
        await node.endpoints.attach(replace(node.spec(), network="wbe"))
    assert node.holder.assigned() == {}


async def test_what_the_network_does_not_allow_takes_no_address_until_it_does(node: Node) -> None:
    await set_network(node.store, "web", NetworkChange(allow_netgroups=()))
    await node.catalogue.refresh()
    spec = replace(node.spec(), netgroups=(Netgroup("db"),))
    with pytest.raises(Refused, match="--allow-netgroup db"):
        await node.endpoints.attach(spec)
    assert node.holder.assigned() == {}
    assert node.kernel.calls == []
    await set_network(node.store, "web", NetworkChange(allow_netgroups=("db",)))
    await node.catalogue.refresh()
    assert (await node.endpoints.attach(spec)).netgroups == ("db",)


async def test_a_limit_set_live_holds_for_who_is_attached_from_then_on(node: Node) -> None:
    before = await node.endpoints.attach(node.spec("c1"))
    await set_network(node.store, "web", NetworkChange(max_bandwidth=10**6))
    await node.catalogue.refresh()
    after = await node.endpoints.attach(node.spec("c2", request="r2"))
    assert before.bandwidth == UNLIMITED
    assert after.bandwidth == Bandwidth(Limit(10**6), Limit(10**6))
    again = await node.endpoints.attach(replace(node.spec("c1"), bandwidth=Bandwidth(Limit(10**9))))
    assert again == before, "the same request gets the same answer"


async def test_a_reservation_made_a_moment_ago_is_a_permission_for_its_address(node: Node) -> None:
    await set_network(node.store, "web", NetworkChange(allow_static=()))
    await node.catalogue.refresh()
    ip = ip_address("10.0.0.9")
    with pytest.raises(Refused, match="--allow-static"):
        await node.endpoints.attach(replace(node.spec(), ips=(ip,)))
    await reserve(node.store, ip, key="k")
    asked = replace(node.spec(), ips=(ip,), reservation="k")
    assert (await node.endpoints.attach(asked)).ips == (ip,)


async def test_a_limit_that_is_missing_is_restored_whatever_becomes_of_others(node: Node) -> None:
    for name in ("bad", "good", "unlimited"):
        limits = UNLIMITED if name == "unlimited" else Bandwidth(Limit(10**6))
        await node.endpoints.attach(replace(node.spec(name), bandwidth=limits))
    node.kernel.fail["limit"] = lambda e: KernelRefused("no") if e.key.container_id == "bad" else None
    await node.endpoints.restore_limits()
    await node.endpoints.restore_limits()
    assert [call for call in node.kernel.calls if call.startswith("limit")] == [
        "limit bad",
        "limit good",
        "limit bad",
    ]


async def test_a_limit_of_an_endpoint_that_ends_meanwhile_is_not_made_anew(node: Node) -> None:
    await node.endpoints.attach(replace(node.spec(), bandwidth=Bandwidth(Limit(10**6))))
    healing = asyncio.create_task(node.endpoints.restore_limits())
    await asyncio.sleep(0)
    await node.endpoints.detach(EndpointKey("c1", "eth0"), Asked(BOOT, 2000))
    await healing
    assert "limit c1" not in node.kernel.calls


async def test_a_del_of_an_unknown_endpoint_removes_the_limit_that_is_left_of_it(node: Node) -> None:
    shaper = shaper_ifname(host_ifname(EndpointKey("c1", "eth0")))
    node.kernel.there.add(shaper)
    await node.endpoints.detach(EndpointKey("c1", "eth0"), Asked(BOOT, 2000))
    assert node.kernel.there == set()


async def test_an_endpoint_that_the_kernel_will_not_remove_does_not_hold_up_others(node: Node) -> None:
    node.kernel.fail["remove"] = lambda e: OSError("stale") if e.key.container_id == "bad" else None
    for name in ("bad", "good"):
        await node.endpoints.attach(node.spec(name))
    for name in ("bad", "good"):
        await node.endpoints.detach(EndpointKey(name, "eth0"), Asked(BOOT, 2000))
    await node.gone("good")
    assert [e.key.container_id for e in node.endpoints.all()] == ["bad"]
    node.kernel.fail.clear()
    await node.gone("bad")


@pytest.mark.parametrize("error", [OSError("no buffer space"), KernelRefused("no"), ZeroDivisionError()])
async def test_a_del_goes_on_whatever_cutting_off_raises(node: Node, error: Exception) -> None:
    await node.endpoints.attach(node.spec())
    node.kernel.fail["disconnect"] = lambda _: error
    await node.endpoints.detach(EndpointKey("c1", "eth0"), Asked(BOOT, 2000))
    await node.gone()
    assert node.holder.assigned() == {}


async def test_an_add_asked_for_before_the_newest_del_is_refused_whatever_dels_come_later(node: Node) -> None:
    key = EndpointKey("c1", "eth0")
    await node.endpoints.detach(key, Asked(BOOT, 2**62))
    await node.endpoints.detach(key, Asked(BOOT, 5))
    with pytest.raises(Superseded):
        await node.endpoints.attach(node.spec(at=2**62 - 1))


async def test_a_del_asked_for_before_the_add_leaves_it_alone(node: Node) -> None:
    await node.endpoints.attach(node.spec(at=1000))
    await node.endpoints.detach(EndpointKey("c1", "eth0"), Asked(BOOT, 999))
    await node.endpoints.detach(EndpointKey("c1", "eth0"), Asked("another boot", 5000))
    assert [e.state for e in node.endpoints.all()] == [EndpointState.ATTACHED]


async def test_an_unfinished_add_is_not_undone_once_it_is_finished(node: Node) -> None:
    attaching = asyncio.create_task(node.endpoints.attach(node.spec()))
    await asyncio.sleep(0)
    await node.endpoints.undo_unfinished(EndpointKey("c1", "eth0"), "r1")
    assert (await attaching).state is EndpointState.ATTACHED
    assert [e.state for e in node.endpoints.all()] == [EndpointState.ATTACHED]


async def test_what_is_there_is_not_ended_by_who_only_wants_what_is_gone(node: Node) -> None:
    endpoint = await node.endpoints.attach(node.spec())
    assert not await node.endpoints.end(endpoint.key, only_if_gone=True)
    node.kernel.there.clear()
    assert await node.endpoints.end(endpoint.key, only_if_gone=True)
    assert node.endpoints.all() == []


async def test_what_no_process_is_left_on_is_gone_for_an_engine_whose_processes_come_first(
    node: Node,
) -> None:
    mesos = await node.endpoints.attach(replace(node.spec(), engine="mesos"))
    node.kernel.vacant.add(mesos.host_ifname)
    assert await node.endpoints.end(mesos.key, only_if_gone=True)
    cni = await node.endpoints.attach(node.spec("later", at=boottime()))
    node.kernel.vacant.add(cni.host_ifname)
    assert not await node.endpoints.end(cni.key, only_if_gone=True)


def valid(*containers: str, at: int | None = None, **changes: Any) -> ValidAttachments:
    """What a CNI runtime has on its network ``pods``; asked for now, unless it is said when."""
    keys = frozenset(EndpointKey(name, "eth0") for name in containers)
    listed = ValidAttachments("cni", "pods", keys, Asked(BOOT, at or boottime()))
    return replace(listed, **changes)


async def pods(node: Node, *containers: str) -> list[Endpoint]:
    return [
        await node.endpoints.attach(replace(node.spec(name, request=name), engine_network="pods"))
        for name in containers
    ]


def ids(node: Node) -> list[str]:
    return sorted(endpoint.key.container_id for endpoint in node.endpoints.all())


async def test_garbage_is_what_the_engine_does_not_list(node: Node) -> None:
    await pods(node, "kept", "left", "over")
    await node.endpoints.collect_garbage(valid("kept", "of an earlier boot"))
    assert ids(node) == ["kept"]
    assert len(node.holder.assigned()) == 1
    await node.endpoints.collect_garbage(valid())
    assert ids(node) == []


async def test_garbage_is_of_one_engine_and_of_the_network_as_that_calls_it(node: Node) -> None:
    for name, engine, called in (
        ("other engine", "mesos", "pods"),
        ("other name", "cni", "web"),
        ("unknown name", "cni", ""),
        ("left", "cni", "pods"),
    ):
        spec = replace(node.spec(name), engine=engine, engine_network=called)
        await node.endpoints.attach(spec)
    await node.endpoints.collect_garbage(valid(asked=Asked("another boot", boottime())))
    assert len(ids(node)) == 4
    await node.endpoints.collect_garbage(valid())
    assert ids(node) == ["other engine", "other name", "unknown name"]


async def test_who_was_attached_after_the_engine_was_asked_is_no_garbage(node: Node) -> None:
    before = boottime()
    await pods(node, "young")
    await node.endpoints.collect_garbage(valid(at=before))
    assert ids(node) == ["young"], "although its ADD was asked for earlier"
    await node.endpoints.collect_garbage(valid())
    assert ids(node) == []


async def test_an_add_under_way_is_no_garbage(node: Node) -> None:
    adding = asyncio.create_task(pods(node, "young"))
    while not node.endpoints.all():
        await asyncio.sleep(0)
    await node.endpoints.collect_garbage(valid())
    [endpoint] = await adding
    assert endpoint.state is EndpointState.ATTACHED
    assert ids(node) == ["young"]


async def test_a_newer_endpoint_of_the_same_name_outlives_the_garbage(node: Node) -> None:
    [old] = await pods(node, "c1")
    collecting = asyncio.create_task(node.endpoints.collect_garbage(valid()))
    await node.endpoints.detach(old.key, Asked(BOOT, 2000))
    new = await node.endpoints.attach(replace(node.spec(request="again", at=3000), engine_network="pods"))
    await collecting
    assert node.endpoints.all() == [new]


async def test_all_garbage_that_is_left_is_named_and_the_rest_is_gone(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal_module, "END_PATIENCE", 0.3)
    await pods(node, "bad", "good", "worse", "kept")
    stuck = ("bad", "worse")
    node.kernel.fail["remove"] = lambda e: OSError("stale") if e.key.container_id in stuck else None
    with pytest.raises(TryAgain, match="2 of 3 endpoints") as left:
        await node.endpoints.collect_garbage(valid("kept"))
    assert all(f"{name}/eth0" in str(left.value) for name in stuck)
    assert ids(node) == ["bad", "kept", "worse"]
    node.kernel.fail.clear()
    for name in stuck:
        await node.gone(name)
    await node.endpoints.collect_garbage(valid("kept"))


def conflict(endpoint: Endpoint) -> Conflict:
    other = Address(
        pool="10.0.0.0-24", state=AddressState.ASSIGNED, node="b", container_id="x", network="web"
    )
    return Conflict(endpoint.ips[0], other)


async def test_a_conflict_is_cut_off_even_if_the_journal_cannot_say_so(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = await node.endpoints.attach(node.spec())

    def full(_: Endpoint) -> None:
        raise JournalUnwritable("disk full")

    monkeypatch.setattr(node.journal, "save_endpoint", full)
    assert await node.endpoints.cut_off(conflict(endpoint))
    assert node.kernel.calls[-1] == "disconnect c1"
    assert [e.state for e in node.endpoints.all()] == [EndpointState.CONFLICT]


async def test_a_conflict_that_could_not_be_cut_off_is_tried_again(node: Node) -> None:
    endpoint = await node.endpoints.attach(node.spec())
    node.kernel.fail["disconnect"] = lambda _: KernelRefused("busy")
    assert not await node.endpoints.cut_off(conflict(endpoint))
    node.kernel.fail.clear()
    assert await node.endpoints.cut_off(conflict(endpoint))


async def test_an_endpoint_in_conflict_is_collected_when_its_namespace_is_gone(node: Node) -> None:
    endpoint = await node.endpoints.attach(node.spec())
    await node.endpoints.cut_off(conflict(endpoint))
    node.kernel.there.clear()
    await node.endpoints.collect()
    await node.gone()


async def test_a_link_that_took_the_name_of_one_that_vanished_is_not_the_endpoints(node: Node) -> None:
    endpoint = await node.endpoints.attach(node.spec())
    name = endpoint.host_ifname
    await node.endpoints.collect([name])
    assert states(node) == ["attached"], "it was renamed, and named back"
    node.kernel.foreign.add(name)
    await node.endpoints.collect()
    assert states(node) == ["attached"], "nobody told that it vanished, and somebody may have taken its alias"
    await node.endpoints.collect([name])
    await node.gone()


async def test_an_endpoint_that_was_cut_off_is_connected_again_in_the_order_of_an_add(node: Node) -> None:
    endpoint = await node.endpoints.attach(node.spec())
    await node.endpoints.cut_off(conflict(endpoint))
    node.kernel.calls.clear()
    (cut,) = node.endpoints.all()
    assert await node.endpoints.reconnect(cut)
    assert node.kernel.calls == ["forget", "readmit c1", "repair c1"]
    assert [e.state for e in (*node.endpoints.all(), *node.journal.load_endpoints())] == ["attached"] * 2


async def test_what_the_kernel_refuses_to_connect_again_stays_cut_off(node: Node) -> None:
    endpoint = await node.endpoints.attach(node.spec())
    await node.endpoints.cut_off(conflict(endpoint))
    node.kernel.fail["repair"] = lambda _: KernelRefused("busy")
    (cut,) = node.endpoints.all()
    with pytest.raises(KernelRefused):
        await node.endpoints.reconnect(cut)
    assert node.endpoints.all() == node.journal.load_endpoints() == [cut]


async def test_netgroups_that_the_kernel_refuses_are_those_from_before(node: Node) -> None:
    await set_network(node.store, "web", NetworkChange(allow_netgroups=("db",)))
    await node.catalogue.refresh()
    endpoint = await node.endpoints.attach(node.spec())
    node.kernel.fail["readmit"] = lambda e: KernelRefused("busy") if "db" in e.netgroups else None
    with pytest.raises(KernelRefused):
        await node.endpoints.set_netgroups(endpoint.key, [Netgroup("db")])
    assert node.endpoints.all() == node.journal.load_endpoints() == [endpoint]
    (held,) = node.holder.assigned().values()
    assert held.record is not None
    assert held.record.netgroups == ["web"]
    assert node.kernel.calls[-2:] == ["readmit c1"] * 2, "it may have taken effect in part"


# -- whose an address is that the store gave to somebody else

HERE = NodeRecord(name="b", version="1", machine_id="m")
"""This machine, as it was called before."""
ELSEWHERE = NodeRecord(name="b", version="1", machine_id="other", state_id="other")


@pytest.fixture
async def judge(node: Node, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Conflicts]:
    """Judges and brings back what the node's syncs find."""
    monkeypatch.setattr(conflicts_module, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(conflicts_module, "RETRY", 0.02)
    me = Namesakes(node.store, "a", Identity(machine_id="m", state_id="s"))
    made = Conflicts(node.store, node.journal, node.catalogue, node.holder, node.endpoints, me, "a")
    tasks = [asyncio.create_task(made.run()), asyncio.create_task(made.bring_back())]
    yield made
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def written(node: Node, *operations: Op) -> None:
    assert (await node.store.txn(Txn((), operations))).succeeded


async def given_away(node: Node, judge: Conflicts, *operations: Op, **changes: Any) -> IPAddress:
    """The address of an endpoint here, which node ``b`` has in the store by now; operations: what else is there."""
    (ip,) = (await node.endpoints.attach(node.spec())).ips
    await node.holder.confirmed([ip])
    kv = await node.store.get(keys.address_key(ip))
    assert kv is not None
    record = Address.decode(kv.key, kv.value).with_(node="b", **changes)
    await written(node, Put(kv.key, record.encode()), *operations)
    await node.holder.sync()
    (found,) = node.conflicts
    judge.note(found)
    return ip


async def state_is(node: Node, state: EndpointState, holder: str, ip: IPAddress) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            kv = await node.store.get(keys.address_key(ip))
            stored = Address.decode(kv.key, kv.value).node if kv is not None else ""
            if [e.state for e in node.endpoints.all()] == [state] and stored == holder:
                return
            await asyncio.sleep(0.01)


def registered(record: NodeRecord) -> Put:
    return Put(keys.NODES + record.name, record.encode())


async def test_a_conflict_with_itself_under_an_earlier_name_cuts_nothing(
    node: Node, judge: Conflicts
) -> None:
    ip = await given_away(node, judge, registered(HERE))
    await state_is(node, EndpointState.ATTACHED, "a", ip)
    assert "disconnect c1" not in node.kernel.calls
    assert ip in node.holder.assigned()


@pytest.mark.parametrize(
    ("record", "container"), [(ELSEWHERE, "c1"), (HERE, "c2")], ids=["another machine", "another container"]
)
async def test_a_conflict_with_anybody_else_is_cut_off(
    node: Node, judge: Conflicts, record: NodeRecord, container: str
) -> None:
    ip = await given_away(node, judge, registered(record), container_id=container)
    await state_is(node, EndpointState.CONFLICT, "b", ip)
    assert "disconnect c1" in node.kernel.calls


async def test_nothing_is_cut_while_the_earlier_names_sign_of_life_may_be_left_over(
    node: Node, judge: Conflicts
) -> None:
    alive = Alive(instance="before", boot_id=BOOT)
    ip = await given_away(node, judge, registered(HERE), Put(keys.ALIVE + "b", alive.encode()))
    await asyncio.sleep(0.2)
    assert [e.state for e in node.endpoints.all()] == ["attached"]
    await written(node, Delete(keys.ALIVE + "b"))
    await state_is(node, EndpointState.ATTACHED, "a", ip)
    assert "disconnect c1" not in node.kernel.calls


async def test_an_address_that_the_other_container_gave_up_connects_the_endpoint_again(
    node: Node, judge: Conflicts
) -> None:
    ip = await given_away(node, judge, registered(ELSEWHERE), container_id="c2")
    await state_is(node, EndpointState.CONFLICT, "b", ip)
    async with asyncio.timeout(PATIENCE):
        while "container c2" not in "".join(judge.problems()):
            await asyncio.sleep(0.01)
    await written(node, Delete(keys.address_key(ip)))
    await state_is(node, EndpointState.ATTACHED, "a", ip)
    assert judge.problems() == []


class Held:
    """What a call found, held back until ``go``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, whose: object, name: str) -> None:
        self.found, self.go = asyncio.Event(), asyncio.Event()
        real = getattr(whose, name)

        async def slow(*arguments: Any) -> Any:
            answer = await real(*arguments)
            self.found.set()
            await self.go.wait()
            return answer

        monkeypatch.setattr(whose, name, slow)


async def ended_meanwhile(node: Node, held: Held, ip: IPAddress) -> None:
    """A DEL comes between what was found and what is made of it."""
    await asyncio.wait_for(held.found.wait(), PATIENCE)
    await node.endpoints.detach(EndpointKey("c1", "eth0"), Asked(BOOT, 2000))
    await node.gone()
    held.go.set()
    await asyncio.sleep(0.2)
    await node.holder.confirmed([ip])
    assert ip not in node.holder.assigned()


async def test_a_del_while_an_address_is_taken_back_leaves_it_to_nobody(
    node: Node, judge: Conflicts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ip = await given_away(node, judge, registered(ELSEWHERE), container_id="c2")
    await state_is(node, EndpointState.CONFLICT, "b", ip)
    held = Held(monkeypatch, node.holder, "take")
    await written(node, Delete(keys.address_key(ip)))
    await ended_meanwhile(node, held, ip)


async def test_a_del_while_a_conflict_with_itself_is_judged_leaves_the_address_to_nobody(
    node: Node, judge: Conflicts, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, Namesakes, "is_this_machine")
    ip = await given_away(node, judge, registered(HERE))
    await ended_meanwhile(node, held, ip)


@pytest.mark.parametrize("machine", ["", "new"])
async def test_a_container_of_a_machine_that_lost_all_its_names_is_not_cut_off_by_itself(
    node: Node, judge: Conflicts, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    """Node name, state directory and machine id are others; the machine's addresses are the same."""
    me = Namesakes(node.store, "a", Identity(machine_id=machine, state_id="new"), lambda: ["192.0.2.1"])
    monkeypatch.setattr(judge, "_namesakes", me)
    old = NodeRecord(name="b", version="1", machine_id="old", state_id="old", underlay=["192.0.2.1"])
    ip = await given_away(node, judge, registered(old))
    await state_is(node, EndpointState.ATTACHED, "a", ip)
    assert "disconnect c1" not in node.kernel.calls


# -- endpoints that nobody sees


async def gone_together(node: Node, *containers: str) -> Missing:
    """An agent that finds none of its endpoints' interfaces when it starts."""
    for name in containers:
        await node.endpoints.attach(node.spec(name))
    node.kernel.there.clear()
    node.endpoints.miss(missing(node.endpoints.all(), {}, BOOT))
    return Missing(cast("Kernel", node.kernel), node.endpoints)


def states(node: Node) -> list[str]:
    return [endpoint.state.value for endpoint in node.endpoints.all()]


async def another_gets(node: Node, ip: IPAddress) -> None:
    """By the store, which this node hears of, and its endpoint is cut off."""
    await node.holder.confirmed([ip])
    kv = await node.store.get(keys.address_key(ip))
    assert kv is not None
    record = Address.decode(kv.key, kv.value).with_(node="b", container_id="other")
    await written(node, Put(kv.key, record.encode()))
    await node.holder.sync()
    (found,) = node.conflicts
    assert await node.endpoints.cut_off(found)


async def test_endpoints_that_are_all_gone_at_a_start_keep_their_addresses(node: Node) -> None:
    question = await gone_together(node, "c1", "c2")
    await node.endpoints.collect()
    await question.look()
    assert not await node.endpoints.end(EndpointKey("c1", "eth0"), only_if_gone=True)
    assert states(node) == [e.state for e in node.journal.load_endpoints()] == ["missing"] * 2
    assert len(node.holder.assigned()) == 2
    assert "all 2 containers" in question.question()


async def test_a_single_endpoint_that_is_gone_at_a_start_has_ended(node: Node) -> None:
    question = await gone_together(node, "c1")
    assert question.all() == []
    await node.endpoints.collect()
    await node.gone()


async def test_endpoints_of_another_boot_are_no_question(node: Node) -> None:
    await gone_together(node)
    for name in ("c1", "c2"):
        await node.endpoints.attach(node.spec(name))
    assert missing(node.endpoints.all(), {}, "another boot") == []


async def test_containers_start_while_others_are_missing(node: Node) -> None:
    await gone_together(node, "c1", "c2")
    await node.endpoints.attach(node.spec("c3"))
    assert states(node) == ["missing", "missing", "attached"]


async def test_the_port_of_a_missing_endpoint_may_be_mapped_by_another(node: Node) -> None:
    mapped = (PortMapping("tcp", 31022, 22),)
    await node.endpoints.attach(replace(node.spec("c1"), port_mappings=mapped))
    await gone_together(node, "c2")
    await node.endpoints.attach(replace(node.spec("c3"), port_mappings=mapped))
    assert states(node) == ["missing", "missing", "attached"]


async def test_its_del_ends_a_missing_endpoint(node: Node) -> None:
    await gone_together(node, "c1", "c2")
    await node.endpoints.detach(EndpointKey("c1", "eth0"), Asked(BOOT, 2000))
    await node.gone("c1")
    assert states(node) == ["missing"]


async def test_a_gc_that_does_not_name_it_ends_a_missing_endpoint(node: Node) -> None:
    for name in ("c1", "c2"):
        await node.endpoints.attach(replace(node.spec(name), engine_network="pods"))
    await gone_together(node)
    await node.endpoints.collect_garbage(valid("c2"))
    assert states(node) == ["missing"]


async def test_an_interface_that_is_seen_again_connects_its_endpoint(node: Node) -> None:
    question = await gone_together(node, "c1", "c2")
    node.kernel.there.add(host_ifname(EndpointKey("c2", "eth0")))
    await question.look()
    assert states(node) == ["missing", "attached"]


async def test_an_operator_says_which_missing_endpoints_have_ended(node: Node) -> None:
    question = await gone_together(node, "c1", "c2", "c3")
    await question.release([EndpointKey("c2", "eth0")])
    assert [e.key.container_id for e in node.endpoints.all()] == ["c1", "c3"]
    await question.release([])
    assert node.endpoints.all() == []
    assert not node.holder.assigned()


async def test_an_operator_says_that_missing_endpoints_live(node: Node) -> None:
    question = await gone_together(node, "c1", "c2")
    question.keep([])
    assert question.question() == ""
    assert states(node) == ["missing"] * 2
    with pytest.raises(NotFound, match="c9/eth0 is not missing"):
        question.keep([EndpointKey("c9", "eth0")])


async def test_a_container_with_two_interfaces_that_is_gone_at_a_start_has_ended(node: Node) -> None:
    await node.endpoints.attach(replace(node.spec(request="r2"), key=EndpointKey("c1", "eth1")))
    question = await gone_together(node, "c1")
    assert question.all() == []
    await gone_together(node, "c2")
    assert len(question.all()) == 3
    assert "all 2 containers" in question.question()


async def test_a_missing_endpoint_whose_address_another_has_is_cut_off_when_it_is_seen_again(
    node: Node,
) -> None:
    first = await node.endpoints.attach(node.spec("c1"))
    await another_gets(node, first.ips[0])
    question = await gone_together(node, "c2")
    assert states(node) == ["missing"] * 2
    node.kernel.there |= {host_ifname(EndpointKey(name, "eth0")) for name in ("c1", "c2")}
    node.kernel.calls.clear()
    await question.look()
    assert states(node) == [e.state for e in node.journal.load_endpoints()] == ["conflict", "attached"]
    assert [call for call in node.kernel.calls if "c1" in call] == ["disconnect c1"]


async def test_a_missing_endpoint_whose_address_was_free_again_is_connected_when_it_is_seen(
    node: Node, judge: Conflicts
) -> None:
    first = await node.endpoints.attach(node.spec("c1"))
    question = await gone_together(node, "c2")
    await another_gets(node, first.ips[0])
    node.kernel.there |= {host_ifname(EndpointKey(name, "eth0")) for name in ("c1", "c2")}
    await question.look()
    await written(node, Delete(keys.address_key(first.ips[0])))
    async with asyncio.timeout(PATIENCE):
        while states(node) != ["attached"] * 2:
            await asyncio.sleep(0.01)
    assert first.ips[0] in node.holder.assigned()


async def test_a_conflict_over_one_address_of_a_missing_endpoint_leaves_it_the_other(node: Node) -> None:
    await create_network(
        node.store, Network(name="two", pools=[]), [PoolSpec("10.1.0.0/24"), PoolSpec("fd01::/112")]
    )
    await node.catalogue.refresh()
    first = await node.endpoints.attach(replace(node.spec("c1"), network="two"))
    question = await gone_together(node, "c2")
    await another_gets(node, first.ips[0])
    await node.endpoints.collect()
    assert states(node) == ["missing"] * 2
    assert first.ips[1] in node.holder.assigned()
    await question.release([])
    assert not node.holder.assigned()


async def test_an_address_that_is_taken_back_does_not_attach_an_endpoint_that_nobody_sees(
    node: Node,
) -> None:
    await gone_together(node, "c1", "c2")
    for endpoint in node.endpoints.all():
        assert not await node.endpoints.reconnect(endpoint)
    assert states(node) == ["missing"] * 2


@pytest.mark.parametrize("stopped", ["missing", "conflict"])
async def test_a_port_that_another_has_by_now_does_not_keep_an_endpoint_from_being_connected_again(
    node: Node, stopped: str
) -> None:
    taken, own = PortMapping("tcp", 31022, 22), PortMapping("tcp", 31080, 80)
    first = await node.endpoints.attach(replace(node.spec("c1"), port_mappings=(taken, own)))
    if stopped == "missing":
        await gone_together(node, "c2")
        node.kernel.there.add(first.host_ifname)
    else:
        assert await node.endpoints.cut_off(conflict(first))
    await node.endpoints.attach(replace(node.spec("c3"), port_mappings=(taken,)))
    (before,) = [endpoint for endpoint in node.endpoints.all() if endpoint.key == first.key]
    assert before.state == stopped
    assert await node.endpoints.reconnect(before)
    back = node.endpoints.get(first.key)
    assert back is not None
    assert (back.state, back.port_mappings) == (EndpointState.ATTACHED, (own,))
    assert back in node.journal.load_endpoints()
    (said,) = node.endpoints.incomplete()
    assert said.startswith("c1/eth0 was connected again without tcp port 31022 to 22, which c3/eth0 has")
    held = node.holder.held(first.ips[0])
    assert held is not None
    assert held.record is not None
    found = assembled(from_record(held.record, BOOT), {"ips": [str(held.ip)]})
    assert found.port_mappings == (own,)
    await node.endpoints.detach(first.key, Asked(BOOT, 2000))
    await node.gone()
    assert node.endpoints.incomplete() == []


async def test_what_is_seen_again_is_not_released(node: Node) -> None:
    question = await gone_together(node, "c1", "c2")
    node.kernel.there.add(host_ifname(EndpointKey("c1", "eth0")))
    assert [e.key.container_id for e in await question.release([])] == ["c2"]
    await question.look()
    assert states(node) == ["attached"]


async def test_a_release_that_waits_while_an_endpoint_is_connected_again_leaves_it(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = await gone_together(node, "c1", "c2")
    node.kernel.there.add(host_ifname(EndpointKey("c1", "eth0")))
    entered, go = asyncio.Event(), asyncio.Event()

    async def slow(*_: object) -> None:
        entered.set()
        await go.wait()

    monkeypatch.setattr(node.kernel, "readmit", slow)
    looking = asyncio.create_task(question.look())
    await entered.wait()
    releasing = asyncio.create_task(question.release([EndpointKey("c1", "eth0")]))
    await asyncio.sleep(0)
    go.set()
    await looking
    assert await releasing == []
    assert states(node) == ["attached", "missing"]


async def test_tombstones_of_earlier_boots_are_dropped_at_a_start(node: Node) -> None:
    here, earlier = EndpointKey("c1", "eth0"), EndpointKey("c2", "eth0")
    node.journal.save_tombstone(here, Asked(BOOT, 7))
    node.journal.save_tombstone(earlier, Asked("an earlier boot", 7))
    node.endpoints.load()
    assert node.journal.load_tombstones() == {here: Asked(BOOT, 7)}


async def test_an_address_record_says_all_of_its_endpoint_and_nothing_once_that_has_ended(node: Node) -> None:
    mapped = replace(node.spec(), port_mappings=(PortMapping("tcp", 31022, 22),))
    endpoint = await node.endpoints.attach(mapped)
    (held,) = node.holder.assigned().values()
    assert held.record is not None
    found = assembled(from_record(held.record, BOOT), {"ips": [str(held.ip)]})
    assert replace(found, netns=endpoint.netns) == endpoint
    await node.endpoints.detach(endpoint.key, Asked(BOOT, 2000))
    await node.gone()
    assert held.record.endpoint == {}


async def test_an_interface_that_claims_another_endpoints_address_is_not_taken_for_one(node: Node) -> None:
    first = await node.endpoints.attach(node.spec())
    free = ip_address("10.0.0.77")
    other = replace(first, key=EndpointKey("other", "eth0"), asked=Asked(BOOT, 2000))
    found = []
    for ip in (first.ips[0], free):
        name, said = host_ifname(other.key), for_alias(replace(other, ips=(ip,)))
        link = HostLink(name, 8, up=True, mac="", mtu=1500, peer=9, peer_namespace=1, said=said)
        kernel = cast("Kernel", node.kernel)
        await recall(kernel, node.endpoints, node.holder, node.catalogue, BOOT, {name: link}, {})
        assigned = node.holder.assigned().values()
        found.append(sorted(held.record.container_id for held in assigned if held.record is not None))
    assert found == [["c1"], ["c1", "other"]]
    assert ids(node) == ["c1", "other"]


async def test_records_of_an_earlier_version_are_told_of_their_endpoints_at_a_start(node: Node) -> None:
    endpoint = await node.endpoints.attach(node.spec())
    (held,) = node.holder.assigned().values()
    assert held.record is not None
    told = held.record.endpoint
    node.holder.accept(node.holder.plan_change(endpoint.ips, endpoint.key, endpoint={}))
    node.endpoints.tell_store()
    assert held.record.endpoint == told != {}


async def test_the_reaper_waits_for_one_moment_however_often_it_is_woken(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isolator.removal.REMOVE_RETRY", 0.2)
    node.kernel.fail["remove"] = lambda endpoint: (
        KernelRefused("busy") if endpoint.key.container_id == "c0" else None
    )
    for number in range(12):
        await node.endpoints.attach(node.spec(f"c{number}"))
    for number in range(12):
        await node.endpoints.detach(EndpointKey(f"c{number}", "eth0"), Asked(BOOT, 2000))
        await asyncio.sleep(0.05)
    await node.gone("c11")
    before = node.kernel.calls.count("remove c0")
    await asyncio.sleep(1)
    # Twice each time: with the others, and alone. Five of these fit a second.
    assert node.kernel.calls.count("remove c0") - before <= 12
