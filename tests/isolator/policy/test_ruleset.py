"""The whole table as text: what ``nft list table inet moorage`` shows on a node with four endpoints."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from textwrap import dedent

import pytest

from isolator.model import PortMapping
from isolator.policy import Admission, Hosts, Isolation, Policy, Surroundings, ruleset
from isolator.policy.book import Book
from tests.isolator.rooms import Room, wrong_sets

POOLS = (ip_network("10.0.0.0/16"), ip_network("10.0.1.0/24"), ip_network("fd00::/64"))
AROUND = Surroundings(
    pools=POOLS,
    nat_pools=POOLS[1:],
    open_pools=(ip_network("10.0.9.0/24"),),
    tunnelled_pools=POOLS[2:],
    store_pools=POOLS[2:],
    connections=500,
)

WEB = Admission(
    "mrgaaaaaaaaaaaa",
    "0a:58:0a:00:00:05",
    (ip_address("10.0.0.5"), ip_address("fd00::5")),
    "web",
    ("web",),
    ports=(PortMapping("tcp", 8080, 80), PortMapping("sctp", 99, 9, ip_address("192.0.2.1"))),
)
WEB_AND_DB = Admission(
    "mrgbbbbbbbbbbbb",
    "0a:58:0a:00:00:06",
    (ip_address("10.0.0.6"),),
    "prod",
    ("web", "db"),
    Isolation(allow_from=(ip_network("192.0.2.0/24"),), nodes=True, connections=40),
)
PUBLIC = Admission(
    "mrgcccccccccccc", "0a:58:0a:00:00:07", (ip_address("10.0.0.7"),), "web", ("web", "public")
)
OPEN = Admission(
    "mrgdddddddddddd", "0a:58:0a:00:09:08", (ip_address("10.0.9.8"),), "old", ("old",), Isolation(open=True)
)

OTHERS = [
    (ip_address("10.0.7.1"), ("web",)),
    (ip_address("fd00::7:1"), ("db",)),
    (ip_address("10.0.7.2"), ("public",)),
    (ip_address("10.0.7.3"), ("nobody-is-in-this-here",)),
]
"""What other nodes have: as a set, only what an endpoint of this node shares."""

HOSTS = Hosts(
    nodes=frozenset({ip_address("192.0.2.9"), ip_address("10.0.7.9")}),
    underlays=frozenset({ip_address("192.0.2.9"), ip_address("192.0.2.1"), ip_address("2001:db8::9")}),
    here=frozenset({ip_address("192.0.2.1")}),
    tunnels=frozenset({4789, 8472}),
    tunnel=8472,
    stores=frozenset({(ip_address("192.0.2.9"), 2379), (ip_address("2001:db8::9"), 2379)}),
)

GOLDEN = """\
table inet moorage {
    set senders4 {
        type ifname . ether_addr . ipv4_addr
        elements = { "mrgaaaaaaaaaaaa" . 0a:58:0a:00:00:05 . 10.0.0.5,
                 "mrgbbbbbbbbbbbb" . 0a:58:0a:00:00:06 . 10.0.0.6,
                 "mrgcccccccccccc" . 0a:58:0a:00:00:07 . 10.0.0.7,
                 "mrgdddddddddddd" . 0a:58:0a:00:09:08 . 10.0.9.8 }
    }

    set endpoints4 {
        type ifname . ipv4_addr
        elements = { "mrgaaaaaaaaaaaa" . 10.0.0.5,
                 "mrgbbbbbbbbbbbb" . 10.0.0.6,
                 "mrgcccccccccccc" . 10.0.0.7,
                 "mrgdddddddddddd" . 10.0.9.8 }
    }

    map receivers4 {
        type ifname . ipv4_addr : verdict
        elements = { "mrgaaaaaaaaaaaa" . 10.0.0.5 : jump callers_web_jti5kxhlzyxk,
                 "mrgbbbbbbbbbbbb" . 10.0.0.6 : jump callers_db_web_qfsfo3i7knw2,
                 "mrgcccccccccccc" . 10.0.0.7 : accept,
                 "mrgdddddddddddd" . 10.0.9.8 : accept }
    }

    set public4 {
        type ipv4_addr
        elements = { 10.0.0.7, 10.0.7.2 }
    }

    set quoted4 {
        typeof ip saddr . @th,192,32
        elements = { 10.0.0.5 . 0xa000005,
                 10.0.0.6 . 0xa000006,
                 10.0.0.7 . 0xa000007,
                 10.0.9.8 . 0xa000908 }
    }

    set nodes4 {
        type ipv4_addr
        elements = { 10.0.7.9, 192.0.2.9 }
    }

    set underlays4 {
        type ipv4_addr
        elements = { 192.0.2.1, 192.0.2.9 }
    }

    set here4 {
        type ipv4_addr
        elements = { 192.0.2.1 }
    }

    set stores4 {
        type ipv4_addr
        elements = { 192.0.2.9 }
    }

    set tostore4 {
        type ipv4_addr
        flags interval
    }

    set pools4 {
        type ipv4_addr
        flags interval
        elements = { 10.0.0.0/16 }
    }

    set tunnelled4 {
        type ipv4_addr
        flags interval
    }

    set nat4 {
        type ipv4_addr
        flags interval
        elements = { 10.0.1.0/24 }
    }

    set open4 {
        type ipv4_addr
        flags interval
        elements = { 10.0.9.0/24 }
    }

    map ports4 {
        type inet_proto . inet_service : ipv4_addr . inet_service
        elements = { tcp . 8080 : 10.0.0.5 . 80 }
    }

    map portsat4 {
        type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
        elements = { 192.0.2.1 . sctp . 99 : 10.0.0.5 . 9 }
    }

    set hairpin4 {
        type ipv4_addr . ipv4_addr
        elements = { 10.0.0.5 . 10.0.0.5 }
    }

    set senders6 {
        type ifname . ether_addr . ipv6_addr
        elements = { "mrgaaaaaaaaaaaa" . 0a:58:0a:00:00:05 . fd00::5 }
    }

    set endpoints6 {
        type ifname . ipv6_addr
        elements = { "mrgaaaaaaaaaaaa" . fd00::5 }
    }

    map receivers6 {
        type ifname . ipv6_addr : verdict
        elements = { "mrgaaaaaaaaaaaa" . fd00::5 : jump callers_web_jti5kxhlzyxk }
    }

    set public6 {
        type ipv6_addr
    }

    set quoted6 {
        typeof ip6 saddr . @th,256,128
        elements = { fd00::5 . 0xfd000000000000000000000000000005 }
    }

    set nodes6 {
        type ipv6_addr
    }

    set underlays6 {
        type ipv6_addr
        elements = { 2001:db8::9 }
    }

    set here6 {
        type ipv6_addr
    }

    set stores6 {
        type ipv6_addr
        elements = { 2001:db8::9 }
    }

    set tostore6 {
        type ipv6_addr
        flags interval
        elements = { fd00::/64 }
    }

    set pools6 {
        type ipv6_addr
        flags interval
        elements = { fd00::/64 }
    }

    set tunnelled6 {
        type ipv6_addr
        flags interval
        elements = { fd00::/64 }
    }

    set nat6 {
        type ipv6_addr
        flags interval
        elements = { fd00::/64 }
    }

    set open6 {
        type ipv6_addr
        flags interval
    }

    map ports6 {
        type inet_proto . inet_service : ipv6_addr . inet_service
        elements = { tcp . 8080 : fd00::5 . 80 }
    }

    map portsat6 {
        type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service
    }

    set hairpin6 {
        type ipv6_addr . ipv6_addr
        elements = { fd00::5 . fd00::5 }
    }

    set tunnels {
        type inet_service
        elements = { 4789, 8472 }
    }

    set tunnel {
        type inet_service
        elements = { 8472 }
    }

    set guarded {
        type inet_proto . inet_service
        elements = { udp . 8472,
                 tcp . 2379,
                 udp . 4789 }
    }

    set connections {
        type ifname
        ct count over 13107
        elements = { "mrgaaaaaaaaaaaa" ct count over 500,
                 "mrgbbbbbbbbbbbb" ct count over 40,
                 "mrgcccccccccccc" ct count over 500,
                 "mrgdddddddddddd" ct count over 500 }
    }

    set halted {
        type ifname
    }

    set over_limit {
        type ifname
        size 65536
        flags dynamic,timeout
        timeout 8ms
    }

    set netgroup4_web_5avdhfgsnrpw {
        type ipv4_addr
        elements = { 10.0.0.5, 10.0.0.6,
                 10.0.0.7, 10.0.7.1 }
    }

    set netgroup6_web_5avdhfgsnrpw {
        type ipv6_addr
        elements = { fd00::5 }
    }

    set netgroup4_db_tw3pker47b3d {
        type ipv4_addr
        elements = { 10.0.0.6 }
    }

    set netgroup6_db_tw3pker47b3d {
        type ipv6_addr
        elements = { fd00::7:1 }
    }

    chain claimed {
        iifname != "mfb*" ip daddr @tunnelled4 drop
        iifname != "mfb*" ip6 daddr @tunnelled6 drop
        fib saddr oifname "mrg*" drop
        fib saddr oif missing drop
    }

    chain tunnel {
        ip saddr @underlays4 ip daddr @here4 accept
        ip6 saddr @underlays6 ip6 daddr @here6 accept
        fib daddr type { local, broadcast, anycast, multicast } th dport @tunnel drop
        fib daddr type local return
        ip saddr != @underlays4 ip daddr @underlays4 drop
        ip6 saddr != @underlays6 ip6 daddr @underlays6 drop
    }

    chain outside {
        iifname "lo" accept
        udp dport @tunnels jump tunnel
        ip saddr @pools4 goto claimed
        ip6 saddr @pools6 goto claimed
    }

    chain guarded {
        meta l4proto udp drop
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
        icmp type destination-unreachable icmp code frag-needed ip daddr != @pools4 drop
        icmp type { destination-unreachable, source-quench, time-exceeded, parameter-problem } goto errors4
        icmp type redirect drop
    }

    chain icmp6 {
        icmpv6 type packet-too-big ip6 daddr != @pools6 drop
        icmpv6 type < echo-request goto errors6
        icmpv6 type { 130-137, mld2-listener-report } drop
    }

    chain sources {
        type filter hook prerouting priority raw; policy accept;
        iifname != "mrg*" goto outside
        ip daddr 127.0.0.0/8 drop
        ip daddr 224.0.0.0/3 drop
        ip6 daddr ff00::/8 drop
        meta l4proto . th dport @guarded jump guarded
        meta l4proto vmap { icmp : jump icmp4, igmp : drop, ipv6-icmp : jump icmp6 }
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

    chain callers_web_jti5kxhlzyxk {
        ip saddr @netgroup4_web_5avdhfgsnrpw accept
        ip6 saddr @netgroup6_web_5avdhfgsnrpw accept
    }

    chain callers_db_web_qfsfo3i7knw2 {
        ip saddr @netgroup4_db_tw3pker47b3d accept
        ip6 saddr @netgroup6_db_tw3pker47b3d accept
        ip saddr @netgroup4_web_5avdhfgsnrpw accept
        ip6 saddr @netgroup6_web_5avdhfgsnrpw accept
        ip saddr 192.0.2.0/24 accept
        ip saddr @nodes4 accept
        ip6 saddr @nodes6 accept
    }

    chain arriving {
        oifname . ip daddr vmap @receivers4
        oifname . ip6 daddr vmap @receivers6
        oifname . ip daddr @endpoints4 goto replies
        oifname . ip6 daddr @endpoints6 goto replies
        drop
    }

    chain over {
        meta l4proto tcp reject with tcp reset
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
        fib daddr type { broadcast, anycast, multicast } drop
        jump counted
    }

    chain invalid {
        icmp type { destination-unreachable, source-quench, time-exceeded, parameter-problem } drop
        icmpv6 type < echo-request drop
    }

    chain beginning {
        jump counted
        tcp flags ! syn jump midstream
    }

    chain forward {
        type filter hook forward priority filter; policy accept;
        iifname "mrg*" ct state vmap { invalid : jump invalid, new : jump beginning }
        oifname "mrg*" goto arriving
    }

    chain input {
        type filter hook input priority filter; policy accept;
        iifname "mrg*" ct state vmap { invalid : jump invalid, new : jump received }
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
"""


@pytest.mark.kernel
def test_the_table_as_the_kernel_shows_it(container: Room) -> None:
    policy = container.do(Policy)
    container.do(policy.restore, [WEB, WEB_AND_DB, PUBLIC, OPEN], AROUND)
    container.do(policy.set_others, OTHERS)
    container.do(policy.set_hosts, HOSTS)
    assert container.sh("nft list table inet moorage").expandtabs(4) == GOLDEN
    container.do(policy.close)


def test_another_endpoint_with_the_same_callers_is_elements_only() -> None:
    book = Book()
    book.admit(WEB)
    like_it = Admission("mrgx", "02:00:00:00:00:01", (ip_address("10.0.0.9"),), "web", ("web",))
    assert ruleset.change(book.admit(like_it)) == dedent(
        """\
        add element inet moorage netgroup4_web_5avdhfgsnrpw { 10.0.0.9 }
        add element inet moorage quoted4 { 10.0.0.9 . 0xa000009 }
        add element inet moorage connections { "mrgx" ct count over 13107 }
        add element inet moorage senders4 { "mrgx" . 02:00:00:00:00:01 . 10.0.0.9 }
        add element inet moorage endpoints4 { "mrgx" . 10.0.0.9 }
        add element inet moorage receivers4 { "mrgx" . 10.0.0.9 : jump callers_web_jti5kxhlzyxk }
        """
    )
    going = book.revoke(["mrgx"])
    assert ruleset.change(going) == dedent(
        """\
        delete element inet moorage connections { "mrgx" ct count over 13107 }
        delete element inet moorage senders4 { "mrgx" . 02:00:00:00:00:01 . 10.0.0.9 }
        delete element inet moorage endpoints4 { "mrgx" . 10.0.0.9 }
        delete element inet moorage receivers4 { "mrgx" . 10.0.0.9 : jump callers_web_jti5kxhlzyxk }
        delete element inet moorage quoted4 { 10.0.0.9 . 0xa000009 }
        delete element inet moorage netgroup4_web_5avdhfgsnrpw { 10.0.0.9 }
        """
    )
    assert ruleset.change(going, whatever_is_there=True).startswith(
        'add element inet moorage connections { "mrgx" ct count over 13107 }\n'
        'delete element inet moorage connections { "mrgx" ct count over 13107 }\n'
    )
    assert ruleset.change(book.revoke(["mrgx"])) == ""


def test_the_first_and_the_last_with_its_callers_bring_and_take_a_chain() -> None:
    book = Book()
    first = replace(WEB, ips=WEB.ips[:1], ports=())
    coming = ruleset.change(book.admit(first))
    assert "chain callers_web_" in coming
    assert "set netgroup6_web_" in coming
    going = ruleset.change(book.revoke([first.host_ifname]))
    assert "delete chain inet moorage callers_web_" in going
    assert going.endswith("delete set inet moorage netgroup6_web_5avdhfgsnrpw\n")


@pytest.mark.kernel
def test_other_netgroups_are_one_change(container: Room) -> None:
    """The same key leads to another chain, and in between to none, all at once."""
    policy = container.do(Policy)
    container.do(policy.restore, [WEB], AROUND)
    container.do(policy.admit, replace(WEB, netgroups=("db",)))
    table = container.sh("nft list table inet moorage")
    assert "netgroup4_web" not in table
    assert container.do(wrong_sets, policy) == {}
    container.do(policy.close)
