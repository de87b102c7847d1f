"""The fabric of one node: the kernel is made to hold what leads to every other node's containers.

    cluster's topology, underlay, networks  -->  plan per node (plan.py)  -->  difference  -->  netlink (kernel.py)

A change of one node is worked out for that node alone, so its cost does not grow with the cluster. What somebody else
changed in the kernel is found by comparing all of it, when the kernel tells that something changed and every few
seconds. Until the cluster was listed, and IPAM knows the node's own addresses, nothing is touched: what an earlier
agent left goes on working. But for routes that take addresses of nodes' own networks for containers': they may be what
keeps the store from answering (``release``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Callable, Iterable

import structlog

from ipam.catalogue import Catalogue
from ipam.cluster import Cluster
from ipam.keys import Family, IPAddress, IPNetwork
from ipam.node_addresses import NodeAddresses
from ipam.records import Network
from ipam.sync import REWIND_GRACE
from isolator.errors import KernelRefused
from isolator.fabric.device import DeviceSpec
from isolator.fabric.kernel import FabricKernel, Held
from isolator.fabric.plan import (
    OVERHEAD,
    VXLAN_DEVICE,
    Here,
    Piece,
    Plan,
    Route,
    at_home,
    cut,
    host,
    mac_of,
    parse_peer,
    released,
    towards,
)
from isolator.underlay import Underlay

log = structlog.get_logger(__name__)

RESYNC_EVERY = 5.0
"""Seconds between comparisons with all that the kernel holds."""

RESYNC_SHARE = 0.005
"""Of the time, that comparisons may take which nothing gave cause for: with a thousand nodes they come less often."""

RESYNC_SELDOM = 60.0
"""Seconds between them at most."""

SETTLE = 0.05
"""Seconds in which changes gather before they are carried out."""

ADDRESS_PATIENCE = 1.0
"""Seconds that the first routes wait for the device's addresses, which they name: else all are made twice."""

ADDRESS_RETRY = 10.0
"""Seconds before an address for the device is asked for again."""

KNOWN_POLL = 0.1
"""Seconds between looks whether IPAM knows what this node holds, at the start."""

MTU_MIN = 1280
"""Bytes; without that there is no IPv6 on the device (RFC 8200 section 5)."""


class Fabric:
    """See the module's docstring.

    port: UDP, of this node's tunnel. on_addresses: told when the device's addresses may be others now.
    is_leaving: whether the node is drained and has no containers left; then it keeps no address of its own either.
    """

    def __init__(
        self,
        node: str,
        port: int,
        cluster: Cluster,
        catalogue: Catalogue,
        addresses: NodeAddresses,
        on_addresses: Callable[[], None],
        is_leaving: Callable[[], bool],
    ) -> None:
        self._node = node
        self._port = port
        self._cluster = cluster
        self._catalogue = catalogue
        self._addresses = addresses
        self._on_addresses = on_addresses
        self._is_leaving = is_leaving
        self._kernel = FabricKernel()
        self._underlay = Underlay((), 0, ())
        self._plans: dict[str, Plan] = {}
        self._problems: dict[str, list[str]] = {}
        self._dirty: set[str] = set()
        self._begun = False
        self._all_dirty = True
        self._resync_due = True
        self._resync_every = RESYNC_EVERY
        self._wake = asyncio.Event()
        self._addresses_due = asyncio.Event()
        self._addresses_settled = asyncio.Event()
        self._missing: dict[Family, str] = {}
        self._device: DeviceSpec | None = None
        self._device_problem = ""
        self._refused: list[str] = []
        self._keep_until = 0.0

    def close(self) -> None:
        """Let go of the kernel; what it holds stays."""
        self._kernel.close()

    # -- what is told

    def topology_changed(self, nodes: set[str]) -> None:
        """Facts, blocks or strays of these nodes are different."""
        self._dirty |= nodes
        self._wake.set()

    def networks_changed(self) -> None:
        """The catalogue is different."""
        self._all_dirty = True
        self._addresses_due.set()
        self._wake.set()

    def addresses_changed(self) -> None:
        """One of the node's own addresses was lost, or is not to be kept."""
        self._addresses_due.set()

    def underlay_changed(self, underlay: Underlay) -> None:
        """The node reaches the others another way."""
        if underlay != self._underlay:
            self._underlay = underlay
            self._all_dirty = True
        self.kernel_changed()

    def kernel_changed(self) -> None:
        """Somebody changed something that may be the fabric's."""
        self._resync_due = True
        self._wake.set()

    def rewound(self) -> None:
        """The store went back in time: what it does not know any more may be asserted anew, so nothing is withdrawn
        for a while."""
        self._keep_until = asyncio.get_running_loop().time() + REWIND_GRACE

    # -- what others need to know

    @property
    def port(self) -> int:
        """Of the netlink socket through which all is done."""
        return self._kernel.port

    def mtu(self, network: Network) -> int:
        """Bytes that a container on ``network`` can send in one packet."""
        mtu = self._underlay.mtu
        if network.fabric == "vxlan" and (family := self._tunnel_family()) is not None:
            mtu -= OVERHEAD[family]
        return mtu

    @property
    def tunnel_source(self) -> str:
        """The address that this node's tunnel packets come from; "" without a tunnel."""
        return str(self._device.local) if self._device is not None else ""

    @property
    def carried(self) -> tuple[IPAddress, ...]:
        """The addresses that the device has."""
        return self._device.addresses if self._device is not None else ()

    def way_to(self, ip: IPAddress) -> Route | str:
        """The route that leads to another node's address, or why there is none."""
        holding = self._cluster.holder_of(ip)
        node = holding.node if holding is not None else self._cluster.owner_of(ip)
        if not node:
            return f"no node has {ip}, nor the block that it lies in"
        routes = self._plans.get(node, Plan()).routes
        for destination in (host(ip), *routes):
            if destination in routes and ip in destination:
                return routes[destination]
        if problems := self._problems.get(node):
            return problems[0]
        return f"{ip} is on node {node}, and its network has no fabric that leads there"

    async def held_for(self, route: Route) -> Held:
        """What the kernel holds of the tunnel that a route leads into; without a remote if that is another than
        it should be."""
        held = await self._kernel.held_for(route)
        wanted = {mac: remote for plan in self._plans.values() for mac, remote in plan.tunnels.items()}
        remote = wanted.get(held.mac)
        if held.remote is None or remote is None or held.remote == remote:
            return held
        return Held(
            held.mac, problem=f"{VXLAN_DEVICE} leads to {held.remote.ip}, and the node is at {remote.ip}"
        )

    def receives(self, mac: str, remote: str) -> str:
        """Why this node does not take what another sends by VXLAN to that MAC and address; "" if it does."""
        device = self._device
        if device is None:
            return (
                f"the node has no device {VXLAN_DEVICE}: {self._device_problem or 'it has no vxlan network'}"
            )
        if (mac, remote) != (device.mac, str(device.local)):
            return f"the packet is sent to {mac} at {remote}, and the node is {device.mac} at {device.local}"
        return ""

    def status(self) -> dict[str, object]:
        """For `moorage status`."""
        total = Plan()
        for plan in self._plans.values():
            total.add(plan)
        return {
            "underlay": {
                "links": list(self._underlay.links),
                "addresses": [str(ip) for ip in self._underlay.addresses],
                "mtu": self._underlay.mtu,
            },
            "device": VXLAN_DEVICE if self._device is not None else "",
            "addresses": [str(ip) for ip in self.carried],
            "routes": len(total.routes),
            "tunnels": len(total.tunnels),
            "problems": self.problems(),
        }

    def problems(self) -> list[str]:
        """Sentences about what is not as it should be."""
        if not self._begun:
            return [
                "the store has not said yet which nodes there are, so what an earlier agent left in the kernel stays "
                "as it is; see that the store answers"
            ]
        found = [self._device_problem] if self._device_problem else []
        found += [
            f"the device has no IPv{family} address, so processes of this node reach no containers elsewhere: {why}"
            for family, why in sorted(self._missing.items())
        ]
        return found + self._refused + [text for of in self._problems.values() for text in of]

    # -- work

    async def release(self) -> None:
        """Before anything else was heard: what an earlier agent left in the kernel lets nodes' own networks go.

        Raises KernelRefused.
        """
        if self._begun:
            return  # plans are without them anyway
        held = await self._kernel.held()
        kept = released(held, self._catalogue.closed_in, self._catalogue.around.is_firm)
        if captured := sorted(map(str, held.routes.keys() - kept.routes.keys())):
            log.warning(
                "routes to containers captured addresses of nodes' own networks; they were cut back",
                count=len(captured),
                such_as=captured[:5],
            )
            for error in await self._kernel.apply(held, kept):
                log.warning("a route was not cut back", why=str(error))

    async def run(self) -> None:
        """Keep the kernel as it should be, until cancelled."""
        await self._cluster.listed.wait()
        await self._until_known()
        self._begun = self._all_dirty = True
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_kernel())
            group.create_task(self._keep_addresses())

    async def _until_known(self) -> None:
        while True:
            if self._addresses.known:
                return
            await asyncio.sleep(KNOWN_POLL)

    async def _keep_kernel(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ADDRESS_PATIENCE):
                await self._addresses_settled.wait()
        while True:
            await self._settle()
            try:
                async with asyncio.timeout(self._resync_every):
                    await self._wake.wait()
            except TimeoutError:
                self._resync_due = True
            await asyncio.sleep(SETTLE)
            self._wake.clear()

    async def _keep_addresses(self) -> None:
        while True:
            missing = await self._addresses.settle([] if self._is_leaving() else self._tunnelled())
            if missing and missing != self._missing:
                log.warning("fabric device lacks an address", why="; ".join(missing.values()))
            self._missing = missing
            self._addresses_settled.set()
            self._wake.set()  # the device gets what it lacks, and what it has lost is freed
            try:
                async with asyncio.timeout(ADDRESS_RETRY):
                    await self._addresses_due.wait()
            except TimeoutError:
                pass
            self._addresses_due.clear()

    def _tunnelled(self) -> list[Network]:
        return sorted((n for n in self._catalogue.networks() if n.fabric == "vxlan"), key=lambda n: n.name)

    def _tunnel_family(self) -> Family | None:
        return self._underlay.addresses[0].version if self._underlay.addresses else None

    async def _settle(self) -> None:
        if not self._cluster.listed.is_set():
            return
        try:
            await self._ensure_device()
            before, after = self._work_out()
            if self._resync_due:
                await self._resync()
            elif before != after and await self._kernel.apply(before, after):
                self.kernel_changed()  # what was refused is told by the comparison
        except KernelRefused as error:
            # What is half done is found by the next comparison.
            log.warning("fabric is not as it should be yet", why=str(error))
            self._resync_due = True

    async def _ensure_device(self) -> None:
        spec = self._wanted_device()
        if spec != self._device or self._resync_due:
            try:
                new = await self._kernel.ensure_device(spec)
            except KernelRefused as error:
                self._device_problem = (
                    f"the device {VXLAN_DEVICE} is not as it should be: {error}{_cure(error)}"
                )
                raise
            if new:
                log.info("fabric device is new" if spec else "fabric device is gone", device=VXLAN_DEVICE)
            self._resync_due = self._resync_due or new
            if spec != self._device:
                self._device = spec
                self._all_dirty = True  # routes name the device and its addresses
                self._on_addresses()
        self._addresses.free_but(self.carried)

    def _wanted_device(self) -> DeviceSpec | None:
        family = self._tunnel_family()
        self._device_problem = ""
        if not self._tunnelled():
            return None
        if family is None:
            self._device_problem = (
                "this node has no underlay address, so it has no tunnel to other nodes; "
                "give it a default route, or its agent --underlay"
            )
            return None
        mtu = self._underlay.mtu - OVERHEAD[family]
        if mtu < MTU_MIN:
            self._device_problem = (
                f"the underlay's MTU of {self._underlay.mtu} bytes leaves {mtu} in the tunnel, and IPv6 needs "
                f"{MTU_MIN}; raise that of {', '.join(self._underlay.links)}"
            )
            return None
        return DeviceSpec(
            mac=mac_of(self._node),
            local=self._underlay.addresses[0],
            port=self._port,
            mtu=mtu,
            addresses=tuple(self._addresses.current().values()),
        )

    def _work_out(self) -> tuple[Plan, Plan]:
        """Bring the plans of changed nodes up to date; what those nodes had before, and have now."""
        dirty, self._dirty = self._dirty, set()
        if self._all_dirty:
            self._all_dirty = False
            dirty = self._cluster.names() | self._plans.keys() | dirty
        here = self._here()
        fabrics = {pool: n.fabric for n in self._catalogue.networks() for pool in n.pools}
        before, after = Plan(), Plan()
        for name in dirty:
            before.add(self._plans.pop(name, Plan()))
            new, problems = self._plan_of(name, fabrics, here)
            after.add(new)
            if new.routes:
                self._plans[name] = new
            self._problems.pop(name, None)
            if problems:
                self._problems[name] = problems
        return before, after.over(before) if self._keeps() else after

    def _plan_of(self, name: str, fabrics: dict[str, str], here: Here) -> tuple[Plan, list[str]]:
        blocks = [
            piece
            for block in self._cluster.blocks_of(name)
            if not self._is_away(block.cidr, name)
            for piece in self._cut(Piece(block.cidr, fabrics.get(block.pool, "none")), block.pool, name)
        ]
        if name == self._node:
            return at_home(blocks), []
        away = (
            Piece(host(ip), fabrics.get(pool, "none"))
            for ip, pool in self._cluster.strays_of(name)
            if self._may_lead_to(ip, pool)
        )
        pieces = [piece for piece in (*blocks, *away) if piece.fabric != "none"]
        record = self._cluster.nodes().get(name)
        if record is None:
            return Plan(), _unknown(name, pieces)
        return towards(parse_peer(record), pieces, here)

    def _cut(self, block: Piece, pool: str, owner: str) -> list[Piece]:
        """A block without what nodes' own networks use; another node's still with containers that have such
        addresses."""
        closed = self._catalogue.closed_in(block.destination, pool)
        if not closed or owner == self._node:
            return cut(block, closed, ())
        assigned = self._cluster.assigned_in(block.destination, closed)
        return cut(block, closed, (ip for ip in assigned if self._may_lead_to(ip, pool)))

    def _may_lead_to(self, ip: IPAddress, pool: str) -> bool:
        """Whether a route may lead to that address alone: a node's own network comes first, unless all that it has in
        common is the prefix, and a container had the address before that was known."""
        if not self._catalogue.closed_in(host(ip), pool):
            return True
        holding = self._cluster.holder_of(ip)
        is_assigned = holding is not None and holding.is_assigned
        return is_assigned and not self._catalogue.around.is_firm(ip)

    def _is_away(self, block: IPNetwork, owner: str) -> bool:
        """Whether a block is one address, and another node has that: then it is that node's to lead to."""
        holding = self._cluster.holder_of(block.network_address) if block.num_addresses == 1 else None
        return holding is not None and holding.node != owner

    def _here(self) -> Here:
        return Here(
            name=self._node,
            tunnel_family=self._tunnel_family() if self._device is not None else None,
            port=self._port,
            link=self._underlay.links[0] if len(self._underlay.links) == 1 else "",
            sources={ip.version: ip for ip in self.carried},
        )

    def _keeps(self) -> bool:
        """Whether nothing is withdrawn now. What is too much by then goes with the first comparison after it."""
        return asyncio.get_running_loop().time() < self._keep_until

    async def _resync(self) -> None:
        self._resync_due = False
        desired = Plan()
        for plan in self._plans.values():
            desired.add(plan)
        begun = time.monotonic()
        done, refused = await self._kernel.resync(desired, keep=self._keeps())
        took = time.monotonic() - begun
        self._resync_every = min(max(RESYNC_EVERY, took / RESYNC_SHARE), RESYNC_SELDOM)
        if done:
            log.info("fabric made as it should be", changes=len(done), such_as=done[:5])
        self._note(refused)

    def _note(self, refused: list[KernelRefused]) -> None:
        sentences = [f"{error}{_cure(error)}" for error in refused]
        if sentences and sentences != self._refused:
            log.warning(
                "routes to other nodes are refused by the kernel", count=len(refused), first=sentences[0]
            )
        self._refused = sentences[:10]


def _cure(error: KernelRefused) -> str:
    match error.errno:
        case errno.ENETUNREACH | errno.EHOSTUNREACH:
            return "; hostgw needs nodes on one segment, use `moorage network set --fabric vxlan` for others"
        case errno.EADDRINUSE:
            return "; something else on this node has that UDP port, give every agent another --vxlan-port"
        case errno.ENETDOWN:
            return "; bring the link up"
        case _:
            return ""


def _unknown(name: str, pieces: Iterable[Piece]) -> list[str]:
    return [
        f"{piece.destination} of node {name} is unreachable: nothing is known of that node; start its agent, or "
        "remove it"
        for piece in pieces
    ]
