"""`moorage endpoint trace`: how a packet would go from one place to another and back, hop by hop.

    SRC, DST --resolve--> ends (who has which address, from the store)
    for each family that both have, there and back:
        sender's agent: out   receiver's agent: in     (isolator/trace.py, asked by intents)

The first hop that does not hold is where the packet ends; those behind it are shown all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

from ipam import keys
from ipam.errors import InvalidInput, MoorageError, NotFound, StoreError
from ipam.intents import ask
from ipam.keys import IPAddress
from ipam.networks import list_networks
from ipam.nodes_networks import read_nodes_networks
from ipam.pools import geometry
from ipam.records import NODE_ENGINE, Address, AddressState, Intent, IntentKind, Node
from ipam.store.base import Store, prefix_end, read_prefix
from ipam.taken import FIRM
from isolator.policy.question import ANY
from isolator.policy.sending import Packet
from isolator.trace import Hop

NODE_PREFIX = "node:"
"""A node's own processes are meant by ``node:NAME``."""


@dataclass(frozen=True, slots=True)
class End:
    """Where a packet starts or ends.

    ip: "" for a node's processes that have no address of its device. problem: why nothing is there, "" if something is.
    outside: what there is behind an address that is no container's nor of a pool, "" if it is one of those.
    """

    name: str
    node: str
    ip: str
    family: int
    problem: str = ""
    outside: str = ""

    def __str__(self) -> str:
        where = (
            f"{self.name} on {self.node}"
            if self.node and not self.name.startswith(NODE_PREFIX)
            else self.name
        )
        return f"{self.ip} ({where})" if self.ip else where


@dataclass(slots=True)
class Way:
    """One direction of one family.

    packet: the one that begins. back: the answer's, which nobody has to be allowed to give. unbound: the address that
    an unbound socket of the source sends from, "" if nobody said.
    """

    source: End
    target: End
    packet: Packet = ANY
    back: bool = False
    hops: list[Hop] = field(default_factory=list)
    unbound: str = ""

    @property
    def broken(self) -> Hop | None:
        """The first hop that does not hold."""
        return next((hop for hop in self.hops if hop.holds is False), None)


async def trace(store: Store, source: str, target: str, packet: Packet = ANY) -> list[Way]:
    """Every way between the two, there and back. Raises NotFound, InvalidInput."""
    sources, targets = await _resolve(store, source), await _resolve(store, target)
    if any(end.outside for end in sources):
        raise InvalidInput(
            f"a trace begins at a container or at node:NAME, and {source} is neither; for another address see "
            "`moorage policy test`"
        )
    pairs = [(s, t) for s in sources for t in targets if s.family == t.family]
    if not pairs:
        raise InvalidInput(
            f"{source} has IPv{sources[0].family} and {target} IPv{targets[0].family}; name addresses of one family"
        )
    ways = [
        Way(s, t, packet, back)
        for pair in pairs
        for s, t, back in ((*pair, False), (*pair[::-1], True))
        if t.ip and not (back and s.outside)
    ]
    found = await asyncio.gather(*(_hops(store, way) for way in ways))
    for way, hops in zip(ways, found, strict=True):
        way.hops = hops
    return ways


async def _hops(store: Store, way: Way) -> list[Hop]:
    for end in (way.source, way.target):
        if end.problem:
            return [Hop(end.node or "store", "address", False, end.problem, "see `moorage ip list`")]
    out, answer = await _part(store, way, "out", way.source.node, {})
    way.unbound = str(answer.get("unbound") or "")
    if way.target.outside:
        # What is beyond the sending node's firewall is not moorage's to know.
        return [hop for hop in out if hop.at not in ("route", "fabric", "underlay")]
    into, _ = await _part(store, way, "in", way.target.node, answer.get("tunnel") or {})
    return out + into


async def _part(
    store: Store, way: Way, part: str, node: str, tunnel: dict[str, Any]
) -> tuple[list[Hop], dict[str, Any]]:
    evidence = {
        "part": part,
        "src": way.source.ip,
        "dst": way.target.ip,
        "back": way.back,
        "tunnel": tunnel,
        "proto": way.packet.protocol,
        "port": way.packet.port,
    }
    try:
        answer = await ask(store, node, Intent(kind=IntentKind.TRACE, evidence=evidence))
    except MoorageError as error:
        return [Hop(node, "agent", None, str(error), f"start the agent of node {node}")], {}
    if not answer.get("done"):
        return [Hop(node, "agent", None, str(answer.get("why")), f"see the log of node {node}'s agent")], {}
    return [Hop(**row) for row in answer["hops"]], answer


async def _resolve(store: Store, text: str) -> list[End]:
    """The addresses that are meant: by IP, by ``node:NAME``, or by the beginning of a container's id."""
    try:
        return [await _end_of_ip(store, ip_address(text))]
    except ValueError:
        pass
    if text.startswith(NODE_PREFIX):
        return await _ends_of_node(store, text.removeprefix(NODE_PREFIX))
    container, _, ifname = text.partition("/")
    found = [
        _end(ip, record)
        async for ip, record in _assigned(store)
        if record.container_id.startswith(container) and ifname in ("", record.ifname)
    ]
    names = sorted({end.name for end in found})
    if not container or not found:
        raise NotFound(
            f"no container or address {text!r} is known; see `moorage ip list`, or write node:NAME for a node's "
            "processes"
        )
    if len(names) > 1:
        listed = ", ".join(names[:5])
        raise NotFound(f"{text} is the beginning of {listed}; write one of these, or an address")
    return found


async def _end_of_ip(store: Store, ip: IPAddress) -> End:
    kv = await store.get(keys.address_key(ip))
    if kv is None:
        outside = await _outside(store, ip)
        problem = "" if outside else f"{ip} is assigned to nobody"
        return End("outside", "", str(ip), ip.version, problem, outside)
    record = Address.decode(kv.key, kv.value)
    if record.state is not AddressState.ASSIGNED:
        problem = f"{ip} is {record.state.value} on node {record.node}: no container has it"
        if record.state is not AddressState.COOLING and await store.get(keys.ALIVE + record.node) is None:
            problem += (
                f", as far as the store knows; {record.node} is not in touch with it, so a container that was started "
                "there since may be not known to other nodes yet"
            )
        return End("nobody", record.node, str(ip), ip.version, problem)
    return _end(ip, record)


async def _outside(store: Store, ip: IPAddress) -> str:
    """What is behind an address that is of no pool; "" if it is of one."""
    around = await read_nodes_networks(store)
    pools = [geometry(pool) for _, pools in await list_networks(store) for pool in pools]
    if any(ip in pool.cidr for pool in pools) and not around.is_firm(ip):
        return ""
    found = around.collisions(ip_network(ip), FIRM)
    whose = f"is {found[0].in_words}" if found else "is of no pool and no node"
    return f"{ip} {whose}; what answers there, and other firewalls, are not looked at"


def _end(ip: IPAddress, record: Address) -> End:
    own = record.engine == NODE_ENGINE
    name = record.container_id if own else f"{record.container_id}/{record.ifname}"
    return End(name, record.node, str(ip), ip.version)


async def _ends_of_node(store: Store, name: str) -> list[End]:
    kv = await store.get(keys.NODES + name)
    if kv is None:
        items, _ = await read_prefix(store, keys.NODES)
        known = ", ".join(item.key.removeprefix(keys.NODES) for item in items) or "none yet"
        raise NotFound(f"there is no node {name!r} (known: {known}); correct the name")
    own = {ip_address(text).version: text for text in Node.decode(kv.key, kv.value).vtep}
    return [End(NODE_PREFIX + name, name, own.get(family, ""), family) for family in (4, 6)]


async def _assigned(store: Store) -> AsyncIterator[tuple[IPAddress, Address]]:
    cursor: str | None = keys.ADDRESSES
    while cursor is not None:
        page = await store.page(cursor, prefix_end(keys.ADDRESSES))
        for kv in page.items:
            try:
                ip, record = keys.ip_of(kv.key), Address.decode(kv.key, kv.value)
            except StoreError:
                continue  # `moorage ip check` reports it
            if record.state is AddressState.ASSIGNED:
                yield ip, record
        cursor = page.next_key


def verdict(ways: Sequence[Way]) -> str:
    """One sentence: where it ends, or that every hop holds."""
    broken = next((way for way in ways if way.broken is not None), None)
    if broken is not None:
        hop = broken.broken
        assert hop is not None
        return f"{broken.source} -> {broken.target}: ends at {hop.at} of {hop.node}: {hop.says}"
    if outside := next((way.target.outside for way in ways if way.target.outside), ""):
        return f"every hop of the sending node holds; {outside}"
    unseen = {hop.node for way in ways for hop in way.hops if hop.holds is None}
    if unseen:
        return f"every hop that could be looked at holds; {', '.join(sorted(unseen))} could not be asked"
    return "every hop holds, there and back" + _unbound(ways)


def _unbound(ways: Sequence[Way]) -> str:
    """What is different for a socket that nobody bound; "" if that takes a way that was traced."""
    traced = {(way.source.ip, way.target.ip) for way in ways}
    for way in ways:
        if way.unbound and (way.unbound, way.target.ip) not in traced:
            what = "an unbound UDP server answers" if way.back else "what is not bound comes"
            return f"; but {what} from {way.unbound}, not from {way.source}: trace that as well"
    return ""
