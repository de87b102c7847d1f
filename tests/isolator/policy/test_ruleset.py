"""The whole table as text: what ``nft list table inet moorage`` shows on a node with two endpoints."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from textwrap import dedent

import pytest

from isolator.policy import Policy, ruleset
from tests.isolator.rooms import Room

A, B = ip_address("10.0.0.5"), ip_address("fd00::5")

GOLDEN = """\
table inet moorage {
    set endpoints4 {
        type ifname . ipv4_addr
        elements = { "mrgaaaaaaaaaaaa" . 10.0.0.5,
                 "mrgbbbbbbbbbbbb" . 10.0.0.6 }
    }

    set pools4 {
        type ipv4_addr
        flags interval
        elements = { 10.0.0.0/16 }
    }

    set nat4 {
        type ipv4_addr
        flags interval
        elements = { 10.0.1.0/24 }
    }

    set endpoints6 {
        type ifname . ipv6_addr
        elements = { "mrgaaaaaaaaaaaa" . fd00::5 }
    }

    set pools6 {
        type ipv6_addr
        flags interval
        elements = { fd00::/64 }
    }

    set nat6 {
        type ipv6_addr
        flags interval
        elements = { fd00::/64 }
    }

    chain sources {
        type filter hook prerouting priority raw; policy accept;
        iifname != "mrg*" accept
        iifname . ip saddr @endpoints4 accept
        iifname . ip6 saddr @endpoints6 accept
        drop
    }

    chain destinations {
        oifname . ip daddr @endpoints4 accept
        oifname . ip6 daddr @endpoints6 accept
        drop
    }

    chain forward {
        type filter hook forward priority filter; policy accept;
        oifname "mrg*" goto destinations
    }

    chain output {
        type filter hook output priority filter; policy accept;
        oifname "mrg*" goto destinations
    }

    chain leaving {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr @nat4 ip daddr != @pools4 masquerade fully-random
        ip6 saddr @nat6 ip6 daddr != @pools6 masquerade fully-random
    }
}
"""


@pytest.mark.kernel
def test_the_table_as_the_kernel_shows_it(container: Room) -> None:
    policy = container.do(Policy)
    endpoints = [("mrgaaaaaaaaaaaa", [A, B]), ("mrgbbbbbbbbbbbb", [ip_address("10.0.0.6")])]
    pools = [ip_network("10.0.0.0/16"), ip_network("10.0.1.0/24"), ip_network("fd00::/64")]
    container.do(policy.restore, endpoints, pools, pools[1:])
    assert container.sh("nft list table inet moorage").expandtabs(4) == GOLDEN
    container.do(policy.close)


def test_a_change_is_elements_only() -> None:
    assert ruleset.admit([("mrga", [A, B])]) == dedent(
        """\
        add element inet moorage endpoints4 { "mrga" . 10.0.0.5 }
        add element inet moorage endpoints6 { "mrga" . fd00::5 }
        """
    )
    assert ruleset.revoke([("mrga", [A])]) == dedent(
        """\
        add element inet moorage endpoints4 { "mrga" . 10.0.0.5 }
        delete element inet moorage endpoints4 { "mrga" . 10.0.0.5 }
        """
    )
    assert ruleset.admit([]) == ruleset.revoke([("mrga", [])]) == ""
