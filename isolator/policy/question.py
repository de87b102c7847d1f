"""Questions about policy, answered from the store's records: may this address call that one, and why.

The answer comes from the same clauses that the rules are made of (callers.py); so it is what the table does, on the
node of the called one, once that node has heard what the store says. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from shlex import quote

from ipam.isolation import NODES, STORE, addresses_of_node
from ipam.keys import IPAddress, IPNetwork
from ipam.netgroups import PUBLIC
from ipam.records import Address, AddressState, Network, Node
from isolator.policy.callers import NETGROUPS, Caller, Callers, Verdict, callers, isolation_of, judge
from isolator.policy.sending import ICMP_ERROR, Drop, Packet, may_send, may_tunnel
from isolator.unbound import Interface, Unbound, unbound

ANY = Packet()
"""A call of which the port is not said."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the store says.

    addresses: in any state. pools: without what nodes' own networks use. pools_of: whole ones, by network. nodes:
    address -> name of its node. underlays: those that tunnel packets come from.
    tunnels: UDP ports. stores: where the store listens, with TCP ports.
    """

    addresses: Mapping[IPAddress, Address]
    networks: Mapping[str, Network]
    pools: Sequence[IPNetwork]
    nodes: Mapping[IPAddress, str]
    underlays: frozenset[IPAddress] = frozenset()
    tunnels: frozenset[int] = frozenset()
    stores: frozenset[tuple[IPAddress, int]] = frozenset()
    pools_of: Mapping[str, Sequence[IPNetwork]] = field(default_factory=dict)

    def endpoint(self, ip: IPAddress) -> Address | None:
        """The record of a container's address; None for any other address."""
        record = self.addresses.get(ip)
        if record is None or record.state is not AddressState.ASSIGNED or record.is_nodes_own:
            return None
        return record

    def in_pool(self, ip: IPAddress) -> bool:
        return any(ip.version == pool.version and ip in pool for pool in self.pools)


def addresses_of_nodes(nodes: Iterable[Node], addresses: Mapping[IPAddress, Address]) -> dict[IPAddress, str]:
    """Address -> node, of everything that is a node's own."""
    found = {ip: record.node for ip, record in addresses.items() if record.is_nodes_own}
    for node in nodes:
        found |= dict.fromkeys(addresses_of_node(node), node.name)
    return found


def netgroups_of(record: Address) -> tuple[str, ...]:
    """A container's netgroups; the network's own name if none are recorded."""
    return tuple(record.netgroups) or (record.network,)


def callers_of(known: Known, record: Address) -> Callers:
    """Who may call a container's address."""
    network = known.networks.get(record.network)
    return callers(netgroups_of(record), isolation_of(network) if network is not None else NETGROUPS)


def may_call(known: Known, source: IPAddress, target: IPAddress, packet: Packet = ANY) -> Verdict:
    """Whether ``source`` may begin a connection to ``target``, on any port but where ``packet`` names one."""
    if source.version != target.version:
        return Verdict(False, f"{source} and {target} are of different families")
    sent = _may_send(known, source, target, packet)
    if not sent.allowed:
        return sent
    if packet.protocol == ICMP_ERROR:
        return _may_report(known, source, target, sent)
    called = known.endpoint(target)
    if called is None:
        return _no_container(known, target)
    caller = known.endpoint(source)
    if caller is None and known.nodes.get(source) == called.node:
        return Verdict(True, f"node {called.node} reaches all its own containers")
    if caller is None and source not in known.nodes and known.in_pool(source):
        why = f"{source} is of our pools and no container has it; nobody can send from it (unused-address)"
        return Verdict(False, why, Drop.UNUSED_ADDRESS.value)
    groups = netgroups_of(caller) if caller is not None else ()
    return judge(Caller(source, groups, source in known.nodes), callers_of(known, called))


def unbound_source(
    known: Known, source: IPAddress, target: IPAddress, is_default: Callable[[Address], bool]
) -> Unbound | None:
    """What an unbound socket of the container that has ``source`` uses to reach ``target``.

    is_default: whether an address's endpoint was chosen to have the default route. None if no container has the source,
    or the target is that container's own.
    """
    record = known.endpoint(source)
    if record is None:
        return None
    container = (record.node, record.container_id)
    own = [
        (ip, other)
        for ip, other in known.addresses.items()
        if (other.node, other.container_id) == container and known.endpoint(ip) is not None
    ]
    if any(ip == target for ip, _ in own):
        return None
    there: dict[str, Interface] = {}
    for ip, other in sorted(own, key=lambda item: (item[0].version, item[0].packed)):
        ips = (*there[other.ifname].ips, ip) if other.ifname in there else (ip,)
        pools = tuple(known.pools_of.get(other.network, ()))
        there[other.ifname] = Interface(other.ifname, ips, pools, is_default(other))
    return unbound(there.values(), target)


def _may_report(known: Known, source: IPAddress, target: IPAddress, sent: Verdict) -> Verdict:
    """Whether an ICMP error may arrive: it is about a packet from ``target``, which one of the two began to send."""
    ways = (may_call(known, one, other) for one, other in ((target, source), (source, target)))
    return next((sent for way in ways if way.allowed), may_call(known, source, target))


def _may_send(known: Known, source: IPAddress, target: IPAddress, packet: Packet) -> Verdict:
    """What is judged where the packet is sent, or by the node that it is sent to."""
    sender = known.endpoint(source)
    if sender is not None:
        network = known.networks.get(sender.network)
        reaches_store = network is not None and STORE in network.to_node
        return may_send(target, packet, known.tunnels, known.stores, reaches_store=reaches_store)
    if target in known.nodes:
        return may_tunnel(source, packet, known.tunnels, known.underlays)
    return Verdict(True, "nothing keeps it from being sent")


def cure(known: Known, source: IPAddress, target: IPAddress, packet: Packet = ANY) -> str:
    """The command that would allow a call that is denied, or that shows more of an address nobody has; "" for none."""
    if source.version != target.version:
        return ""
    verdict = may_call(known, source, target, packet)
    sender = known.endpoint(source)
    if verdict.drop == Drop.STORE and sender is not None:
        return f"moorage network set {quote(sender.network)} --to-node {STORE}"
    if verdict.allowed or verdict.drop in (Drop.TUNNEL_PORT, Drop.TUNNEL_SOURCE):
        return ""
    called, caller = known.endpoint(target), known.endpoint(source)
    if called is None:
        return f"moorage ip show {target}"
    if caller is not None:
        return _in_one_netgroup(caller, called)
    if source not in known.nodes and known.in_pool(source):
        return f"moorage ip show {source}"
    network = known.networks.get(called.network)
    if network is None:
        return ""
    sources = (*network.allow_from, NODES if source in known.nodes else str(source))
    options = " ".join(f"--allow-from {quote(one)}" for one in sources)
    return f"moorage network set {quote(called.network)} {options}"


def _in_one_netgroup(caller: Address, called: Address) -> str:
    """The command that takes one of two containers into a netgroup of the other."""
    joining, groups = called, [group for group in netgroups_of(caller) if group != PUBLIC][:1]
    if not groups:
        joining, groups = caller, list(netgroups_of(called))[:1]
    wanted = " ".join((*netgroups_of(joining), *groups))
    return f"moorage endpoint set-netgroups {quote(f'{joining.container_id}/{joining.ifname}')} {wanted}"


def _no_container(known: Known, target: IPAddress) -> Verdict:
    if target in known.nodes:
        why = (
            f"{target} is node {known.nodes[target]}'s own; what a node serves is its firewall's to judge, but for the "
            "tunnels' and the store's ports"
        )
        return Verdict(True, why)
    if known.in_pool(target):
        return Verdict(False, f"no container has {target}")
    kept = sorted({port for ip, port in known.stores if ip == target})
    but = f", but on TCP port {', '.join(map(str, kept))}, which is the store's" if kept else ""
    return Verdict(
        True, f"{target} is outside of all pools; moorage does not keep containers from calling there{but}"
    )
