"""The table ``inet moorage`` as text. Pure: values in, nft commands out.

A packet's path. Endpoint interfaces are those named ``mrg*``; what neither comes from nor goes to one passes, and
an accept here never overrules a drop in somebody else's table.

    from a container --> sources (raw prerouting, before conntrack: what is dropped costs no entry)
                           guarded      nothing to a tunnel's UDP port, whatever the destination: a node's VXLAN socket
                                        listens on all of its addresses. Nothing to the store, but from networks with
                                        --to-node store. Before masquerading, which would make it the node's own.
                           errors4/6    an ICMP error only about a packet that was sent to this container: else it
                                        could shrink the path MTU of others, or reach them as "related". That it goes
                                        to who sent that packet is what conntrack asks, else it is invalid (forward).
                                        "Too big" only to containers: to others it would leave with its node's address
                                        where that was masqueraded, and shrink the path to the node
                           no multicast, no redirects, none of what keeps links and neighbours
                           its interface, MAC and source address must stand together in senders4/6, else drop. So
                           a spoofed source goes nowhere, and neither do leftovers such as DHCP, router
                           solicitations and MLD, which have no source or a link-local one.
                     --> beginning (forward), input
                           counted      no more tracked connections than an interface may have; asked of the first
                                        packet alone, since what nobody answers stays new for the kernel
                           midstream    where answers are let in, a TCP connection begins with a SYN or is reset: else
                                        one that was cut would begin anew, in the other direction, with what the
                                        container still has to send
                         else nothing is asked towards the node itself, but that it is no broadcast; containers may
                         talk to their node
    from elsewhere   --> outside (the same hook)
                           tunnel       who sends to this node's tunnel has a registered node's underlay address, and
                                        sends to this node's own one; broadcasts would reach it as well
                           claimed      who claims an address of our pools must not claim one of this very node's or
                                        one that no route leads back to, and comes by the tunnel if the container that
                                        it is for is reached by the tunnel

    to the node      --> portmaps (nat prerouting, and output for the node's own): a mapped port leads to its container,
                           but for ::1 and link-local addresses, whose packets Linux cannot forward

    to a container   --> arriving (forward)
                           its interface and destination address lead to the chain of who may call it; not even an
                           endpoint: drop.
                             callers_...  one chain for all endpoints with the same callers: a member of one of their
                                          netgroups may, no matter which of the two began: no connection state is
                                          asked, so leaving the netgroup ends what is established, too.
                             replies      anybody else only in answer to what a container began, and only one
                                          whom containers may call unasked: the world, nodes, public and open
                                          endpoints. A mapped port is for everybody.
                     --> destinations (output): the node itself reaches all its containers

    leaving          --> masqueraded (postrouting) if from a NAT pool to outside all pools. Never from pool to pool:
                           containers see each other's real addresses. Also what could not be answered otherwise:
                           a container's call to itself by a mapped port, and one from 127.0.0.1.

Elements are looked up in hash sets: the cost of a packet, and of a change, does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from string import Template

from isolator.policy.book import DEFAULT_CONNECTIONS, Book, Change
from isolator.policy.callers import Callers, Clause, From, Nodes, Sharing
from isolator.policy.names import chain_of_callers, set_of_netgroup

TABLE = "moorage"

_TABLE = Template("""\
table inet moorage {
$sets
	set tunnels {
		type inet_service
	}

	set tunnel {
		type inet_service
	}

	set guarded {
		type inet_proto . inet_service
	}

	set connections {
		type ifname
		ct count over $most
	}

	set halted {
		type ifname
	}

	set over_limit {
		type ifname
		size 65536
		flags dynamic,timeout
		timeout 10ms
	}

$netgroups	chain claimed {
		iifname != "mfb*" ip daddr @tunnelled4 drop
		iifname != "mfb*" ip6 daddr @tunnelled6 drop
		fib saddr oifname "mrg*" drop
		fib saddr oif missing drop
	}

	chain tunnel {
		ip saddr @underlays4 ip daddr @here4 accept
		ip6 saddr @underlays6 ip6 daddr @here6 accept
		fib daddr type { local, broadcast, multicast, anycast } th dport @tunnel drop
		fib daddr type local return
		ip saddr != @underlays4 ip daddr @underlays4 drop
		ip6 saddr != @underlays6 ip6 daddr @underlays6 drop
	}

	chain outside {
		iifname "lo" accept
		meta l4proto 17 th dport @tunnels jump tunnel
		ip saddr @pools4 goto claimed
		ip6 saddr @pools6 goto claimed
	}

	chain guarded {
		meta l4proto 17 drop
		ip saddr @tostore4 return
		ip6 saddr @tostore6 return
		ip daddr @stores4 drop
		ip6 daddr @stores6 drop
	}

	chain errors4 {
		iifname . ether saddr . ip saddr @senders4 ip saddr . @th,192,32 @quoted4 accept
		drop
	}

	chain errors6 {
		iifname . ether saddr . ip6 saddr @senders6 ip6 saddr . @th,256,128 @quoted6 accept
		drop
	}

	chain icmp4 {
		icmp type 3 icmp code 4 ip daddr != @pools4 drop
		icmp type { 3, 4, 11, 12 } goto errors4
		icmp type 5 drop
	}

	chain icmp6 {
		icmpv6 type 2 ip6 daddr != @pools6 drop
		icmpv6 type < 128 goto errors6
		icmpv6 type { 130-137, 143 } drop
	}

	chain sources {
		type filter hook prerouting priority raw; policy accept;
		iifname != "mrg*" goto outside
		ip daddr 127.0.0.0/8 drop
		ip daddr 224.0.0.0/3 drop
		ip6 daddr ff00::/8 drop
		meta l4proto . th dport @guarded jump guarded
		meta l4proto vmap { 1 : jump icmp4, 2 : drop, 58 : jump icmp6 }
		iifname . ether saddr . ip saddr @senders4 accept
		iifname . ether saddr . ip6 saddr @senders6 accept
		drop
	}

	chain portmaps {
		dnat ip to ip daddr . meta l4proto . th dport map @portsat4
		dnat ip to meta l4proto . th dport map @ports4
		ip6 daddr { ::1, fe80::/10 } return
		dnat ip6 to ip6 daddr . meta l4proto . th dport map @portsat6
		dnat ip6 to meta l4proto . th dport map @ports6
	}

	chain mapped {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local goto portmaps
	}

	chain mapped_here {
		type nat hook output priority -100; policy accept;
		fib daddr type local goto portmaps
	}

	chain replies {
		ct status dnat accept
		ct state != { established, related } drop
		ct state established ct direction original drop
		ip saddr @public4 accept
		ip6 saddr @public6 accept
		ip saddr @nodes4 accept
		ip6 saddr @nodes6 accept
		ip saddr @open4 accept
		ip6 saddr @open6 accept
		ip saddr != @pools4 accept
		ip6 saddr != @pools6 accept
		drop
	}

$chains	chain arriving {
		oifname . ip daddr vmap @receivers4
		oifname . ip6 daddr vmap @receivers6
		oifname . ip daddr @endpoints4 goto replies
		oifname . ip6 daddr @endpoints6 goto replies
		drop
	}

	chain over {
		meta l4proto 6 reject with tcp reset
	}

	chain midstream {
		ip daddr @public4 goto over
		ip6 daddr @public6 goto over
		ip daddr @nodes4 goto over
		ip6 daddr @nodes6 goto over
		ip daddr @open4 goto over
		ip6 daddr @open6 goto over
		ip daddr != @pools4 goto over
		ip6 daddr != @pools6 goto over
	}

	chain destinations {
		oifname . ip daddr @endpoints4 accept
		oifname . ip6 daddr @endpoints6 accept
		drop
	}

	chain counted {
		ct status confirmed return
		iifname @halted drop
		iifname @over_limit drop
		iifname @connections add @over_limit { iifname } drop
	}

	chain received {
		fib daddr type { broadcast, multicast, anycast } drop
		jump counted
	}

	chain invalid {
		icmp type { 3, 4, 11, 12 } drop
		icmpv6 type < 128 drop
	}

	chain beginning {
		jump counted
		tcp flags ! syn jump midstream
	}

	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname "mrg*" ct state vmap { new : jump beginning, invalid : jump invalid }
		oifname "mrg*" goto arriving
	}

	chain input {
		type filter hook input priority filter; policy accept;
		iifname "mrg*" ct state vmap { new : jump received, invalid : jump invalid }
	}

	chain output {
		type filter hook output priority filter; policy accept;
		oifname "mrg*" goto destinations
	}

	chain leaving {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr . ip daddr @hairpin4 masquerade
		ip6 saddr . ip6 daddr @hairpin6 masquerade
		oifname "mrg*" ip saddr 127.0.0.0/8 masquerade
		ip saddr @nat4 ip daddr != @pools4 masquerade fully-random
		ip6 saddr @nat6 ip6 daddr != @pools6 masquerade fully-random
	}
}
""")

_SETS = Template("""\
	set senders$family {
		type ifname . ether_addr . ipv${family}_addr
	}

	set endpoints$family {
		type ifname . ipv${family}_addr
	}

	map receivers$family {
		type ifname . ipv${family}_addr : verdict
	}

	set public$family {
		type ipv${family}_addr
	}

	set quoted$family {
		typeof $ip saddr . $quoted
	}

	set nodes$family {
		type ipv${family}_addr
	}

	set underlays$family {
		type ipv${family}_addr
	}

	set here$family {
		type ipv${family}_addr
	}

	set stores$family {
		type ipv${family}_addr
	}

	set tostore$family {
		type ipv${family}_addr
		flags interval
	}

	set pools$family {
		type ipv${family}_addr
		flags interval
	}

	set tunnelled$family {
		type ipv${family}_addr
		flags interval
	}

	set nat$family {
		type ipv${family}_addr
		flags interval
	}

	set open$family {
		type ipv${family}_addr
		flags interval
	}

	map ports$family {
		type inet_proto . inet_service : ipv${family}_addr . inet_service
	}

	map portsat$family {
		type ipv${family}_addr . inet_proto . inet_service : ipv${family}_addr . inet_service
	}

	set hairpin$family {
		type ipv${family}_addr . ipv${family}_addr
	}
""")

_NETGROUP = Template("""\
	set $name {
		type ipv${family}_addr
	}

""")

_FAMILIES = (4, 6)
_IP = {4: "ip", 6: "ip6"}
_QUOTED = {4: "@th,192,32", 6: "@th,256,128"}
"""Where an ICMP error has the destination of the packet that it quotes: after 8 bytes of its own header (RFC 792,
RFC 4443), 16 into an IPv4 header, 24 into an IPv6 header."""


def table(book: Book) -> str:
    """Commands that replace the whole table; ``add`` first, since deleting what is missing fails.

    The set of limits is not dynamic: the kernel takes elements that count nothing at the moment out of dynamic sets.
    Each of its elements has a limit of its own; the set's is what nft asks for to allow that.
    """
    all_of_it = book.everything()
    body = _TABLE.substitute(
        most=DEFAULT_CONNECTIONS,
        sets="\n".join(
            _SETS.substitute(family=family, ip=_IP[family], quoted=_QUOTED[family]) for family in _FAMILIES
        ),
        netgroups="".join(_sets_of(netgroup) for netgroup in all_of_it.new_netgroups),
        chains="".join(_chain(may_call) for may_call in all_of_it.new_chains),
    )
    return (
        "add table inet moorage\n"
        "delete table inet moorage\n"
        + body
        + "".join(_elements("add", name, elements) for name, elements in all_of_it.elements.items())
        + _intervals(all_of_it)
    )


def change(wanted: Change, *, whatever_is_there: bool = False) -> str:
    """Commands for a change; "" if there is nothing to do.

    whatever_is_there: elements that are to go may be missing, because somebody meddled. Removing one that is would fail
    the transaction, so they are added first.
    """
    removing = ("add", "delete") if whatever_is_there else ("delete",)
    gone = {
        name: [element for element, present in elements.items() if not present]
        for name, elements in wanted.elements.items()
    }
    there = {
        name: [element for element, present in elements.items() if present]
        for name, elements in wanted.elements.items()
    }
    return "".join(
        (
            *(_in_table(_sets_of(netgroup)) for netgroup in wanted.new_netgroups),
            *(_in_table(_chain(may_call)) for may_call in wanted.new_chains),
            *(_elements(verb, name, gone[name]) for name in gone for verb in removing),
            *(_elements("add", name, there[name]) for name in there),
            _intervals(wanted, flush=True),
            *(f"delete chain inet moorage {chain_of_callers(may_call)}\n" for may_call in wanted.old_chains),
            *(
                f"delete set inet moorage {set_of_netgroup(netgroup, family)}\n"
                for netgroup in wanted.old_netgroups
                for family in _FAMILIES
            ),
        )
    )


def _in_table(body: str) -> str:
    return f"table inet moorage {{\n{body}}}\n"


def _sets_of(netgroup: str) -> str:
    return "".join(
        _NETGROUP.substitute(name=set_of_netgroup(netgroup, family), family=family) for family in _FAMILIES
    )


def _chain(may_call: Callers) -> str:
    """One chain for all endpoints with these callers."""
    rules = "".join(f"\t\t{rule} accept\n" for clause in may_call for rule in _rules(clause))
    return f"\tchain {chain_of_callers(may_call)} {{\n{rules}\t}}\n\n"


def _rules(clause: Clause) -> Iterator[str]:
    """What a packet of a caller that the clause covers matches."""
    match clause:
        case Sharing(netgroup):
            yield from (f"{_IP[f]} saddr @{set_of_netgroup(netgroup, f)}" for f in _FAMILIES)
        case From(cidr):
            yield f"{_IP[cidr.version]} saddr {cidr}"
        case Nodes():
            yield from (f"{_IP[f]} saddr @nodes{f}" for f in _FAMILIES)
        case _:
            raise AssertionError("whom everybody may call has no chain")


def _elements(verb: str, name: str, elements: Iterable[str]) -> str:
    listed = ", ".join(elements)
    return f"{verb} element inet moorage {name} {{ {listed} }}\n" if listed else ""


def _intervals(wanted: Change, *, flush: bool = False) -> str:
    return "".join(
        (f"flush set inet moorage {name}\n" if flush else "") + _elements("add", name, map(str, networks))
        for name, networks in wanted.intervals.items()
    )
