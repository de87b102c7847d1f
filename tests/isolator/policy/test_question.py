"""What `moorage policy test` answers, from the store's records."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipam.keys import IPAddress
from ipam.records import NODE_ENGINE, Address, AddressState, Network, Node
from isolator.policy.question import (
    Known,
    addresses_of_nodes,
    callers_of,
    cure,
    may_call,
    unbound_source,
)
from isolator.policy.sending import Packet


def assigned(node: str, network: str, *netgroups: str, engine: str = "mesos") -> Address:
    return Address(
        pool="p",
        state=AddressState.ASSIGNED,
        node=node,
        container_id="c",
        ifname="eth0",
        network=network,
        netgroups=list(netgroups),
        engine=engine,
    )


ADDRESSES: dict[IPAddress, Address] = {
    ip_address("10.0.0.1"): assigned("n1", "web", "red"),
    ip_address("10.0.0.2"): assigned("n2", "web", "red", "blue"),
    ip_address("10.0.0.3"): assigned("n1", "web"),
    ip_address("10.0.0.4"): assigned("n1", "open", "open"),
    ip_address("10.0.0.5"): assigned("n1", "web", "public"),
    ip_address("10.0.0.6"): assigned("n2", "web", "red").with_(state=AddressState.COOLING),
    ip_address("10.0.0.7"): assigned("n2", "away", "green"),
    ip_address("10.0.0.8"): assigned("n1", "web", engine=NODE_ENGINE),
    ip_address("10.0.0.9"): assigned("n1", "nodes", "green"),
    ip_address("fd00::1"): assigned("n1", "web", "red"),
}
NODES = (
    Node(name="n1", version="1", underlay=["192.0.2.1", "fe80::1"], vtep=["10.0.0.8"]),
    Node(name="n2", version="1", underlay=["192.0.2.2", "what is this"]),
)
KNOWN = Known(
    addresses=ADDRESSES,
    networks={
        "web": Network(name="web", pools=[], allow_from=["198.51.100.0/24"]),
        "open": Network(name="open", pools=[], isolation="open"),
        "nodes": Network(name="nodes", pools=[], allow_from=["nodes"], to_node=[]),
    },
    pools=[ip_network("10.0.0.0/24"), ip_network("fd00::/64")],
    nodes=addresses_of_nodes(NODES, ADDRESSES),
    underlays=frozenset({ip_address("192.0.2.1"), ip_address("192.0.2.2")}),
    tunnels=frozenset({4789, 8472}),
    stores=frozenset({(ip_address("192.0.2.1"), 2379)}),
)


@pytest.mark.parametrize(
    ("source", "target", "allowed", "why"),
    [
        ("10.0.0.1", "10.0.0.2", True, "both are in the netgroup red"),
        ("10.0.0.2", "10.0.0.1", True, "both are in the netgroup red"),
        ("10.0.0.1", "10.0.0.3", False, "the caller is in red, the called in web"),
        ("10.0.0.3", "10.0.0.1", False, "the caller is in web, the called in red"),
        ("10.0.0.1", "10.0.0.4", True, "its network is open"),
        ("10.0.0.4", "10.0.0.1", False, "share no netgroup"),
        ("203.0.113.9", "10.0.0.4", True, "its network is open"),
        ("10.0.0.1", "10.0.0.5", True, "in the netgroup public"),
        ("10.0.0.5", "10.0.0.1", False, "the caller is in public"),
        ("198.51.100.7", "10.0.0.1", True, "allows callers from 198.51.100.0/24"),
        ("203.0.113.9", "10.0.0.1", False, "does not allow it by --allow-from"),
        ("192.0.2.1", "10.0.0.1", True, "node n1 reaches all its own containers"),
        ("192.0.2.2", "10.0.0.1", False, "does not allow it by --allow-from"),
        ("192.0.2.2", "10.0.0.9", True, "allows callers on nodes"),
        ("10.0.0.8", "10.0.0.1", True, "node n1 reaches all its own containers"),
        ("10.0.0.1", "10.0.0.8", True, "is node n1's own"),
        ("10.0.0.1", "10.0.0.6", False, "no container has 10.0.0.6"),
        ("10.0.0.1", "10.0.0.77", False, "no container has 10.0.0.77"),
        ("10.0.0.77", "10.0.0.1", False, "nobody can send from it"),
        ("10.0.0.1", "203.0.113.9", True, "outside of all pools"),
        ("10.0.0.1", "fd00::1", False, "different families"),
        ("10.0.0.1", "10.0.0.7", False, "the called in green"),
    ],
)
def test_what_is_allowed_and_why(source: str, target: str, allowed: bool, why: str) -> None:
    verdict = may_call(KNOWN, ip_address(source), ip_address(target))
    assert verdict.allowed == allowed
    assert why in verdict.why


@pytest.mark.parametrize(
    ("source", "target", "command"),
    [
        ("10.0.0.1", "10.0.0.2", ""),
        ("10.0.0.1", "10.0.0.3", "moorage endpoint set-netgroups c/eth0 web red"),
        ("10.0.0.5", "10.0.0.1", "moorage endpoint set-netgroups c/eth0 public red"),
        (
            "203.0.113.9",
            "10.0.0.1",
            "moorage network set web --allow-from 198.51.100.0/24 --allow-from 203.0.113.9",
        ),
        ("192.0.2.2", "10.0.0.1", "moorage network set web --allow-from 198.51.100.0/24 --allow-from nodes"),
        ("203.0.113.9", "10.0.0.7", ""),
        ("10.0.0.77", "10.0.0.1", "moorage ip show 10.0.0.77"),
        ("10.0.0.1", "10.0.0.6", "moorage ip show 10.0.0.6"),
        ("10.0.0.1", "fd00::1", ""),
    ],
)
def test_what_is_denied_has_a_command_that_helps(source: str, target: str, command: str) -> None:
    assert cure(KNOWN, ip_address(source), ip_address(target)) == command


UDP, TCP, ERROR = (lambda port, p=p: Packet(p, port) for p in ("udp", "tcp", "icmp-error"))


@pytest.mark.parametrize(
    ("source", "target", "packet", "allowed", "drop", "command"),
    [
        ("10.0.0.1", "192.0.2.2", UDP(4789), False, "tunnel-port", ""),
        ("10.0.0.1", "203.0.113.9", UDP(8472), False, "tunnel-port", ""),
        ("10.0.0.1", "10.0.0.2", UDP(4789), False, "tunnel-port", ""),
        ("10.0.0.1", "192.0.2.2", UDP(4790), True, "", ""),
        ("10.0.0.1", "192.0.2.2", TCP(4789), True, "", ""),
        ("203.0.113.9", "192.0.2.2", UDP(4789), False, "tunnel-source", ""),
        ("192.0.2.1", "192.0.2.2", UDP(4789), True, "", ""),
        ("203.0.113.9", "192.0.2.2", TCP(22), True, "", ""),
        ("10.0.0.9", "192.0.2.1", TCP(2379), False, "store", "moorage network set nodes --to-node store"),
        ("10.0.0.1", "192.0.2.1", TCP(2379), True, "", ""),
        ("10.0.0.9", "192.0.2.2", TCP(2379), True, "", ""),
        ("10.0.0.9", "192.0.2.1", UDP(2379), True, "", ""),
        ("10.0.0.1", "10.0.0.2", ERROR(None), True, "", ""),
        ("10.0.0.1", "10.0.0.5", ERROR(None), True, "", ""),
        ("10.0.0.5", "10.0.0.1", ERROR(None), True, "", ""),
        ("10.0.0.1", "10.0.0.3", ERROR(None), False, "", "moorage endpoint set-netgroups c/eth0 web red"),
        ("10.0.0.77", "10.0.0.1", TCP(80), False, "unused-address", "moorage ip show 10.0.0.77"),
    ],
)
def test_what_no_netgroup_decides_has_a_name(
    source: str, target: str, packet: Packet, allowed: bool, drop: str, command: str
) -> None:
    one, other = ip_address(source), ip_address(target)
    verdict = may_call(KNOWN, one, other, packet)
    assert (verdict.allowed, verdict.drop) == (allowed, drop)
    assert drop in verdict.why
    assert cure(KNOWN, one, other, packet) == command


def test_a_containers_name_is_no_shell_text() -> None:
    hostile = ADDRESSES[ip_address("10.0.0.3")].with_(container_id="$(reboot)")
    known = replace(KNOWN, addresses={**ADDRESSES, ip_address("10.0.0.3"): hostile})
    command = cure(known, ip_address("10.0.0.1"), ip_address("10.0.0.3"))
    assert command == "moorage endpoint set-netgroups '$(reboot)/eth0' web red"


def test_a_network_that_nobody_knows_allows_netgroups_only() -> None:
    assert [str(clause) for clause in callers_of(KNOWN, ADDRESSES[ip_address("10.0.0.7")])] == [
        "both are in the netgroup green"
    ]


def test_link_local_and_unreadable_addresses_are_no_nodes() -> None:
    assert {str(ip): node for ip, node in KNOWN.nodes.items()} == {
        "10.0.0.8": "n1",
        "192.0.2.1": "n1",
        "192.0.2.2": "n2",
    }


def test_what_nobody_bound_comes_from_the_network_of_the_one_who_is_called() -> None:
    def own(ifname: str, network: str, container: str = "both") -> Address:
        return assigned("n1", network).with_(container_id=container, ifname=ifname)

    addresses = {
        ip_address("10.0.0.10"): own("eth0", "web"),
        ip_address("10.1.0.10"): own("eth1", "db"),
        ip_address("10.1.0.11"): own("eth0", "db", "member"),
        ip_address("fd00::10"): own("eth0", "web"),
    }
    pools = {"web": [ip_network("10.0.0.0/24"), ip_network("fd00::/64")], "db": [ip_network("10.1.0.0/24")]}
    known = replace(KNOWN, addresses=addresses, pools_of=pools)

    def leaves_by(source: str, target: str, default: str = "eth0") -> tuple[str, str] | None:
        found = unbound_source(
            known, ip_address(source), ip_address(target), lambda record: record.ifname == default
        )
        return None if found is None else (found.ifname, str(found.source))

    assert leaves_by("10.0.0.10", "10.1.0.11") == ("eth1", "10.1.0.10")
    assert leaves_by("10.1.0.10", "10.1.0.11") == ("eth1", "10.1.0.10")
    assert leaves_by("10.0.0.10", "192.0.2.9") == ("eth0", "10.0.0.10")
    assert leaves_by("10.0.0.10", "192.0.2.9", default="eth1") == ("eth1", "10.1.0.10")
    assert leaves_by("fd00::10", "2001:db8::1", default="eth1") == ("eth0", "fd00::10")
    assert leaves_by("10.0.0.10", "10.1.0.10") is None, "its own address"
    assert leaves_by("192.0.2.9", "10.1.0.11") is None, "no container's"
