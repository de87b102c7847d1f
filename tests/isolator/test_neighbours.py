"""What the kernel is told of other nodes' endpoints, and of whose connections are forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import cast

import pytest

from ipam.catalogue import Catalogue
from ipam.cluster import Cluster, Member
from ipam.errors import MoorageError
from ipam.keys import IPAddress
from ipam.nodes_networks import NodesNetworks
from ipam.pools import Geometry, geometry, parse_pool
from ipam.records import Network, Node
from ipam.taken import parse_all
from isolator import neighbours as neighbours_module
from isolator.errors import KernelRefused
from isolator.kernel import Kernel
from isolator.neighbours import Neighbours, surroundings
from isolator.policy import Hosts, Surroundings

NODES = {
    name: Node(name=name, version="1", underlay=[underlay, "fe80::2"], vtep=vtep, vxlan_port=4789)
    for name, underlay, vtep in (("n1", "192.0.2.1", []), ("n2", "192.0.2.2", ["10.0.0.64"]))
}
A, B, C = (ip_address(f"10.0.0.{n}") for n in (1, 2, 3))
N1, N2 = ip_address("192.0.2.1"), ip_address("192.0.2.2")
POOL = ip_network("10.0.0.0/16")


@dataclass
class StubKernel:
    """Remembers what it was told; a real one is in tests/cluster."""

    others: dict[IPAddress, tuple[str, ...]] = field(default_factory=dict)
    known_hosts: Hosts = field(default_factory=Hosts)
    replaced: int = 0
    # (addresses, whether only what is forbidden now)
    forgotten: list[tuple[set[IPAddress], bool]] = field(default_factory=list)
    refuses: bool = False
    # The calls that are refused, once each.
    refuse_once: set[str] = field(default_factory=set)
    around: Surroundings = field(default_factory=Surroundings)

    def _may_refuse(self, what: str) -> None:
        if what in self.refuse_once:
            self.refuse_once.discard(what)
            raise KernelRefused(f"{what}: no such table")

    async def set_surroundings(self, around: Surroundings) -> list[IPAddress]:
        self._may_refuse("set_surroundings")
        self.around = around
        return []

    @property
    def nodes(self) -> set[IPAddress]:
        return set(self.known_hosts.nodes)

    async def hosts(self) -> Hosts:
        self._may_refuse("hosts")
        return self.known_hosts

    async def set_hosts(self, hosts: Hosts) -> None:
        self._may_refuse("set_hosts")
        self.known_hosts = hosts

    async def replace_others(self, known: Mapping[IPAddress, tuple[str, ...]]) -> None:
        self._may_refuse("replace_others")
        self.replaced += 1
        self.others = dict(known)

    async def set_others(self, changes: Sequence[tuple[IPAddress, tuple[str, ...]]]) -> list[IPAddress]:
        left = [ip for ip, groups in changes if not set(self.others.get(ip, ())) <= set(groups)]
        self.others |= dict(changes)
        if self.refuses:
            raise KernelRefused("no")
        return left

    async def forget_connections(self, ips: Iterable[IPAddress]) -> None:
        if wanted := set(ips):
            self.forgotten.append((wanted, False))

    async def forget_forbidden(self, ips: Iterable[IPAddress]) -> None:
        if wanted := set(ips):
            self.forgotten.append((wanted, True))


@dataclass
class StubCluster:
    """What the store is said to hold."""

    known: dict[IPAddress, Member] = field(default_factory=dict)
    listed: asyncio.Event = field(default_factory=asyncio.Event)
    # Nodes that the store lacks, and of those the ones whose removal it told.
    absent: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    is_settled: bool = True

    def members(self) -> Iterable[tuple[IPAddress, Member]]:
        return self.known.items()

    def nodes(self) -> dict[str, Node]:
        return {name: node for name, node in NODES.items() if name not in self.absent}


@dataclass
class StubCatalogue:
    """One pool, and what nodes' own networks use."""

    around: NodesNetworks = field(default_factory=NodesNetworks)
    forced: bool = False

    def networks(self) -> list[Network]:
        return [Network(name="web", pools=["10.0.0.0-16"], fabric="vxlan")]

    def pools(self) -> list[Geometry]:
        return [geometry(parse_pool(str(POOL), network="web", forced=self.forced))]

    def pool_of(self, ip: IPAddress) -> Geometry | None:
        return self.pools()[0] if ip in POOL else None


@dataclass
class Stage:
    neighbours: Neighbours
    kernel: StubKernel
    cluster: StubCluster
    catalogue: StubCatalogue

    def say(self, changes: Mapping[IPAddress, Member | None]) -> None:
        self.cluster.known.update({ip: member for ip, member in changes.items() if member is not None})
        self.neighbours.on_members(list(changes.items()))

    async def settled(self) -> None:
        await asyncio.sleep(0.3)


@pytest.fixture
async def stage(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    monkeypatch.setattr(neighbours_module, "FORGET_TOGETHER", 0.05)
    kernel, cluster, catalogue = StubKernel(), StubCluster(), StubCatalogue()
    neighbours = Neighbours("n1", cast("Kernel", kernel), cast("Catalogue", catalogue))

    async def tell() -> None:
        while True:
            try:
                await neighbours.tell(cast("Cluster", cluster))
            except MoorageError:
                continue

    tasks = [asyncio.create_task(tell()), asyncio.create_task(neighbours.forget())]
    yield Stage(neighbours, kernel, cluster, catalogue)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def member(*netgroups: str, node: str = "n2", own: bool = False) -> Member:
    return Member(node, "web", netgroups, own)


async def test_nothing_is_told_before_all_was_listed_and_then_all_at_once(stage: Stage) -> None:
    stage.say({A: member("red"), B: member()})
    await stage.settled()
    assert (stage.kernel.replaced, stage.kernel.nodes) == (0, set())
    stage.cluster.listed.set()
    stage.neighbours.on_topology({"n2"})
    await stage.settled()
    assert stage.kernel.replaced == 1
    assert stage.kernel.others == {A: ("red",), B: ("web",)}, "none recorded is the network's own"
    assert stage.kernel.nodes == {N1, N2, ip_address("10.0.0.64")}


async def test_this_nodes_own_endpoints_speak_for_themselves_and_nodes_are_no_endpoints(stage: Stage) -> None:
    stage.cluster.listed.set()
    stage.say({A: member("red", node="n1"), B: member(own=True), C: member("red")})
    await stage.settled()
    assert {ip: groups for ip, groups in stage.kernel.others.items() if groups} == {C: ("red",)}
    assert B in stage.kernel.nodes
    stage.say({B: None})
    await stage.settled()
    assert B not in stage.kernel.nodes


async def test_connections_of_who_left_are_forgotten_and_only_forbidden_ones_if_the_address_stays(
    stage: Stage,
) -> None:
    stage.cluster.listed.set()
    stage.say({A: member("red"), B: member("red", "blue"), C: member("red")})
    await stage.settled()
    stage.say({A: None, B: member("blue"), C: member("red", "blue")})
    await stage.settled()
    assert stage.kernel.forgotten == [({A}, False), ({B}, True)]


async def tunnel_sources(stage: Stage) -> frozenset[IPAddress]:
    stage.neighbours.on_topology({"n2"})
    await stage.settled()
    return stage.kernel.known_hosts.underlays


async def test_a_node_that_was_removed_and_does_not_come_back_may_not_use_the_tunnel_any_more(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours_module, "REMOVED_AFTER", 0.7)
    stage.cluster.listed.set()
    assert await tunnel_sources(stage) == {N1, N2}
    stage.cluster.absent = stage.cluster.removed = {"n2"}
    assert await tunnel_sources(stage) == {N1, N2}, "it may be registering again this moment"
    await asyncio.sleep(0.7)
    await stage.settled()
    assert stage.kernel.known_hosts.underlays == {N1}


@pytest.mark.parametrize("doubt", ["unsettled", "own record is gone, too", "left out of a listing"])
async def test_a_removal_that_may_be_a_store_gone_wrong_takes_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, doubt: str
) -> None:
    monkeypatch.setattr(neighbours_module, "REMOVED_AFTER", 0.1)
    stage.cluster.listed.set()
    assert await tunnel_sources(stage) == {N1, N2}
    stage.cluster.is_settled = doubt != "unsettled"
    stage.cluster.absent = {"n1", "n2"} if doubt.startswith("own") else {"n2"}
    stage.cluster.removed = set() if doubt.startswith("left") else set(stage.cluster.absent)
    for _ in range(3):
        assert await tunnel_sources(stage) == {N1, N2}


async def test_a_removal_is_believed_as_soon_as_the_doubt_is_over(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch broke in between, and nothing happens in the cluster afterwards."""
    monkeypatch.setattr(neighbours_module, "REMOVED_AFTER", 0.3)
    stage.cluster.listed.set()
    await tunnel_sources(stage)
    stage.cluster.absent = stage.cluster.removed = {"n2"}
    stage.cluster.is_settled = False
    assert await tunnel_sources(stage) == {N1, N2}
    await asyncio.sleep(0.5)
    stage.cluster.is_settled = True
    await asyncio.sleep(0.5)
    await stage.settled()
    assert stage.kernel.known_hosts.underlays == {N1}


async def test_what_an_earlier_agent_left_in_the_table_stays(stage: Stage) -> None:
    unknown = ip_address("192.0.2.3")
    stage.kernel.known_hosts = Hosts(underlays=frozenset({unknown}), here=frozenset({N1}), tunnel=4789)
    stage.cluster.listed.set()
    assert await tunnel_sources(stage) == {N1, N2, unknown}
    assert stage.neighbours.tunnel_status(own=[N1])["unnamed"] == [str(unknown)]


async def test_the_nodes_own_address_is_no_strangers_also_while_the_store_has_another_for_it(
    stage: Stage,
) -> None:
    """Its record is gone, or another machine's that has its name."""
    before, foreign = ip_address("192.0.2.3"), ip_address("192.0.2.4")
    stage.kernel.known_hosts = Hosts(
        underlays=frozenset({before, foreign}), here=frozenset({before}), tunnel=4789
    )
    stage.cluster.listed.set()
    assert await tunnel_sources(stage) == {N1, N2, before, foreign}
    assert stage.neighbours.tunnel_status(own=[before])["unnamed"] == [str(foreign)]


async def test_who_was_a_member_before_a_restart_stays_one_while_the_store_is_in_doubt(stage: Stage) -> None:
    stage.kernel.others = {A: ("red",)}
    stage.cluster.is_settled = False
    stage.cluster.listed.set()
    stage.say({B: member("red")})
    await stage.settled()
    assert (stage.kernel.replaced, stage.kernel.others) == (0, {A: ("red",), B: ("red",)})
    stage.cluster.is_settled = True
    stage.neighbours.on_members(())
    await stage.settled()
    assert (stage.kernel.replaced, stage.kernel.others) == (1, {B: ("red",)})


async def test_a_kernel_that_refuses_still_forgets(stage: Stage) -> None:
    """The table will be restored from what the policy knows; connections have to be forgotten all the same."""
    stage.cluster.listed.set()
    stage.say({A: member("red")})
    await stage.settled()
    stage.kernel.refuses = True
    stage.say({A: None})
    await stage.settled()
    assert stage.kernel.forgotten == [({A}, False)]


LAN = ("connected 10.0.0.0/24 eth0", "address 10.0.0.5 eth0", "store 10.0.9.9 tcp/2379")


def in_pools(around: Surroundings, ip: str) -> bool:
    return any(ip_address(ip) in network for network in around.pools)


@pytest.mark.parametrize(
    ("forced", "ip", "is_containers"),
    [
        (False, "10.0.0.5", False),
        (False, "10.0.9.9", False),
        (False, "10.0.0.7", False),
        (False, "10.0.1.7", True),
        (True, "10.0.0.5", False),
        (True, "10.0.9.9", False),
        (True, "10.0.0.7", True),
    ],
)
def test_what_nodes_networks_use_is_never_judged_as_a_containers(
    forced: bool, ip: str, is_containers: bool
) -> None:
    known = NodesNetworks([Node(name="n9", version="1", surroundings=list(LAN))])
    around = surroundings(cast("Catalogue", StubCatalogue(known, forced)))
    assert in_pools(around, ip) is is_containers
    assert around.nat_pools == around.tunnelled_pools == around.pools


def test_containers_that_were_there_first_stay_containers_but_not_as_a_node() -> None:
    known = NodesNetworks([Node(name="n9", version="1", surroundings=list(LAN))])
    assigned = [ip_address(ip) for ip in ("10.0.0.5", "10.0.0.7", "10.0.1.7")]
    around = surroundings(cast("Catalogue", StubCatalogue(known)), assigned)
    assert [in_pools(around, str(ip)) for ip in assigned] == [False, True, True]
    assert len(set(around.pools)) == len(around.pools), "the kernel refuses what overlaps"


async def test_the_firewall_hears_of_such_containers_as_they_come_and_go(stage: Stage) -> None:
    stage.catalogue.around.tell("n9", parse_all(LAN))
    inside = ip_address("10.0.0.7")
    stage.neighbours.on_catalogue()
    stage.say({inside: member()})
    await stage.settled()
    assert in_pools(stage.kernel.around, "10.0.0.7")
    del stage.cluster.known[inside]
    stage.say({inside: None})
    await stage.settled()
    assert not in_pools(stage.kernel.around, "10.0.0.7")


@pytest.mark.parametrize("refused", ["set_surroundings", "hosts", "set_hosts", "replace_others"])
async def test_what_was_gathered_when_the_kernel_refused_is_told_by_the_next_turn(
    stage: Stage, refused: str
) -> None:
    """And not by the next change, which in a quiet cluster may be hours away."""
    stage.kernel.refuse_once = {refused}
    stage.neighbours.on_catalogue()
    stage.neighbours.on_topology({"n2"})
    stage.cluster.listed.set()
    stage.say({A: Member("n2", "web", ())})
    await stage.settled()
    assert stage.kernel.refuse_once == set(), "it was refused indeed"
    assert stage.kernel.others == {A: ("web",)}
    assert stage.kernel.around.pools == (POOL,)
    assert stage.kernel.nodes == {N1, N2, ip_address("10.0.0.64")}


async def test_who_left_a_netgroup_while_the_kernel_refused_networks_is_no_member_after(stage: Stage) -> None:
    stage.cluster.listed.set()
    stage.say({A: Member("n2", "web", ("blue",))})
    await stage.settled()
    assert stage.kernel.others == {A: ("blue",)}
    stage.kernel.refuse_once = {"set_surroundings"}
    stage.neighbours.on_catalogue()
    stage.say({A: None})
    await stage.settled()
    assert stage.kernel.others[A] == ()


async def test_an_add_has_the_kernel_told_of_networks_before_the_changes_have_gathered(stage: Stage) -> None:
    stage.neighbours.on_catalogue()
    await stage.neighbours.tell_of_networks(cast("Cluster", stage.cluster))
    assert stage.kernel.around.pools == (POOL,)
    stage.kernel.around = Surroundings()
    await stage.neighbours.tell_of_networks(cast("Cluster", stage.cluster))
    assert stage.kernel.around.pools == (), "what was told is not told again"
