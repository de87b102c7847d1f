"""Keeping the table ``inet moorage`` as the book says."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ipam.netgroups import PUBLIC
from isolator.errors import KernelRefused
from isolator.model import IPAddress
from isolator.netlink.conntrack import Connection
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from isolator.policy import kernel, ruleset
from isolator.policy.book import INTERVALS, PROTOCOL_NUMBERS, Admission, Book, Change, Hosts, Surroundings
from isolator.policy.callers import Caller, Verdict, judge
from isolator.policy.names import set_of_netgroup
from isolator.policy.nft import DryNft, Nft
from isolator.policy.sending import Packet, may_send, may_tunnel

_FAMILIES = (4, 6)
_SETS = ("tunnels", "tunnel", "guarded", "connections", "halted")
_OF_ENDPOINTS = {
    "senders",
    "endpoints",
    "receivers",
    "quoted",
    "connections",
    "halted",
    "ports",
    "portsat",
    "hairpin",
}
"""Sets whose elements are each one endpoint's."""
_SHARED = (*INTERVALS, "nodes", "underlays", "here", "stores")
"""Sets, less their family, that every endpoint's packets are judged by."""
_SETS_OF_A_FAMILY = (
    "senders", "endpoints", "receivers", "quoted", "public", "nodes", "underlays", "here", "stores",
    "ports", "portsat", "hairpin",
)  # fmt: skip


class Policy:
    """The table, in the network namespace of the thread that makes this; use it on that thread only.

    Its book says what should be there; every change is one transaction. All methods raise KernelRefused; its
    errno is ENOENT if the table is gone or was tampered with. ``restore`` cures that, and anything else.
    """

    def __init__(self) -> None:
        self._nft = Nft()
        self._netfilter = NetlinkSocket(NETLINK_NETFILTER)
        self._book = Book()
        self._fingerprints: dict[str, bytes] | None = None
        # The generations at which chains and rules, and elements, were last known to be right.
        self._intact_at = -1
        self._complete_at = -1
        self._is_adopted = False
        self._is_first = True
        self._own_changes = 0

    def close(self) -> None:
        """Let go of the kernel; the table stays."""
        self._netfilter.close()

    # -- changes

    def restore(
        self,
        admissions: Iterable[Admission],
        surroundings: Surroundings,
        *,
        keep_endpoints: bool = False,
        keep_others: bool = False,
    ) -> dict[str, str]:
        """Make the whole table anew, at once: no packet sees a state in between, established flows go on. Returns the
        endpoints that the kernel refuses, by interface, and why: the others do without them.

        admissions: of everything that may communicate. The kernel may know what we do not: keep_endpoints, because
        the journal is lost: who may communicate goes on to. keep_others, because the store was not heard yet: who is
        in a netgroup stays in it.
        """
        admissions = list(admissions)
        hosts = self._hosts_before() if self._is_first else self._book.hosts

        def book_of(admitted: Sequence[Admission]) -> Book:
            book = Book()
            book.set_others(self._book.others().items())
            book.set_surroundings(surroundings)
            book.halt(self._book.halted)
            book.set_hosts(hosts)
            for admission in admitted:
                book.admit(admission)
            if keep_endpoints:
                self._inherit_endpoints(book)
            if keep_others:
                self._inherit_others(book)
            return book

        refused: dict[str, str] = {}
        book = book_of(admissions)
        before = kernel.generation(self._netfilter)
        try:
            self._write(ruleset.table(book), "restore all rules")
        except KernelRefused:
            self._fingerprints = None
            refused = self._refused(book_of, admissions)
            book = book_of([one for one in admissions if one.host_ifname not in refused])
            before = kernel.generation(self._netfilter)
            self._write(ruleset.table(book), "restore all rules")
        self._book = book
        self._is_adopted = self._is_first = False
        self._fingerprints = None
        self._trust()
        if kernel.generation(self._netfilter) != before + 1:
            # What somebody took meanwhile may be missing from what is trusted now.
            self._fingerprints = None
        return refused

    def _refused(
        self, book_of: Callable[[Sequence[Admission]], Book], admissions: Sequence[Admission]
    ) -> dict[str, str]:
        """The endpoints that the kernel does not take into the table, by interface, and why.

        Tried without changing anything, half of them at a time. Raises KernelRefused if it is not for them.
        """
        taken: list[Admission] = []
        refused: dict[str, str] = {}
        waiting = [list(admissions)] if admissions else []
        with contextlib.closing(DryNft()) as dry:
            dry.run(ruleset.table(book_of([])), "restore all rules")
            while waiting:
                some = waiting.pop()
                try:
                    dry.run(ruleset.table(book_of([*taken, *some])), f"admit {some[0].host_ifname}")
                except KernelRefused as error:
                    half = len(some) // 2
                    if half:
                        waiting += [some[half:], some[:half]]
                    else:
                        refused[some[0].host_ifname] = str(error)
                else:
                    taken += some
        return refused

    def adopt(self) -> None:
        """Leave the table as an earlier agent left it, and take it for right until it is restored."""
        self._is_adopted = True
        self._book.set_hosts(self._hosts_before())
        self._is_first = False
        self._trust()

    def admit(self, admission: Admission) -> None:
        """Let an endpoint communicate from and to its addresses, or do so from now on as this says."""
        before = self._book.admissions.get(admission.host_ifname)
        wanted = self._book.admit(admission)
        try:
            self._run(wanted, f"admit {admission.host_ifname}")
        except KernelRefused:
            # Nothing was changed in the kernel, so nothing may be in the book.
            if before is None:
                self._book.revoke([admission.host_ifname])
            else:
                self._book.admit(before)
            raise

    def revoke(self, host_ifnames: Iterable[str]) -> None:
        """Undo ``admit``; endpoints that are not admitted are fine. In one transaction."""
        self._run(self._book.revoke(host_ifnames), "revoke endpoints")

    def set_others(self, changes: Sequence[tuple[IPAddress, tuple[str, ...]]]) -> list[IPAddress]:
        """Endpoints of other nodes: (ip, its netgroups; () for none, or nobody's).

        Returns the addresses that left a netgroup.
        """
        before = self._book.others()
        left = [ip for ip, groups in changes if not set(before.get(ip, ())) <= set(groups)]
        self._run(self._book.set_others(changes), "change the members of netgroups")
        return left

    def replace_others(self, known: Mapping[IPAddress, tuple[str, ...]]) -> None:
        """All endpoints of other nodes."""
        self._run(self._book.replace_others(known), "list the members of netgroups")

    def set_surroundings(self, surroundings: Surroundings) -> list[IPAddress]:
        """Pools or networks are different. Returns the addresses of endpoints that others may call now than before."""
        before = self._book.admissions.copy()
        wanted = self._book.set_surroundings(surroundings)
        self._run(wanted, "replace the pools")
        return [
            ip
            for name, admission in self._book.admissions.items()
            if admission is not before.get(name)
            for ip in admission.ips
        ]

    def connection_limits(self) -> dict[str, int]:
        """host_ifname -> connections that the endpoint may have tracked."""
        return self._book.limits()

    def halt(self, host_ifnames: Iterable[str]) -> None:
        """Let these endpoints, and no others, begin no connections; what is established goes on."""
        self._run(self._book.halt(host_ifnames), "halt endpoints that have too many connections")

    @property
    def hosts(self) -> Hosts:
        """What the table knows of the machines under the containers."""
        return self._book.hosts

    def set_hosts(self, hosts: Hosts) -> None:
        """All that is known of the machines under the containers."""
        self._run(self._book.set_hosts(hosts), "replace the nodes' addresses")

    def _run(self, wanted: Change, doing: str) -> None:
        """Carry out a change. One that the kernel refuses stands in the book: ``is_intact`` says no until restored."""
        commands = ruleset.change(wanted)
        if not commands:
            return
        if wanted.is_structural and not self.is_intact():
            self._fingerprints = None
            raise KernelRefused(
                f"could not {doing}: table inet moorage is gone or was changed by somebody; it is restored within "
                "a second",
                errno=errno.ENOENT,
            )
        before = kernel.generation(self._netfilter)
        try:
            self._write(commands, doing)
        except KernelRefused:
            self._fingerprints = None
            # What was to be removed may be gone already; then the rest still has to be.
            self._write(ruleset.change(wanted, whatever_is_there=True), doing)
            return
        after = kernel.generation(self._netfilter)
        alone = after == before + 1
        if wanted.is_structural:
            # Whoever changed rules at the same moment has made them worth restoring.
            self._fingerprints = kernel.fingerprints(self._netfilter) if alone else None
        if alone and self._intact_at == before:
            self._intact_at = after
        if alone and self._complete_at == before:
            self._complete_at = after

    def _write(self, commands: str, doing: str) -> None:
        self._nft.run(commands, doing)
        self._own_changes += 1

    def _trust(self) -> None:
        self._fingerprints = kernel.fingerprints(self._netfilter)
        self._intact_at = self._complete_at = -1

    def _inherit_endpoints(self, book: Book) -> None:
        """Endpoints that only the kernel knows, from the table as it is."""
        macs = kernel.macs(self._netfilter)
        strangers: dict[str, list[IPAddress]] = {}
        for name, ip in kernel.pairs(self._netfilter):
            if name not in book.admissions:
                strangers.setdefault(name, []).append(ip)
        for name, ips in strangers.items():
            if name in macs:
                # In no netgroup that we know of: nobody calls it, but what it calls answers.
                book.admit(Admission(name, macs[name], tuple(ips)))

    def _inherit_others(self, book: Book) -> None:
        """Members and nodes that only the kernel knows."""
        inherited: dict[IPAddress, set[str]] = {}
        for netgroup in (PUBLIC, *book.netgroups_used()):
            for family in _FAMILIES:
                for ip in kernel.addresses(self._netfilter, _set_of(netgroup, family)):
                    if not book.knows(ip):
                        inherited.setdefault(ip, set()).add(netgroup)
        book.set_others((ip, tuple(sorted(groups))) for ip, groups in inherited.items())

    def _hosts_before(self) -> Hosts:
        """What an earlier agent left in the table: it stays until somebody knows better."""

        def addresses(name: str) -> frozenset[IPAddress]:
            return frozenset(
                ip for family in _FAMILIES for ip in kernel.addresses(self._netfilter, f"{name}{family}")
            )

        guarded = [words.split(" . ") for words in kernel.elements(self._netfilter, "guarded")]
        store_ports = [int(port) for number, port in guarded if int(number) == PROTOCOL_NUMBERS["tcp"]]
        return Hosts(
            nodes=addresses("nodes"),
            underlays=addresses("underlays"),
            here=addresses("here"),
            tunnels=frozenset(map(int, kernel.elements(self._netfilter, "tunnels"))),
            tunnel=max(map(int, kernel.elements(self._netfilter, "tunnel")), default=0),
            stores=frozenset(product(addresses("stores"), store_ports)),
        )

    # -- looking

    def changes_of_others(self) -> int:
        """A number that is another as soon as somebody else changed any table of the node. About 0.02 ms."""
        return kernel.generation(self._netfilter) - self._own_changes

    def is_intact(self) -> bool:
        """Whether chains and rules are as they should be: the poll of self-healing.

        About 0.02 ms while nobody else changed any rule of the node. Elements are looked at by ``wrong_in``.
        """
        if self._fingerprints is None:
            return False
        generation = kernel.generation(self._netfilter)
        if generation == self._intact_at:
            return True
        if kernel.fingerprints(self._netfilter) != self._fingerprints:
            return False
        self._intact_at = generation
        return True

    def snapshot(self) -> Snapshot | None:
        """What the sets should hold now, to be compared on another thread; None if there is nothing to compare."""
        generation = kernel.generation(self._netfilter)
        if generation == self._complete_at or self._is_adopted:
            return None
        return Snapshot(generation, self._book.copy())

    def trust_sets(self, snapshot: Snapshot) -> None:
        """The sets were as the snapshot says."""
        if self.is_still(snapshot):
            self._complete_at = snapshot.generation

    def is_still(self, snapshot: Snapshot) -> bool:
        """Whether nobody changed any rule of the node since."""
        return kernel.generation(self._netfilter) == snapshot.generation

    def wrong_chains(self) -> list[str]:
        """Chains that are not as they should be; "" stands for the table itself."""
        if self.is_intact():
            return []
        found = kernel.fingerprints(self._netfilter)
        if found is None or self._fingerprints is None or found[""] != self._fingerprints[""]:
            return [""]
        return sorted(
            name
            for name in found.keys() | self._fingerprints.keys()
            if found.get(name) != self._fingerprints.get(name)
        )

    def differences(self, host_ifname: str, wrong_sets: Mapping[str, set[str]]) -> list[str]:
        """Sentences about everything that is not as it should be and that an endpoint's packets are judged by.

        wrong_sets: of ``wrong_in``.
        What concerns only others is left out: their own elements, netgroups that the endpoint is not in, families that
        it has no address of.
        """
        chains = self.wrong_chains()
        if chains == [""]:
            return ["the firewall's table inet moorage is gone or was made by somebody else"]
        found = [f"the firewall's chain {name} is gone or was changed" for name in chains]
        admission = self._book.admissions.get(host_ifname)
        if admission is None:
            # An adopted table has endpoints that the book knows nothing of.
            if self._is_adopted and host_ifname in {name for name, _ in kernel.pairs(self._netfilter)}:
                return found
            return [*found, f"the firewall admits nothing on {host_ifname}"]
        own = set(self._book.elements_of(admission))
        shared = _shared_by(admission)
        keys = {f'"{host_ifname}"', *map(str, admission.ips)}
        for name, differing in sorted(wrong_sets.items()):
            if name.rstrip("46") in _OF_ENDPOINTS:
                for element in sorted(differing):
                    if (name, element) in own:
                        found.append(f"the firewall's set {name} lacks {element}")
                    elif not keys.isdisjoint(re.split(r" \. | : | ct ", element)):
                        found.append(f"the firewall's set {name} holds {element}, which it should not")
            elif name in shared:
                found.append(f"the firewall's set {name} does not hold what it should")
        return found

    def verify(self, host_ifname: str) -> None:
        """Read back that the table judges an endpoint's packets as the book says, from its first one on.

        0.02 ms if nobody else changed any rule of the node, else less than 1 ms. Raises KernelRefused with ENOENT.
        """
        generation = kernel.generation(self._netfilter)
        if self._fingerprints is not None and generation == self._intact_at == self._complete_at:
            return
        admission = self._book.admissions[host_ifname]
        missing = [
            name
            for name, element in self._book.elements_of(admission)
            if not kernel.has(self._netfilter, name, element)
        ]
        for ip in admission.ips if not self._is_adopted else ():
            for name, networks in self._book.intervals.items():
                if name.endswith(str(ip.version)):
                    wanted = any(ip in network for network in networks)
                    if kernel.has(self._netfilter, name, str(ip)) != wanted:
                        missing.append(name)
        if missing or not self.is_intact():
            self._complete_at = -1
            what = f"set {missing[0]}" if missing else "table inet moorage"
            raise KernelRefused(
                f"the firewall's {what} is not what it was made: somebody changes it right now; find who does, "
                "then try again",
                errno=errno.ENOENT,
            )

    def may_call(self, source: IPAddress, host_ifname: str) -> Verdict | None:
        """Whether an address may call an endpoint, as the table is now; None if that one may not communicate at all."""
        admission = self._book.admissions.get(host_ifname)
        if admission is None:
            return None
        caller = Caller(source, self._book.netgroups(source), source in self._book.hosts.nodes)
        return judge(caller, admission.callers)

    def may_send(self, source: IPAddress, target: IPAddress, packet: Packet) -> Verdict:
        """Whether an endpoint may send such a packet, whoever it calls."""
        hosts, pools = self._book.hosts, self._book.surroundings.store_pools
        reaches_store = any(source.version == pool.version and source in pool for pool in pools)
        return may_send(target, packet, hosts.tunnels, hosts.stores, reaches_store=reaches_store)

    def may_tunnel(self, source: IPAddress) -> Verdict:
        """Whether a machine may send to this node's tunnel."""
        hosts = self._book.hosts
        return may_tunnel(source, Packet("udp", hosts.tunnel), {hosts.tunnel} - {0}, hosts.underlays)

    def forbidden(self, connections: Iterable[Connection]) -> list[Connection]:
        """TCP connections to an endpoint of this node that whoever began them may not have (any more).

        The table lets nothing in on them as it is. Without its entry, the endpoint's own next segment is answered
        with a reset, so it learns of it. An entry of UDP has to stay: without it, the endpoint's next datagram
        would count as a call of its own, which may be answered.
        """
        endpoints = {ip: name for name, admission in self._book.admissions.items() for ip in admission.ips}
        found = []
        for connection in connections:
            verdict = self.may_call(connection.source, endpoints.get(connection.target, ""))
            if connection.protocol == socket.IPPROTO_TCP and verdict is not None and not verdict.allowed:
                found.append(connection)
        return found

    def macs(self) -> dict[str, str]:
        """host_ifname -> MAC of everything that may communicate now, as the kernel has it."""
        return kernel.macs(self._netfilter)

    def elements(self) -> set[tuple[str, IPAddress]]:
        """Every (host_ifname, ip) that may communicate now; empty if the table is gone."""
        return set(kernel.pairs(self._netfilter))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the table's sets should hold at one moment. generation: of the node's rules then."""

    generation: int
    book: Book


def wrong_in(netfilter: NetlinkSocket, snapshot: Snapshot) -> dict[str, set[str]]:
    """Sets and maps that do not hold what they should, and which of their elements differ; of an interval set none is
    named. On any thread; it takes as long as the sets are large, some 7 ms per 1,000 elements."""
    everything = snapshot.book.everything()
    names = {
        *_SETS,
        *(f"{base}{family}" for base in _SETS_OF_A_FAMILY for family in _FAMILIES),
        *(_set_of(group, family) for group in snapshot.book.netgroups_used() for family in _FAMILIES),
        *everything.elements,
    }
    wrong = {}
    for name in sorted(names):
        wanted = set(everything.elements.get(name, ()))
        if differing := kernel.elements(netfilter, name) ^ wanted:
            wrong[name] = differing
    for base in INTERVALS:
        for name in (f"{base}4", f"{base}6"):
            if not kernel.covers(netfilter, name, everything.intervals.get(name, ())):
                wrong[name] = set()
    return wrong


def _shared_by(admission: Admission) -> set[str]:
    """The sets of several endpoints that this one's packets are judged by."""
    families = {ip.version for ip in admission.ips}
    return {
        *_SETS,
        *(f"{base}{family}" for base in _SHARED for family in families),
        *(_set_of(netgroup, family) for netgroup in (PUBLIC, *admission.netgroups) for family in families),
    }


def _set_of(netgroup: str, family: int) -> str:
    return f"public{family}" if netgroup == PUBLIC else set_of_netgroup(netgroup, family)
