"""What the table should hold: this node's endpoints, and which addresses of the cluster are in which netgroups.

    admissions      own endpoints      -> elements by interface and address, and a chain for who may call them
    others          ip -> netgroups    -> a set for each netgroup that an own endpoint is in, and none for others

Every method changes the book and returns the ``Change`` that makes the table like it again: elements only, but for
the first and last endpoint with certain callers. So a change costs the same however many endpoints there are.
Pure: no kernel, no nft text but the elements' own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from itertools import chain
from typing import TypeVar

from ipam.keys import IPNetwork
from ipam.netgroups import PUBLIC
from isolator.model import IPAddress, PortMapping
from isolator.policy.callers import NETGROUPS, Anyone, Callers, Isolation, Sharing, callers
from isolator.policy.names import chain_of_callers, set_of_netgroup

T = TypeVar("T")

DEFAULT_CONNECTIONS = 13107
"""A twentieth of the table that Linux makes on a machine with 4 GiB and more (262,144)."""

PROTOCOL_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
"""Not their names: nft looks those up in /etc/protocols, which may be missing."""

INTERVALS = ("pools", "nat", "open", "tunnelled", "tostore")
"""Sets of networks, less their family, in the order of Surroundings' fields."""


@dataclass(frozen=True, slots=True)
class Admission:
    """An endpoint that may communicate. isolation: its network's, as it was when the endpoint was admitted."""

    host_ifname: str
    mac: str
    ips: tuple[IPAddress, ...]
    network: str = ""
    netgroups: tuple[str, ...] = ()
    isolation: Isolation = NETGROUPS
    ports: tuple[PortMapping, ...] = ()

    @property
    def callers(self) -> Callers:
        return callers(self.netgroups, self.isolation)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is around the endpoints.

    pools: where containers' addresses come from; traffic between them is never masqueraded. nat_pools: those whose
    traffic to elsewhere is. open_pools: those of open networks. tunnelled_pools: those of networks whose containers
    other nodes reach by the tunnel only. store_pools: those of networks whose containers may talk to the store.
    isolation: of every network, by name. connections: that an endpoint may have tracked where its network says nothing.
    """

    pools: tuple[IPNetwork, ...] = ()
    nat_pools: tuple[IPNetwork, ...] = ()
    open_pools: tuple[IPNetwork, ...] = ()
    tunnelled_pools: tuple[IPNetwork, ...] = ()
    store_pools: tuple[IPNetwork, ...] = ()
    isolation: Mapping[str, Isolation] = field(default_factory=dict)
    connections: int = DEFAULT_CONNECTIONS


@dataclass(frozen=True, slots=True)
class Hosts:
    """The machines under the containers.

    nodes: all addresses that nodes call from. underlays: those that their tunnels come from. here: this node's own of
    those. tunnels: UDP ports of all nodes' tunnels. tunnel: this node's, 0 while it has none or while nobody has said
    which nodes there are, and then it takes what anybody sends. stores: the store's endpoints, with their TCP ports.
    """

    nodes: frozenset[IPAddress] = frozenset()
    underlays: frozenset[IPAddress] = frozenset()
    here: frozenset[IPAddress] = frozenset()
    tunnels: frozenset[int] = frozenset()
    tunnel: int = 0
    stores: frozenset[tuple[IPAddress, int]] = frozenset()

    def elements(self) -> set[tuple[str, str]]:
        """(set, element) of all of it."""
        return {
            *(
                (f"{name}{ip.version}", str(ip))
                for name, ips in (
                    ("nodes", self.nodes),
                    ("underlays", self.underlays),
                    ("here", self.here),
                    ("stores", {ip for ip, _ in self.stores}),
                )
                for ip in ips
            ),
            *(("tunnels", str(port)) for port in self.tunnels),
            *(("guarded", f"{PROTOCOL_NUMBERS['udp']} . {port}") for port in self.tunnels),
            *(("guarded", f"{PROTOCOL_NUMBERS['tcp']} . {port}") for _, port in self.stores),
            *([("tunnel", str(self.tunnel))] if self.tunnel else ()),
        }


@dataclass(slots=True)
class Change:
    """What is to be done to the table.

    elements: set or map -> element -> whether it is to be there. intervals: set -> all that it shall hold.
    """

    elements: defaultdict[str, dict[str, bool]] = field(default_factory=lambda: defaultdict(dict))
    intervals: dict[str, list[IPNetwork]] = field(default_factory=dict)
    new_netgroups: dict[str, None] = field(default_factory=dict)
    old_netgroups: dict[str, None] = field(default_factory=dict)
    new_chains: dict[Callers, None] = field(default_factory=dict)
    old_chains: dict[Callers, None] = field(default_factory=dict)

    @property
    def is_structural(self) -> bool:
        """Whether chains or sets come or go."""
        return bool(self.new_netgroups or self.old_netgroups or self.new_chains or self.old_chains)

    def put(self, elements: Iterable[tuple[str, str]], present: bool) -> None:
        for name, element in elements:
            self.elements[name][element] = present


class Book:
    """See the module's docstring."""

    def __init__(self) -> None:
        self.surroundings = Surroundings()
        self.intervals = _intervals(self.surroundings)
        self.hosts = Hosts()
        self.admissions: dict[str, Admission] = {}
        self._limits: dict[str, int] = {}
        self.halted: frozenset[str] = frozenset()
        self._others: dict[IPAddress, tuple[str, ...]] = {}
        self._here: dict[IPAddress, dict[str, tuple[str, ...]]] = {}
        self._endpoints_with: Counter[Callers] = Counter()
        self._chains_with: Counter[str] = Counter()

    # -- looking in

    def copy(self) -> Book:
        """One that later changes of this leave as it is. As cheap as copying a few dictionaries."""
        copy = Book()
        copy.surroundings, copy.intervals, copy.hosts = self.surroundings, self.intervals, self.hosts
        copy.admissions, copy._limits, copy.halted = self.admissions.copy(), self._limits.copy(), self.halted
        copy._others = self._others.copy()
        copy._here = {ip: groups.copy() for ip, groups in self._here.items()}
        copy._endpoints_with, copy._chains_with = self._endpoints_with.copy(), self._chains_with.copy()
        return copy

    def netgroups(self, ip: IPAddress) -> tuple[str, ...]:
        """What an address is a member of; own endpoints say it themselves, others the store."""
        here = self._here.get(ip)
        return (
            tuple({g: None for groups in here.values() for g in groups}) if here else self._others.get(ip, ())
        )

    def others(self) -> Mapping[IPAddress, tuple[str, ...]]:
        """Other nodes' endpoints that are in netgroups."""
        return self._others

    def _members(self, netgroup: str) -> Iterator[IPAddress]:
        """Everybody in a netgroup. By a look at all, some ms per 10,000: an index would be as large as what it is of,
        and this is only asked when a netgroup comes into use here, or all of the table is made."""
        yield from (ip for ip, groups in self._others.items() if netgroup in groups and ip not in self._here)
        yield from (ip for ip in self._here if netgroup in self.netgroups(ip))

    def netgroups_used(self) -> list[str]:
        """Netgroups that an own endpoint is in."""
        return list(self._chains_with)

    def everything(self) -> Change:
        """The change from an empty table to this book."""
        change = Change(
            new_netgroups=dict.fromkeys(self._chains_with), new_chains=dict.fromkeys(self._endpoints_with)
        )
        for netgroup in (PUBLIC, *self._chains_with):
            change.put(_in_netgroup(netgroup, self._members(netgroup)), present=True)
        for admission in self.admissions.values():
            change.put(self._elements(admission), present=True)
        change.put(map(_quoted, self._here), present=True)
        change.put(self.hosts.elements(), present=True)
        change.put(map(_halted, sorted(self.halted)), present=True)
        change.intervals = {name: networks for name, networks in self.intervals.items() if networks}
        return change

    def elements_of(self, admission: Admission) -> Iterator[tuple[str, str]]:
        """(set, element) of everything that the table has of an endpoint because it is there."""
        yield from self._elements(admission)
        yield from map(_quoted, admission.ips)
        for netgroup in admission.netgroups:
            if netgroup == PUBLIC or netgroup in self._chains_with:
                yield from _in_netgroup(netgroup, admission.ips)

    # -- own endpoints

    def admit(self, admission: Admission) -> Change:
        """An endpoint may communicate, or may from now on as this says."""
        change = Change()
        self._admit(admission, change)
        return change

    def _admit(self, admission: Admission, change: Change) -> None:
        before = self.admissions.get(admission.host_ifname)
        if before is not None:
            self._take_out(before, change)
        self._put_in(admission, change)
        if before is not None:
            self._stop_using(before.callers, change)

    def revoke(self, host_ifnames: Iterable[str]) -> Change:
        """These endpoints may not communicate any more."""
        change = Change()
        for name in host_ifnames:
            admission = self.admissions.get(name)
            if admission is not None:
                self._take_out(admission, change)
                self._stop_using(admission.callers, change)
        return change

    def _put_in(self, admission: Admission, change: Change) -> None:
        self.admissions[admission.host_ifname] = admission
        for ip in admission.ips:
            before = self.netgroups(ip)
            self._here.setdefault(ip, {})[admission.host_ifname] = admission.netgroups
            self._regroup(ip, before, change)
            change.put([_quoted(ip)], present=True)
        self._use(admission.callers, change)
        self._limits[admission.host_ifname] = self._limit(admission)
        change.put(self._elements(admission), present=True)

    def halt(self, host_ifnames: Iterable[str]) -> Change:
        """These endpoints, and no others, begin no connections."""
        before, self.halted = self.halted, frozenset(host_ifnames)
        change = Change()
        change.put(map(_halted, sorted(before - self.halted)), present=False)
        change.put(map(_halted, sorted(self.halted - before)), present=True)
        return change

    def limits(self) -> dict[str, int]:
        """host_ifname -> connections that the endpoint may have tracked."""
        return self._limits.copy()

    def _limit(self, admission: Admission) -> int:
        return admission.isolation.connections or self.surroundings.connections

    def _elements(self, admission: Admission) -> Iterator[tuple[str, str]]:
        name = admission.host_ifname
        yield "connections", f'"{name}" ct count over {self._limits[name]}'
        yield from elements_of(admission)

    def _take_out(self, admission: Admission, change: Change) -> None:
        del self.admissions[admission.host_ifname]
        change.put(self._elements(admission), present=False)
        del self._limits[admission.host_ifname]
        for ip in admission.ips:
            before = self.netgroups(ip)
            here = self._here[ip]
            del here[admission.host_ifname]
            if not here:
                del self._here[ip]
                change.put([_quoted(ip)], present=False)
            self._regroup(ip, before, change)

    def _use(self, may_call: Callers, change: Change) -> None:
        if not has_chain(may_call):
            return
        self._endpoints_with[may_call] += 1
        if self._endpoints_with[may_call] == 1:
            _turn(may_call, change.old_chains, change.new_chains)
            for netgroup in _shared(may_call):
                self._chains_with[netgroup] += 1
                if self._chains_with[netgroup] == 1:
                    _turn(netgroup, change.old_netgroups, change.new_netgroups)
                    change.put(_in_netgroup(netgroup, self._members(netgroup)), present=True)

    def _stop_using(self, may_call: Callers, change: Change) -> None:
        if not has_chain(may_call):
            return
        self._endpoints_with[may_call] -= 1
        if not self._endpoints_with[may_call]:
            del self._endpoints_with[may_call]
            _turn(may_call, change.new_chains, change.old_chains)
            for netgroup in _shared(may_call):
                self._chains_with[netgroup] -= 1
                if not self._chains_with[netgroup]:
                    del self._chains_with[netgroup]
                    _turn(netgroup, change.new_netgroups, change.old_netgroups)
                    for family in (4, 6):
                        change.elements.pop(set_of_netgroup(netgroup, family), None)

    # -- the cluster

    def set_others(self, changes: Iterable[tuple[IPAddress, tuple[str, ...]]]) -> Change:
        """Other nodes' endpoints: (ip, its netgroups; () if it is in none, or nobody's)."""
        change = Change()
        for ip, netgroups in changes:
            before = self.netgroups(ip)
            if netgroups:
                self._others[ip] = netgroups
            else:
                self._others.pop(ip, None)
            self._regroup(ip, before, change)
        return change

    def replace_others(self, known: Mapping[IPAddress, tuple[str, ...]]) -> Change:
        """All there is to know of other nodes' endpoints."""
        gone = [ip for ip in self._others if ip not in known]
        return self.set_others(chain(((ip, ()) for ip in gone), known.items()))

    def knows(self, ip: IPAddress) -> bool:
        """Whether an address is an endpoint's, here or elsewhere."""
        return ip in self._here or ip in self._others

    def _regroup(self, ip: IPAddress, before: tuple[str, ...], change: Change) -> None:
        """The sets of netgroups, after an address may have got other netgroups."""
        after = self.netgroups(ip)
        for netgroup in before:
            if netgroup not in after:
                self._show(netgroup, ip, change, present=False)
        for netgroup in after:
            if netgroup not in before:
                self._show(netgroup, ip, change, present=True)

    def _show(self, netgroup: str, ip: IPAddress, change: Change, *, present: bool) -> None:
        if netgroup == PUBLIC or netgroup in self._chains_with:
            change.put(_in_netgroup(netgroup, [ip]), present)

    def set_surroundings(self, surroundings: Surroundings) -> Change:
        """Pools or networks are different; endpoints get the callers that their networks allow now."""
        self.surroundings = surroundings
        change = Change()
        for name, admission in list(self.admissions.items()):
            isolation = surroundings.isolation.get(admission.network, admission.isolation)
            changed = replace(admission, isolation=isolation)
            if changed != admission or self._limit(changed) != self._limits[name]:
                self._admit(changed, change)
        old, self.intervals = self.intervals, _intervals(surroundings)
        change.intervals = {
            name: networks for name, networks in self.intervals.items() if networks != old[name]
        }
        return change

    def set_hosts(self, hosts: Hosts) -> Change:
        """All that is known of the machines under the containers."""
        before, after = self.hosts.elements(), hosts.elements()
        self.hosts = hosts
        change = Change()
        change.put(sorted(before - after), present=False)
        change.put(sorted(after - before), present=True)
        return change


def has_chain(may_call: Callers) -> bool:
    """Whether there is something to be asked about callers."""
    return not any(isinstance(clause, Anyone) for clause in may_call)


def elements_of(admission: Admission) -> Iterator[tuple[str, str]]:
    """(set, element) of everything that the table has for one endpoint alone, but for its limit of connections."""
    name = f'"{admission.host_ifname}"'
    verdict = f"jump {chain_of_callers(admission.callers)}" if has_chain(admission.callers) else "accept"
    for ip in admission.ips:
        yield f"senders{ip.version}", f"{name} . {admission.mac} . {ip}"
        yield f"endpoints{ip.version}", f"{name} . {ip}"
        yield f"receivers{ip.version}", f"{name} . {ip} : {verdict}"
        for mapping in admission.ports:
            yield from _mapped(mapping, ip)


def _mapped(mapping: PortMapping, ip: IPAddress) -> Iterator[tuple[str, str]]:
    """A port mapping for the endpoint's address of one family."""
    host_ip, family = mapping.host_ip, ip.version
    if host_ip is not None and host_ip.version != family:
        return
    key = f"{PROTOCOL_NUMBERS[mapping.protocol]} . {mapping.host_port}"
    target = f"{ip} . {mapping.container_port}"
    if host_ip is None or host_ip.is_unspecified:
        yield f"ports{family}", f"{key} : {target}"
    else:
        yield f"portsat{family}", f"{host_ip} . {key} : {target}"
    yield f"hairpin{family}", f"{ip} . {ip}"


def _in_netgroup(netgroup: str, ips: Iterable[IPAddress]) -> Iterator[tuple[str, str]]:
    names = {f: f"public{f}" if netgroup == PUBLIC else set_of_netgroup(netgroup, f) for f in (4, 6)}
    return ((names[ip.version], str(ip)) for ip in ips)


def _halted(host_ifname: str) -> tuple[str, str]:
    return "halted", f'"{host_ifname}"'


def _quoted(ip: IPAddress) -> tuple[str, str]:
    """That an endpoint with this address may send ICMP errors about packets that were sent to it."""
    return f"quoted{ip.version}", f"{ip} . {int(ip):#x}"


def _shared(may_call: Callers) -> list[str]:
    return [clause.netgroup for clause in may_call if isinstance(clause, Sharing)]


def _turn(what: T, back: dict[T, None], there: dict[T, None]) -> None:
    """It comes (or goes); if in the same change it was only just going (or coming), nothing is to be done."""
    if what in back:
        del back[what]
    else:
        there[what] = None


def _intervals(surroundings: Surroundings) -> dict[str, list[IPNetwork]]:
    listed = (
        surroundings.pools,
        surroundings.nat_pools,
        surroundings.open_pools,
        surroundings.tunnelled_pools,
        surroundings.store_pools,
    )
    return {
        f"{name}{family}": _disjoint(networks, family)
        for name, networks in zip(INTERVALS, listed, strict=True)
        for family in (4, 6)
    }


def _disjoint(networks: Iterable[IPNetwork], family: int) -> list[IPNetwork]:
    """An interval set refuses ranges that overlap."""
    if family == 4:
        return list(collapse_addresses(n for n in networks if isinstance(n, IPv4Network)))
    return list(collapse_addresses(n for n in networks if isinstance(n, IPv6Network)))
