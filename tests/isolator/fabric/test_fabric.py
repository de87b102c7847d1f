"""One node's fabric: from what stands in a store to what is in a kernel, and what it says when that cannot be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipam import grace, keys
from ipam.cluster import Cluster
from ipam.keys import IPAddress
from ipam.networks import NetworkChange, set_network
from ipam.node_addresses import NodeAddresses
from ipam.pools import block_at
from ipam.records import Address, AddressState, Block
from ipam.records import Node as NodeRecord
from ipam.store import Delete, Put, Store, Txn, open_store
from ipam.taken import Kind
from ipam.taken import taken as taken_by
from isolator.fabric import VXLAN_DEVICE, Fabric, fabric, mac_of
from isolator.fabric.plan import SECOND_DEVICE, VNI, next_hop
from isolator.netlink import messages
from isolator.underlay import Underlay
from tests.ipam import nodes as ipam_nodes
from tests.ipam.nodes import network
from tests.isolator.rooms import Room

pytestmark = pytest.mark.kernel

UNDERLAY = Underlay(("up0",), 1500, (ip_address("192.0.2.1"), ip_address("2001:db8::1")))
OF_N2, OF_N3 = "10.64.2.0/26", "10.64.3.0/26"


class Agent(ipam_nodes.Node):
    """As much of an agent as the fabric rests on, in a room with an underlay."""

    def __init__(self, path: Path, store: Store, room: Room) -> None:
        super().__init__(path, store, "n1")
        self.room = room
        self.described = 0
        self.leaving = False
        self._work: list[asyncio.Task[None]] = []

    def compose(self) -> None:
        """All but work."""
        self.cluster = Cluster(self.store, self.catalogue, on_topology=self._topology_changed)
        self.addresses = NodeAddresses(self.name, VXLAN_DEVICE, self.holder, self.catalogue)
        self.fabric = self.room.do(
            Fabric,
            self.name,
            4789,
            self.cluster,
            self.catalogue,
            self.addresses,
            self._describe,
            lambda: self.leaving,
        )
        self.fabric.underlay_changed(UNDERLAY)

    def _topology_changed(self, nodes: set[str]) -> None:
        self.fabric.topology_changed(nodes)

    def _describe(self) -> None:
        self.described += 1

    def _catalogue_changed(self) -> None:
        super()._catalogue_changed()
        if hasattr(self, "fabric"):
            self.cluster.pools_changed()
            self.fabric.networks_changed()

    def run(self, work: Callable[[], object]) -> None:
        self._work.append(asyncio.ensure_future(work()))

    async def end(self) -> None:
        for task in self._work:
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        self.fabric.close()
        await self.crash()

    def holds(self) -> str:
        """The fabric's routes in the kernel, as text."""
        shown = self.room.sh("ip -4 route show proto 157; ip -6 route show proto 157")
        return "\n".join(line for line in shown.splitlines() if " metric 2048" in line)

    async def until(self, holds: Callable[[], object], within: float = 80.0) -> None:
        """Wait for it; what the kernel holds and the fabric says is shown if it does not come."""
        try:
            async with asyncio.timeout(within):
                while not holds():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{self.holds()}\n{self.fabric.status()}") from None

    def problems(self) -> str:
        return "\n".join(self.fabric.problems())


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(f"sqlite://{tmp_path}/store.db")
    yield opened
    await opened.close()


@pytest.fixture
async def idle(store: Store, tmp_path: Path, container: Room) -> AsyncIterator[Agent]:
    """An agent whose fabric does not run yet."""
    container.sh(
        "ip link add up0 type veth peer name p0; ip link set p0 up; ip link set up0 up; "
        "ip address add 192.0.2.1/24 dev up0; ip address add 2001:db8::1/64 dev up0 nodad"
    )
    agent = Agent(tmp_path, store, container)
    await agent.start()
    agent.compose()
    yield agent
    await agent.end()


@pytest.fixture
async def agent(idle: Agent) -> Agent:
    """An agent whose fabric runs, on one network ``web`` with the fabric vxlan."""
    await network(idle.store, "10.64.0.0/20", "fd64::/112", name="web", fabric="vxlan", warm=0)
    idle.run(idle.cluster.follow)
    idle.run(idle.fabric.keep_kernel)
    idle.run(idle.fabric.keep_addresses)
    return idle


async def put(store: Store, key: str, value: bytes | None) -> None:
    assert (await store.txn(Txn((), (Delete(key),) if value is None else (Put(key, value),)))).succeeded


async def join(store: Store, name: str, block: str, *underlay: str) -> None:
    """Another node with a block, as its agent would say it."""
    record = NodeRecord(name=name, version="1", underlay=list(underlay), mac=mac_of(name), vxlan_port=4789)
    await put(store, keys.NODES + name, record.encode())
    await claim(store, name, block)


async def claim(store: Store, name: str, block: str) -> None:
    base, size = block.split("/")
    record = Block(pool="web", size=int(size), node=name, claimed_at=0.0)
    await put(store, keys.block_key(block_at(ip_address(base), int(size))), record.encode())


async def hold(store: Store, name: str, ip: IPAddress, state: AddressState) -> None:
    await put(store, keys.address_key(ip), Address(pool="web", state=state, node=name).encode())


async def assign(store: Store, name: str, ip: IPAddress) -> None:
    record = Address(pool="web", state=AddressState.ASSIGNED, node=name, network="web", container_id="c")
    await put(store, keys.address_key(ip), record.encode())


async def test_nodes_come_change_and_go(agent: Agent) -> None:
    store = agent.store
    await join(store, "n2", OF_N2, "192.0.2.2")
    await agent.until(lambda: OF_N2 in agent.holds())
    await assign(store, "n2", ip_address("10.64.9.9"))
    await agent.until(lambda: "10.64.9.9 via" in agent.holds())
    await join(store, "n2", OF_N2, "192.0.2.22")
    await agent.until(lambda: " dst 192.0.2.22 " in agent.room.sh(f"bridge fdb show dev {VXLAN_DEVICE}"))
    await claim(store, "n3", OF_N2)
    await agent.until(lambda: OF_N2 not in agent.holds())
    assert f"{OF_N2} of node n3 is unreachable: nothing is known of that node" in agent.problems()
    for key in (keys.NODES + "n2", keys.address_key(ip_address("10.64.9.9"))):
        await put(store, key, None)
    await agent.until(lambda: "10.64.9.9" not in agent.holds())
    assert agent.room.sh(f"bridge fdb show dev {VXLAN_DEVICE}") == ""


async def test_a_block_of_one_address_is_led_to_where_that_address_is(agent: Agent) -> None:
    await set_network(agent.store, "web", NetworkChange(add=(ipam_nodes.PoolSpec("10.65.0.7/32"),)))
    only = ip_address("10.65.0.7")
    for name, number in (("n2", 2), ("n3", 3)):
        await join(agent.store, name, f"10.64.{number}.0/26", f"192.0.2.{number}")
    hops = {name: str(next_hop(mac_of(name))) for name in ("n2", "n3")}
    await claim(agent.store, "n2", "10.65.0.7/32")
    for holder in ("n2", "n3", "n2", "n3", ""):
        if holder:
            await assign(agent.store, holder, only)
        else:
            await put(agent.store, keys.address_key(only), None)
        await agent.until(lambda hop=hops[holder or "n2"]: hop in line_of(str(only), agent.holds()))
        agent.fabric.kernel_changed()
        await asyncio.sleep(0.2)
        assert hops[holder or "n2"] in line_of(str(only), agent.holds())


async def test_what_the_node_holds_away_from_its_blocks_is_at_home_as_they_are(agent: Agent) -> None:
    store, strays = agent.store, [ip_address("10.64.2.9"), ip_address("fd64::209")]
    await join(store, "n2", OF_N2, "192.0.2.2")
    await claim(store, "n2", "fd64::200/122")
    for ip in strays:
        await hold(store, "n1", ip, AddressState.COOLING)
    for ip in strays:
        await agent.until(lambda ip=ip: f"blackhole {ip} " in agent.holds())
    own = ip_address("10.64.2.10")
    agent.catalogue.tell_own([taken_by(Kind.ADDRESS, own, "eth9")])
    await hold(store, "n1", own, AddressState.WARM)
    await hold(store, "n1", ip_address("10.64.2.11"), AddressState.WARM)
    # It is all that is left of a part of n2's block, and not n2's to lead to.
    await agent.until(lambda: "blackhole 10.64.2.11 " in agent.holds())
    assert "blackhole 10.64.2.10 " not in agent.holds(), "a node's own network comes first"
    await put(store, keys.address_key(ip_address("10.64.2.11")), None)
    await agent.until(lambda: "10.64.2.11 via " in agent.holds())
    for ip in strays:
        await put(store, keys.address_key(ip), None)
    for ip in strays:
        await agent.until(lambda ip=ip: f"{ip} " not in agent.holds())


async def test_routes_name_the_devices_address_as_soon_as_there_is_one(agent: Agent) -> None:
    await join(agent.store, "n2", OF_N2, "192.0.2.2")
    await agent.until(lambda: agent.fabric.carried)
    await agent.until(lambda: f"dev {VXLAN_DEVICE} src {agent.fabric.carried[0]} " in agent.holds())
    assert agent.described > 0
    before = agent.fabric.carried[0]
    await set_network(agent.store, "web", NetworkChange(add=(ipam_nodes.PoolSpec("10.65.0.0/24"),)))
    await set_network(agent.store, "web", NetworkChange(disable=("10.64.0.0/20",)))
    await agent.until(lambda: agent.fabric.carried and str(agent.fabric.carried[0]).startswith("10.65."))
    await agent.until(lambda: f"src {agent.fabric.carried[0]} " in agent.holds())
    assert str(before) not in agent.room.sh("ip address")


async def test_nothing_is_touched_before_the_cluster_was_listed(idle: Agent) -> None:
    idle.room.sh("ip route add 10.64.9.0/26 via 192.0.2.9 proto 157 metric 2048")
    idle.run(idle.fabric.keep_kernel)
    idle.run(idle.fabric.keep_addresses)
    idle.fabric.kernel_changed()
    await asyncio.sleep(0.3)
    assert "10.64.9.0/26" in idle.holds()
    idle.run(idle.cluster.follow)
    await idle.until(lambda: idle.holds() == "")


async def test_nothing_is_withdrawn_for_a_while_after_the_store_went_back_in_time(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grace, "SECONDS", 2.0)
    monkeypatch.setattr(fabric, "RESYNC_EVERY", 0.2)
    await join(agent.store, "n2", OF_N2, "192.0.2.2")
    await agent.until(lambda: OF_N2 in agent.holds())
    agent.fabric.rewound()
    agent.cluster.start_over()
    for key in (keys.NODES + "n2", keys.block_key(block_at(ip_address("10.64.2.0"), 26))):
        await put(agent.store, key, None)
    await join(agent.store, "n3", OF_N3, "192.0.2.3")
    await agent.until(lambda: OF_N3 in agent.holds())
    assert OF_N2 in agent.holds()
    await agent.until(lambda: OF_N2 not in agent.holds())
    assert OF_N3 in agent.holds()


async def test_an_address_that_moved_in_that_while_leads_where_it_is_now(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fabric, "RESYNC_EVERY", 0.2)
    await join(agent.store, "n2", OF_N2, "192.0.2.2")
    await join(agent.store, "n3", OF_N3, "192.0.2.3")
    await agent.until(lambda: OF_N2 in agent.holds() and OF_N3 in agent.holds())
    agent.fabric.rewound()
    for _ in range(5):
        for name in ("n3", "n2"):
            await claim(agent.store, name, OF_N2)
            hop = str(next_hop(mac_of(name)))
            await agent.until(lambda hop=hop: hop in line_of(OF_N2, agent.holds()))


def line_of(destination: str, text: str) -> str:
    return next((line for line in text.splitlines() if line.startswith(f"{destination} ")), "")


async def test_without_an_underlay_address_there_is_no_tunnel_and_it_says_so(agent: Agent) -> None:
    await agent.until(lambda: VXLAN_DEVICE in agent.room.sh("ip link"))
    agent.fabric.underlay_changed(Underlay((), 1500, ()))
    await agent.until(lambda: VXLAN_DEVICE not in agent.room.sh("ip link"))
    assert "this node has no underlay address" in agent.problems()
    agent.fabric.underlay_changed(UNDERLAY)
    await agent.until(lambda: VXLAN_DEVICE in agent.room.sh("ip link") and not agent.fabric.problems())


async def test_an_mtu_too_small_for_ipv6_is_said(agent: Agent) -> None:
    agent.fabric.underlay_changed(replace(UNDERLAY, mtu=1300))
    await agent.until(lambda: "leaves 1250 in the tunnel" in agent.problems())
    assert "raise that of up0" in agent.problems()


async def test_what_a_container_can_send_follows_from_underlay_and_fabric(agent: Agent) -> None:
    await agent.until(agent.catalogue.networks)
    (web,) = agent.catalogue.networks()
    assert agent.fabric.mtu(web) == 1450
    assert agent.fabric.mtu(web.with_(fabric="hostgw")) == 1500
    agent.fabric.underlay_changed(replace(UNDERLAY, addresses=UNDERLAY.addresses[1:]))
    assert agent.fabric.mtu(web) == 1430


async def test_hostgw_to_a_node_elsewhere_is_said_and_works_when_that_is_mended(agent: Agent) -> None:
    await set_network(agent.store, "web", NetworkChange(fabric="hostgw"))
    await join(agent.store, "n2", OF_N2, "198.51.100.2")
    await agent.until(lambda: "hostgw needs nodes on one segment" in agent.problems())
    assert f"could not add the route to {OF_N2} via 198.51.100.2" in agent.problems()
    assert "--fabric vxlan" in agent.problems()
    agent.room.sh("ip address add 198.51.100.1/24 dev up0")
    agent.fabric.kernel_changed()
    await agent.until(lambda: OF_N2 in agent.holds() and not agent.fabric.problems())


async def test_a_port_that_is_taken_is_said_and_used_when_it_is_free(agent: Agent) -> None:
    await agent.until(lambda: VXLAN_DEVICE in agent.room.sh("ip link"))
    agent.room.sh(f"ip link delete {VXLAN_DEVICE}")
    taken = agent.room.udp(ip_address("0.0.0.0"), 4789)
    agent.fabric.kernel_changed()
    await agent.until(lambda: "give every agent another --vxlan-port" in agent.problems())
    taken.close()
    await agent.until(lambda: ",UP," in agent.room.sh(f"ip link show {VXLAN_DEVICE}"))
    await agent.until(lambda: agent.problems() == "")


@contextlib.contextmanager
def port_taken(room: Room) -> Iterator[str]:
    """By a program; yields what the kernel says then."""
    with contextlib.closing(room.udp(ip_address("0.0.0.0"), 4789)):
        yield "give every agent another --vxlan-port"


@contextlib.contextmanager
def network_taken(room: Room) -> Iterator[str]:
    """By another VXLAN device that has ours; yields what the kernel says then."""
    room.sh(f"ip link add another type vxlan id {VNI} dstport 4789 local 192.0.2.1; ip link set another up")
    yield f"could not create the VXLAN device {VXLAN_DEVICE}"
    room.sh("ip link delete another")


@pytest.mark.parametrize("taken", [port_taken, network_taken])
async def test_without_its_device_routes_of_hostgw_are_kept_and_the_tunnels_are_named(
    agent: Agent, taken: Callable[[Room], AbstractContextManager[str]]
) -> None:
    store = agent.store
    await network(store, "10.66.0.0/20", name="hg", fabric="hostgw", warm=0)
    await join(store, "n2", OF_N2, "192.0.2.2")
    await agent.until(lambda: OF_N2 in agent.holds() and VXLAN_DEVICE in agent.room.sh("ip link"))
    agent.room.sh(f"ip link delete {VXLAN_DEVICE}")
    with taken(agent.room) as why:
        agent.fabric.kernel_changed()
        await agent.until(lambda: why in agent.problems())
        for block in ("10.66.2.0/26", "10.66.3.0/26"):
            await claim(store, "n2", block)
            await agent.until(lambda block=block: f"{block} via 192.0.2.2 " in agent.holds())
        await put(store, keys.block_key(block_at(ip_address("10.66.2.0"), 26)), None)
        await agent.until(lambda: "10.66.2.0/26" not in agent.holds())
        assert OF_N2 not in agent.holds()
        assert len(agent.fabric.problems()) == 1
        assert agent.fabric.receives(mac_of("n1"), "192.0.2.1")[0] == ""
    agent.fabric.kernel_changed()
    await agent.until(lambda: OF_N2 in agent.holds() and agent.problems() == "")


async def test_a_device_that_lacks_an_address_is_named_and_routes_do_without_it(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    await agent.until(lambda: len(agent.fabric.carried) == 2)
    four, _ = agent.fabric.carried
    refused = messages.add_address(0, VXLAN_DEVICE, ip_address("ff02::9"))
    made = messages.add_address
    monkeypatch.setattr(
        messages, "add_address", lambda index, name, ip: refused if ip.version == 6 else made(index, name, ip)
    )
    agent.room.sh(f"ip -6 address flush dev {VXLAN_DEVICE}")
    agent.fabric.kernel_changed()
    await agent.until(lambda: agent.fabric.carried == (four,))
    await join(agent.store, "n2", OF_N2, "192.0.2.2")
    await claim(agent.store, "n2", "fd64::200/122")
    await agent.until(lambda: f"src {four} " in line_of(OF_N2, agent.holds()))
    await agent.until(lambda: "fd64::200/122" in agent.holds())
    assert f"the device {VXLAN_DEVICE} is not as it should be" in agent.problems()
    monkeypatch.setattr(messages, "add_address", made)
    agent.fabric.kernel_changed()
    await agent.until(lambda: len(agent.fabric.carried) == 2 and agent.problems() == "")
    await agent.until(lambda: " src fd64::" in line_of("fd64::200/122", agent.holds()))


@pytest.mark.parametrize("what", ["blocks of others change", "its addresses are looked at"])
async def test_everything_is_compared_in_time_while(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(fabric, "RESYNC_EVERY", 1.0)
    monkeypatch.setattr(agent.fabric, "_resync_every", 1.0)
    await join(agent.store, "n2", OF_N2, "192.0.2.2")
    tunnels = f"bridge fdb show dev {VXLAN_DEVICE}"
    await agent.until(lambda: OF_N2 in agent.holds() and " dst 192.0.2.2 " in agent.room.sh(tunnels))

    async def be_busy() -> None:
        while True:
            if what == "blocks of others change":
                agent.fabric.topology_changed({"n2"})
            else:
                agent.fabric.addresses_changed()
            await asyncio.sleep(0.1)

    agent.run(be_busy)
    await asyncio.sleep(0.2)
    agent.room.sh(f"bridge fdb del {mac_of('n2')} dev {VXLAN_DEVICE}")
    await agent.until(lambda: " dst 192.0.2.2 " in agent.room.sh(tunnels))


async def test_what_was_worked_out_is_kept_up_while_the_cluster_is_listed_anew(
    agent: Agent,
) -> None:
    await join(agent.store, "n2", OF_N2, "192.0.2.2")
    await agent.until(lambda: OF_N2 in agent.holds())
    agent.cluster.listed.clear()
    agent.room.sh("ip route flush proto 157 metric 2048")
    agent.fabric.kernel_changed()
    await agent.until(lambda: OF_N2 in agent.holds())


async def test_a_second_device_leads_to_a_node_without_the_first_ones_family_as_long_as_there_is_one(
    agent: Agent,
) -> None:
    second, store = SECOND_DEVICE[6], agent.store
    await join(store, "n2", OF_N2, "192.0.2.2", "2001:db8::2")
    await agent.until(lambda: f"dev {VXLAN_DEVICE} " in line_of(OF_N2, agent.holds()))
    assert second not in agent.room.sh("ip link")
    await join(store, "n3", OF_N3, "2001:db8::3")
    await agent.until(lambda: f"dev {second} " in line_of(OF_N3, agent.holds()))
    assert " dst 2001:db8::3 " in agent.room.sh(f"bridge fdb show dev {second}")
    assert f"src {agent.fabric.carried[0]} " in line_of(OF_N3, agent.holds())
    assert f"dev {VXLAN_DEVICE} " in line_of(OF_N2, agent.holds())
    assert agent.fabric.receives(mac_of("n1"), "2001:db8::1") == (second, "")
    assert agent.fabric.receives(mac_of("n1"), "192.0.2.1") == (VXLAN_DEVICE, "")
    assert "mtu 1430 " in agent.room.sh(f"ip link show {second}")
    (web,) = agent.catalogue.networks()
    assert agent.fabric.mtu(web) == 1450
    assert agent.problems() == ""
    agent.room.sh(f"ip link delete {second}")
    agent.fabric.kernel_changed()
    await agent.until(lambda: f"dev {second} " in line_of(OF_N3, agent.holds()))
    await join(store, "n3", OF_N3, "192.0.2.3", "2001:db8::3")
    await agent.until(lambda: f"dev {VXLAN_DEVICE} " in line_of(OF_N3, agent.holds()))
    await agent.until(lambda: second not in agent.room.sh("ip link"))
    assert agent.problems() == ""


async def test_an_underlay_that_loses_a_family_leaves_one_device_and_one_that_gains_it_has_two_again(
    agent: Agent,
) -> None:
    second = SECOND_DEVICE[6]
    await join(agent.store, "n3", OF_N3, "2001:db8::3")
    await agent.until(lambda: f"dev {second} " in line_of(OF_N3, agent.holds()))
    agent.fabric.underlay_changed(replace(UNDERLAY, addresses=UNDERLAY.addresses[1:]))
    await agent.until(lambda: f"dev {VXLAN_DEVICE} " in line_of(OF_N3, agent.holds()))
    assert second not in agent.room.sh("ip link")
    agent.fabric.underlay_changed(UNDERLAY)
    await agent.until(lambda: f"dev {second} " in line_of(OF_N3, agent.holds()))
    agent.fabric.underlay_changed(replace(UNDERLAY, addresses=UNDERLAY.addresses[:1]))
    await agent.until(lambda: "the underlay of this node has IPv4, and that node's IPv6" in agent.problems())
    await agent.until(lambda: second not in agent.room.sh("ip link"))


async def test_the_last_tunnelled_network_takes_the_device_and_then_its_addresses_with_it(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    await agent.until(lambda: len(agent.fabric.carried) == 2)
    given_up = agent.holder.give_up
    too_early: list[IPAddress] = []

    def give_up(ip: IPAddress) -> None:
        if f" {ip}/" in agent.room.sh("ip address"):
            too_early.append(ip)
        given_up(ip)

    monkeypatch.setattr(agent.holder, "give_up", give_up)
    await set_network(agent.store, "web", NetworkChange(fabric="none"))
    await agent.until(lambda: VXLAN_DEVICE not in agent.room.sh("ip link") and agent.holds() == "")
    await agent.until(lambda: agent.states() == {})
    assert agent.fabric.carried == ()
    assert too_early == []


async def test_a_node_that_can_take_no_address_says_why(idle: Agent) -> None:
    await idle.join()
    idle.holder.drain.begin()
    await network(idle.store, "10.64.0.0/20", name="web", fabric="vxlan")
    idle.run(idle.cluster.follow)
    idle.run(idle.fabric.keep_kernel)
    idle.run(idle.fabric.keep_addresses)
    await idle.until(lambda: "the device has no IPv4 address" in idle.problems())
    assert "node n1 is drained" in idle.problems()
    assert VXLAN_DEVICE in idle.room.sh("ip link")


async def test_a_node_that_leaves_gives_up_its_own_addresses(agent: Agent) -> None:
    await agent.until(lambda: len(agent.fabric.carried) == 2)
    agent.leaving = True
    agent.fabric.addresses_changed()
    await agent.until(lambda: agent.fabric.carried == () and agent.states() == {})


async def test_an_add_on_a_network_that_is_new_waits_until_it_is_carried_and_no_other_add_does(
    agent: Agent,
) -> None:
    await join(agent.store, "n2", OF_N2, "192.0.2.2")
    await agent.until(lambda: "10.64.2.0/26" in agent.holds())
    known = await agent.catalogue.network("web")
    await asyncio.wait_for(agent.fabric.carry(known), 0.01)

    await set_network(agent.store, "web", NetworkChange(fabric="hostgw"))
    await agent.until(lambda: [n.fabric for n in agent.catalogue.networks()] == ["hostgw"])
    changed = await agent.catalogue.network("web")
    await agent.fabric.carry(changed)
    assert "via 192.0.2.2" in agent.holds()


async def test_an_add_does_not_wait_for_long_where_the_fabric_stands_still(agent: Agent) -> None:
    await agent.until(lambda: agent.fabric.status()["device"])
    unheard = (await agent.catalogue.network("web")).with_(fabric="hostgw")
    begun = asyncio.get_running_loop().time()
    await agent.fabric.carry(unheard)
    assert asyncio.get_running_loop().time() - begun >= fabric.CARRY_PATIENCE


async def test_an_add_does_not_wait_for_nodes_that_nobody_has_named_yet(idle: Agent) -> None:
    await network(idle.store, "10.64.0.0/20", name="web", fabric="vxlan", warm=0)
    await asyncio.wait_for(idle.fabric.carry(await idle.catalogue.network("web")), 0.5)
