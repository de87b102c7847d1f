"""Netlink messages as bytes."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from isolator.netlink import codec, messages
from isolator.netlink.codec import Request

VALUES = st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=40)), unique_by=lambda pair: pair[0])


@given(VALUES)
def test_attributes_come_back_as_they_went(values: list[tuple[int, bytes]]) -> None:
    packed = b"".join(codec.attribute(kind, value) for kind, value in values)
    assert len(packed) % 4 == 0
    found = codec.attributes(memoryview(packed))
    assert {kind: bytes(value) for kind, value in found.items()} == dict(values)


@given(st.lists(st.binary(max_size=30), min_size=1))
def test_messages_come_back_as_they_went(bodies: list[bytes]) -> None:
    padded = [body + bytes(-len(body) & 3) for body in bodies]
    datagram = b"".join(Request(20 + i, 0, body, "").encode(1, i) for i, body in enumerate(padded))
    found = list(codec.messages(datagram))
    assert [(m.kind, m.seq, bytes(m.body)) for m in found] == [(20 + i, i, b) for i, b in enumerate(padded)]
    assert codec.last_message(datagram) == found[-1]


@given(st.binary(max_size=64))
def test_garbage_ends_instead_of_looping(garbage: bytes) -> None:
    list(codec.messages(garbage))
    codec.attributes(memoryview(garbage))


def decoded(request: Request, kind: Any) -> Any:
    """The request as an independent implementation reads it."""
    message = kind(request.encode(codec.NLM_F_REQUEST, 1))
    message.decode()
    return message


def test_veth_as_others_read_it() -> None:
    request = messages.create_veth(
        name="mrgabc",
        index=5,
        mac="ee:ee:ee:ee:ee:ee",
        peer="eth0",
        peer_index=6,
        peer_mac="0a:58:0a:00:00:05",
        peer_netns=7,
        mtu=1450,
    )
    link = decoded(request, ifinfmsg)
    assert link["index"] == 5
    assert link.get("IFLA_IFNAME") == "mrgabc"
    assert link.get("IFLA_MTU") == 1450
    assert link.get("IFLA_ADDRESS") == "ee:ee:ee:ee:ee:ee"
    info = link.get("IFLA_LINKINFO")
    assert info.get("IFLA_INFO_KIND") == "veth"
    peer = info.get("IFLA_INFO_DATA").get("VETH_INFO_PEER")
    assert peer["index"] == 6
    assert peer.get("IFLA_IFNAME") == "eth0"
    assert peer.get("IFLA_MTU") == 1450
    assert peer.get("IFLA_ADDRESS") == "0a:58:0a:00:00:05"


@pytest.mark.parametrize("ip", [ip_address("10.0.0.5"), ip_address("fd00::5")], ids=str)
def test_address_neighbour_route_and_rule_as_others_read_them(ip: Any) -> None:
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    address = decoded(messages.add_address(5, "eth0", ip), ifaddrmsg)
    assert (address["family"], address["prefixlen"], address["index"]) == (family, ip.max_prefixlen, 5)
    assert address.get("IFA_ADDRESS") == address.get("IFA_LOCAL") == str(ip)
    assert bool(address.get("IFA_FLAGS") & messages.IFA_F_NODAD) == (ip.version == 6)

    neighbour = decoded(messages.add_neighbour(5, "eth0", ip, "0a:58:0a:00:00:05"), ndmsg)
    assert (neighbour["family"], neighbour["ifindex"], neighbour["state"]) == (family, 5, 0x80)
    assert (neighbour.get("NDA_DST"), neighbour.get("NDA_LLADDR")) == (str(ip), "0a:58:0a:00:00:05")

    route = decoded(messages.add_host_route(5, "mrgabc", ip), rtmsg)
    assert (route["family"], route["dst_len"], route["proto"]) == (family, ip.max_prefixlen, 157)
    assert (route.get("RTA_DST"), route.get("RTA_OIF"), route.get("RTA_TABLE")) == (str(ip), 5, 254)

    default = decoded(messages.add_default_route(5, "eth0", ip, table=70000, metric=7), rtmsg)
    assert (default["dst_len"], default["flags"]) == (0, messages.RTNH_F_ONLINK)
    assert (default.get("RTA_GATEWAY"), default.get("RTA_TABLE")) == (str(ip), 70000)
    assert default.get("RTA_PRIORITY") == 7

    rule = decoded(messages.add_source_rule(ip, 70000, 15700), fibmsg)
    assert (rule["family"], rule["src_len"], rule["action"]) == (family, ip.max_prefixlen, 1)
    assert (rule.get("FRA_SRC"), rule.get("FRA_TABLE"), rule.get("FRA_PRIORITY")) == (str(ip), 70000, 15700)
    assert rule.get("FRA_PROTOCOL") == 157


def test_multipath_next_hops_are_found() -> None:
    route = codec.attribute(5, b"\x01\x02\x03\x04")
    hops = b"".join(messages.NEXT_HOP.pack(8 + len(route), index) + route for index in (3, 4))
    assert messages.next_hop_links(memoryview(hops)) == [3, 4]
    assert messages.next_hop_links(None) == []


def test_deleting_a_route_names_its_link_and_table() -> None:
    route = decoded(messages.delete_route(ip_network("10.0.0.0/24"), 70000, 5, 1), rtmsg)
    assert (route["dst_len"], route.get("RTA_DST")) == (24, "10.0.0.0")
    assert (route.get("RTA_TABLE"), route.get("RTA_OIF")) == (70000, 5)
