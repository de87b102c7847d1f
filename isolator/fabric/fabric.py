"""The fabric of one node: the kernel is made to hold what leads to every other node's containers.

    cluster's topology, underlay, networks  -->  plan per node (plan.py)  -->  difference  -->  netlink (kernel.py)

A change of one node is worked out for that node alone, so its cost does not grow with the cluster. What somebody else
changed in the kernel is found by comparing all of it, when the kernel tells that something changed and every few
seconds, whatever else there is to do meanwhile. What cannot be made, a device for one, is said and stops nothing that
does not rest on it.

Until the cluster was listed, and IPAM knows the node's own addresses, nothing is touched: what an earlier agent left
goes on working. But for routes that take addresses of nodes' own networks for containers': they may be what keeps the
store from answering (``release``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import structlog

from ipam import grace
from ipam.catalogue import Catalogue
from ipam.cluster import Cluster
from ipam.keys import Family, IPAddress, IPNetwork
from ipam.node_addresses import NodeAddresses
from ipam.records import Network
from isolator.errors import KernelRefused
from isolator.fabric.device import DeviceSpec
from isolator.fabric.kernel import FabricKernel, Held
from isolator.fabric.plan import (
    OVERHEAD,
    SECOND_DEVICE,
    VXLAN_DEVICE,
    VXLAN_DEVICES,
    Here,
    Piece,
    Plan,
    Route,
    Station,
    at_home,
    cut,
    host,
    mac_of,
    parse_peer,
    released,
    towards,
    tunnel_family,
)
from isolator.underlay import Underlay

log = structlog.get_logger(__name__)

RESYNC_EVERY = 4.0
"""Seconds between comparisons with all that the kernel holds: what went without a word is back within 5."""

RESYNC_SHARE = 0.005
"""Of a processor, that comparisons may take which nothing gave cause for: with a thousand nodes they come seldomer."""

RESYNC_SELDOM = 60.0
"""Seconds between them at most."""

SETTLE = 0.05
"""Seconds in which changes gather before they are carried out."""

ADDRESS_PATIENCE = 1.0
"""Seconds that the first routes wait for the device's addresses, which they name: else all are made twice."""

ADDRESS_RETRY = 10.0
"""Seconds before an address for the device is asked for again."""

CARRY_PATIENCE = 1.0
"""Seconds that an ADD on a network that is new to the fabric waits for it."""

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
        self._fabrics: dict[str, str] = {}
        self._settled = asyncio.Event()
        self._resync_due = True
        self._resync_every = RESYNC_EVERY
        self._resync_at = 0.0
        self._wake = asyncio.Event()
        self._addresses_due = asyncio.Event()
        self._addresses_settled = asyncio.Event()
        self._missing: dict[Family, str] = {}
        self._devices: dict[str, DeviceSpec] = {}
        self._wanted: dict[str, DeviceSpec] = {}
        self._unwantable: dict[Family, str] = {}
        self._device_problems: dict[str, str] = {}
        self._across: set[str] = set()
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

    def rewound(self, seconds: float | None = None) -> None:
        """The store went back in time: what it does not know any more may be asserted anew, so nothing is withdrawn
        for so long."""
        whole = grace.SECONDS if seconds is None else seconds
        self._keep_until = asyncio.get_running_loop().time() + whole

    # -- what others need to know

    @property
    def port(self) -> int:
        """Of the netlink socket through which all is done."""
        return self._kernel.port

    def mtu(self, network: Network) -> int:
        """Bytes that a container on ``network`` can send in one packet."""
        mtu = self._underlay.mtu
        if network.fabric == "vxlan" and (families := self._families()):
            mtu -= OVERHEAD[families[0]]
        return mtu

    def tunnel_source(self, route: Route) -> str:
        """The address that packets of a tunnelled route come from; "" without the tunnel."""
        device = self._devices.get(route.device)
        return str(device.local) if device is not None else ""

    @property
    def carried(self) -> tuple[IPAddress, ...]:
        """The addresses that the first device has."""
        return self._devices[VXLAN_DEVICE].addresses if VXLAN_DEVICE in self._devices else ()

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
        remote = wanted.get(Station(route.device, held.mac))
        if held.remote is None or remote is None or held.remote == remote:
            return held
        return Held(
            held.mac, problem=f"{route.device} leads to {held.remote.ip}, and the node is at {remote.ip}"
        )

    def receives(self, mac: str, remote: str) -> tuple[str, str]:
        """The device that takes what another node sends by VXLAN to that MAC and address, and "", or "" and why none
        does."""
        if not self._devices:
            why = "; ".join(self._problems_of_devices()) or "it has no vxlan network"
            return "", f"the node has no device {VXLAN_DEVICE}: {why}"
        for name, device in self._devices.items():
            if (mac, remote) == (device.mac, str(device.local)):
                problem = self._device_problems.get(name, "")
                return ("", problem) if problem else (name, "")
        known = " or ".join(f"{device.mac} at {device.local}" for device in self._devices.values())
        return "", f"the packet is sent to {mac} at {remote}, and the node is {known}"

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
            "device": next(iter(self._devices), ""),
            "devices": {
                name: {"local": str(device.local), "mtu": device.mtu, "mac": device.mac, "port": device.port}
                for name, device in self._devices.items()
            },
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
        found = self._problems_of_devices()
        found += [
            f"the device has no IPv{family} address, so processes of this node reach no containers elsewhere: {why}"
            for family, why in sorted(self._missing.items())
        ]
        return found + self._refused + [text for of in self._problems.values() for text in of]

    def _problems_of_devices(self) -> list[str]:
        return [*self._unwantable.values(), *self._device_problems.values()]

    async def carry(self, network: Network) -> None:
        """Wait until a network that is new or different is carried as it says, or it is known why not; no longer than
        ``CARRY_PATIENCE``, and not at all before the store has said which nodes there are."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CARRY_PATIENCE):
                while self._begun and any(
                    self._fabrics.get(pool) != network.fabric for pool in network.pools
                ):
                    await self._settled.wait()

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

    async def _until_known(self) -> None:
        await self._cluster.listed.wait()
        while True:
            if self._addresses.known:
                return
            await asyncio.sleep(KNOWN_POLL)

    async def keep_kernel(self) -> None:
        """Keep the kernel as it should be, until cancelled."""
        await self._until_known()
        self._begun = self._all_dirty = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ADDRESS_PATIENCE):
                await self._addresses_settled.wait()
        loop = asyncio.get_running_loop()
        while True:
            if loop.time() >= self._resync_at:
                # At that time whatever is told meanwhile: in a cluster there is always something.
                self._resync_at = loop.time() + self._resync_every
                self._resync_due = True
            await self._settle()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._resync_at):
                    await self._wake.wait()
            await asyncio.sleep(SETTLE)
            self._wake.clear()

    async def keep_addresses(self) -> None:
        """Have the addresses that the device needs, until cancelled."""
        await self._until_known()
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

    def _families(self) -> tuple[Family, ...]:
        """Those of the underlay, in its order."""
        return tuple(dict.fromkeys(ip.version for ip in self._underlay.addresses))

    async def _settle(self) -> None:
        try:
            if not self._cluster.listed.is_set():
                # It is being listed anew. What was worked out before is kept up all the same.
                if self._resync_due:
                    await self._ensure_devices()
                    await self._resync()
                return
            fabrics = self._fabrics_of_pools()
            dirty = self._take_dirty()
            self._look_across(dirty)
            await self._ensure_devices()
            before, after = self._work_out(self._take_dirty(dirty))
            looks = self._resync_due
            if looks:
                await self._resync()
            elif before != after and await self._kernel.apply(before, after):
                self.kernel_changed()  # what was refused is told by the comparison
            # Routes lead elsewhere by now.
            unwanted = [name for name in VXLAN_DEVICES if name not in self._wanted]
            await self._remove_devices(
                [n for n in unwanted if looks or n in self._devices or n in self._device_problems]
            )
            if not self._device_problems:
                self._addresses.free_but(self.carried)
            self._fabrics = fabrics
            self._settled.set()
            self._settled = asyncio.Event()
        except KernelRefused as error:
            # What is half done is found by the next comparison.
            log.warning("fabric is not as it should be yet", why=str(error))
            self._resync_due = True

    def _take_dirty(self, dirty: Collection[str] = ()) -> set[str]:
        """Nodes that have changed, with those of ``dirty``; from now on none has."""
        taken, self._dirty = {*self._dirty, *dirty}, set()
        if self._all_dirty:
            self._all_dirty = False
            taken |= self._cluster.names() | self._plans.keys() | self._across
        return taken

    def _look_across(self, dirty: Iterable[str]) -> None:
        """Find the nodes that are reached over the underlay's other family alone."""
        here = self._families()
        for name in dirty:
            record = self._cluster.nodes().get(name) if name != self._node else None
            family = tunnel_family(here, parse_peer(record).families) if record is not None else None
            if family is not None and family != here[0]:
                self._across.add(name)
            elif record is not None or not self._keeps():
                self._across.discard(name)

    async def _ensure_devices(self) -> None:
        """Make the devices what they have to be. One that cannot be made is said, and leaves the others alone."""
        wanted = self._wanted_devices()
        if wanted == self._wanted and not self._resync_due:
            return
        self._wanted = wanted
        carried, before = self.carried, dict(self._devices)
        # One that this is to take the family of has to go first: two devices of one family are refused.
        in_the_way = [SECOND_DEVICE[d.local.version] for d in wanted.values() if d.name == VXLAN_DEVICE]
        await self._remove_devices(in_the_way)
        for name, spec in wanted.items():
            try:
                made = await self._kernel.ensure_device(spec)
            except KernelRefused as error:
                # It may be there all the same, and what leads into it is no worse than before.
                self._note_device(name, [error])
                continue
            self._devices[name] = replace(spec, addresses=made.addresses)
            self._note_device(name, made.refused)
            if made.new:
                log.info("fabric device is new", device=name)
                self._resync_due = True
        if self._devices != before:
            self._all_dirty = True  # routes name the devices and the first one's addresses
            if self.carried != carried or self._devices.keys() != before.keys():
                self._on_addresses()

    def _note_device(self, name: str, refused: Iterable[KernelRefused]) -> None:
        """What the kernel refuses of a device now; it is logged when it is news."""
        before = self._device_problems.pop(name, "")
        sentences = [f"{error}{_cure(error)}" for error in refused]
        if not sentences:
            return
        problem = f"the device {name} is not as it should be: {'; '.join(sentences)}"
        self._device_problems[name] = problem
        if problem != before:
            log.warning("fabric device is not as it should be", device=name, why="; ".join(sentences))

    async def _remove_devices(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                if await self._kernel.remove_device(name):
                    log.info("fabric device is gone", device=name)
            except KernelRefused as error:
                self._note_device(name, [error])
                continue
            self._note_device(name, [])
            if self._devices.pop(name, None) is not None:
                self._on_addresses()

    def _wanted_devices(self) -> dict[str, DeviceSpec]:
        """The devices by name: one for the underlay's first family, one for the other while a node needs it."""
        self._unwantable = {}
        if not self._tunnelled():
            return {}
        families = self._families()
        if not families:
            self._unwantable[4] = (
                "this node has no underlay address, so it has no tunnel to other nodes; "
                "give it a default route, or its agent --underlay"
            )
        wanted = {}
        for family in families if self._across else families[:1]:
            is_first = family == families[0]
            name = VXLAN_DEVICE if is_first else SECOND_DEVICE[family]
            mtu = self._underlay.mtu - OVERHEAD[family]
            if mtu < MTU_MIN:
                self._unwantable[family] = (
                    f"the underlay's MTU of {self._underlay.mtu} bytes leaves {mtu} in the tunnel over IPv{family}, "
                    f"and IPv6 needs {MTU_MIN}; raise that of {', '.join(self._underlay.links)}"
                )
                continue
            wanted[name] = DeviceSpec(
                mac=mac_of(self._node),
                local=next(ip for ip in self._underlay.addresses if ip.version == family),
                port=self._port,
                mtu=mtu,
                addresses=tuple(self._addresses.current().values()) if is_first else (),
                name=name,
            )
        return wanted

    def _work_out(self, dirty: Iterable[str]) -> tuple[Plan, Plan]:
        """Bring the plans of changed nodes up to date; what those nodes had before, and have now."""
        here = self._here()
        fabrics = self._fabrics_of_pools()
        before, after = Plan(), Plan()
        for name in dirty:
            before.add(self._plans.pop(name, Plan()))
            new, problems = self._plan_of(name, fabrics, here)
            after.add(new)
            if new.routes:
                self._plans[name] = new
            self._note_node(name, problems)
        return before, after.over(before) if self._keeps() else after

    def _note_node(self, name: str, problems: list[str]) -> None:
        """What keeps this node from another one's containers now; it is logged when it is news."""
        before = self._problems.pop(name, [])
        if problems:
            self._problems[name] = problems
        if problems and problems != before:
            log.warning("node is not reached", other=name, count=len(problems), first=problems[0])
        elif before and not problems:
            log.info("node is reached again", other=name)

    def _fabrics_of_pools(self) -> dict[str, str]:
        return {pool: network.fabric for network in self._catalogue.networks() for pool in network.pools}

    def _plan_of(self, name: str, fabrics: dict[str, str], here: Here) -> tuple[Plan, list[str]]:
        blocks = [
            piece
            for block in self._cluster.blocks_of(name)
            for piece in self._cut(Piece(block.cidr, fabrics.get(block.pool, "none")), block.pool, name)
            if not self._is_away(piece.destination, name)
        ]
        strays = self._cluster.strays_of(name)
        if name == self._node:
            # As with blocks, what a node's own network uses is none of ours, whoever was given it before.
            held = [(ip, pool) for ip, pool in strays if not self._catalogue.closed_in(host(ip), pool)]
            return at_home([*blocks, *_single(held, fabrics)]), []
        away = _single(((ip, pool) for ip, pool in strays if self._may_lead_to(ip, pool)), fabrics)
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

    def _is_away(self, part: IPNetwork, owner: str) -> bool:
        """Whether a block, or what is left of it, is one address, and another node has that: then it is that node's to
        lead to."""
        holding = self._cluster.holder_of(part.network_address) if part.num_addresses == 1 else None
        return holding is not None and holding.node != owner

    def _here(self) -> Here:
        return Here(
            name=self._node,
            families=self._families(),
            devices={
                device.local.version: name for name, device in self._devices.items() if name in self._wanted
            },
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
        begun = asyncio.get_running_loop().time()
        compared = await self._kernel.resync(desired, keep=self._keeps())
        self._resync_every = min(max(RESYNC_EVERY, compared.took / RESYNC_SHARE), RESYNC_SELDOM)
        self._resync_at = begun + self._resync_every
        if compared.done:
            log.info("fabric made as it should be", changes=len(compared.done), such_as=compared.done[:5])
        self._note(compared.refused)

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


def _single(held: Iterable[tuple[IPAddress, str]], fabrics: Mapping[str, str]) -> list[Piece]:
    """Addresses away from their blocks, each with its pool's name. fabrics: by pool."""
    return [Piece(host(ip), fabrics.get(pool, "none")) for ip, pool in held]


def _unknown(name: str, pieces: Iterable[Piece]) -> list[str]:
    return [
        f"{piece.destination} of node {name} is unreachable: nothing is known of that node; start its agent, or "
        "remove it"
        for piece in pieces
    ]
