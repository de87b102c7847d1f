"""The node's own addresses: one of each family, for its VXLAN device, so that its processes reach all containers.

An own address is assigned as a container's is, to ``node:<name>`` and with the engine ``moorage``: it lies in one of
the node's blocks, and is a key of its own. It is no container's, so it keeps nobody from removing a drained node or
deleting a network: in a pool that is disabled it is given up, without a cooldown, because nothing new is
given out there. Before it is free, the device has to be rid of it:

    settle()     it is not wanted any more    current() is without it, so the device loses it
    free_but()   the device has lost it       given up
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ipam.catalogue import Catalogue
from ipam.errors import Exhausted, MoorageError
from ipam.holder import Holder, Owner
from ipam.keys import Family, IPAddress
from ipam.named import AddressRequest
from ipam.pools import Geometry
from ipam.records import NODE_ENGINE, Network

FAMILIES: tuple[Family, ...] = (4, 6)


class NodeAddresses:
    """See the module's docstring. ifname: of the device that has them."""

    def __init__(self, node: str, ifname: str, holder: Holder, catalogue: Catalogue) -> None:
        self._owner = Owner(container_id=f"node:{node}", ifname=ifname, engine=NODE_ENGINE)
        self._holder = holder
        self._catalogue = catalogue
        self._unwanted: set[IPAddress] = set()

    @property
    def known(self) -> bool:
        """Whether ``current`` can be believed: not while the journal is lost and the store was not heard."""
        return self._holder.serves

    def current(self) -> dict[Family, IPAddress]:
        """What the node has now, by family, IPv4 first."""
        first: dict[Family, IPAddress] = {}
        for ip in self._mine():
            if ip not in self._unwanted:
                first.setdefault(ip.version, ip)
        return first

    def _mine(self) -> list[IPAddress]:
        held = self._holder.assigned()
        mine = [ip for ip, of in held.items() if of.record is not None and of.record.is_nodes_own]
        return sorted(mine, key=lambda ip: (ip.version, int(ip)))

    async def settle(self, networks: Iterable[Network]) -> dict[Family, str]:
        """Have one address of every family that the networks' enabled pools offer, and want no other.

        One without the other is of use, so each is had by itself, unlike a container's. Returns why a family has none,
        for those that it could not be had for.
        """
        usable = list(networks)
        pools = {family: self._pools(usable, family) for family in FAMILIES}
        kept: set[Family] = set()
        self._unwanted.clear()
        for ip in self._mine():
            fits = any(pool.usable(ip) for pool in pools[ip.version]) and not self._holder.is_returning(ip)
            if ip.version not in kept and fits:
                kept.add(ip.version)
            else:
                self._unwanted.add(ip)
        missing: dict[Family, str] = {}
        for family in FAMILIES:
            if family not in kept and pools[family]:
                try:
                    await self._take(usable, pools[family], family)
                except MoorageError as error:
                    missing[family] = str(error)
        return missing

    def free_but(self, carried: Collection[IPAddress]) -> None:
        """Give up what is not wanted, but for what the device has."""
        for ip in self._unwanted - set(carried):
            self._unwanted.discard(ip)
            self._holder.give_up(ip)

    def _pools(self, networks: Sequence[Network], family: Family) -> list[Geometry]:
        """Those that the node has a block of come first: no other block is claimed for it then."""
        found = [
            pool
            for network in networks
            for pool in self._catalogue.pools_of(network, family)
            if not pool.disabled
        ]
        own = self._holder.pools_of_blocks()
        return sorted(found, key=lambda pool: (pool.name not in own, pool.network, pool.name))

    async def _take(self, networks: Sequence[Network], pools: Sequence[Geometry], family: Family) -> None:
        """Take an address of the first pool that has one."""
        for place, pool in enumerate(pools, start=1):
            network = next(n for n in networks if n.name == pool.network)
            request = AddressRequest(
                network, pool=pool.name, keeps_warm=False, counts={family: 1}, netgroups=()
            )
            try:
                taken = await self._holder.take(request)
                break
            except Exhausted:
                if place == len(pools):
                    raise
        self._holder.assign(taken, self._owner)
