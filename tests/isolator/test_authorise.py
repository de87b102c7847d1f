"""Who may ask for what: one sentence says what is not allowed, by which rule, and how it would be."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.netgroups import PUBLIC, Netgroup
from ipam.permissions import NEW_NETWORK
from ipam.pools import geometry, parse_pool
from ipam.records import Network
from isolator.authorise import authorise
from isolator.errors import Refused
from isolator.model import Asked, AttachSpec, Bandwidth, EndpointKey, Limit, PortMapping
from moorage.cli.network import network as network_group
from moorage.cli.network_settings import read_settings

NEW = Network(name="web", pools=[], **NEW_NETWORK)
POOL = geometry(parse_pool("10.64.0.0/24", network="web", static=["10.64.0.10-10.64.0.19"]))
SPEC = AttachSpec(EndpointKey("c1", "eth0"), "r1", Asked("boot", 1), "cni", "web", "/netns")


def groups(*names: str) -> AttachSpec:
    return replace(SPEC, netgroups=tuple(map(Netgroup, names)))


def addresses(*ips: str, reservation: str | None = None) -> AttachSpec:
    return replace(SPEC, ips=tuple(map(ip_address, ips)), reservation=reservation)


def ports(*numbers: int) -> AttachSpec:
    return replace(SPEC, port_mappings=tuple(PortMapping("tcp", number, 80) for number in numbers))


def refusal(spec: AttachSpec, network: Network = NEW) -> str:
    with pytest.raises(Refused) as caught:
        authorise(spec, network, [POOL])
    assert caught.value.code == 106
    return str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        groups("web"),
        addresses("10.64.0.10"),
        ports(31000, 32000),
        replace(SPEC, pool="10.64.0.0/24", default_route=True, mtu=1400),
        replace(SPEC, bandwidth=Bandwidth(egress=Limit(10**6))),
    ],
)
def test_what_a_container_asks_of_itself_needs_no_permission(spec: AttachSpec) -> None:
    authorise(spec, NEW, [POOL])


@pytest.mark.parametrize(
    ("spec", "rules", "sentence"),
    [
        (
            groups("web", "db", "ops"),
            {"allow_netgroups": ["team-*"]},
            "network web allows the netgroups web, team-*, and c1/eth0 asks for the netgroup db, ops; its operator "
            "allows it with `moorage network set web --allow-netgroup 'team-*' --allow-netgroup db "
            "--allow-netgroup ops`",
        ),
        (
            groups("public"),
            {"allow_netgroups": ["*"]},
            "network web lets nobody be reachable from anywhere, and c1/eth0 asks for the netgroup public; its "
            "operator allows it with `moorage network set web --allow-public`",
        ),
        (
            addresses("10.64.0.20"),
            {},
            "network web allows the static ranges of its pools to be asked for, and c1/eth0 asks for the address "
            "10.64.0.20; its operator allows it with "
            "`moorage network set web --allow-static ranges --allow-static 10.64.0.20`",
        ),
        (
            addresses("10.64.0.20"),
            {"allow_static": []},
            "network web allows no address to be asked for, and c1/eth0 asks for the address 10.64.0.20; its "
            "operator allows it with `moorage network set web --allow-static 10.64.0.20`",
        ),
        (
            ports(31000, 443, 80),
            {},
            "network web allows the host ports 31000-32000, and c1/eth0 asks for the host port 80, 443; its operator "
            "allows it with `moorage network set web --allow-hostport 31000-32000 --allow-hostport 80 "
            "--allow-hostport 443`",
        ),
        (
            replace(SPEC, mac="02:00:00:00:00:01"),
            {},
            "network web lets nobody choose a MAC, and c1/eth0 asks for the MAC 02:00:00:00:00:01; its operator "
            "allows it with `moorage network set web --allow-mac`",
        ),
        (
            replace(SPEC, bandwidth=Bandwidth(ingress=Limit(10**6), egress=Limit(10**9))),
            {"max_bandwidth": 10**8},
            "network web gives a container at most 100mbit, and c1/eth0 asks for 1gbit of egress; its operator "
            "allows it with `moorage network set web --max-bandwidth 1gbit`",
        ),
    ],
)
def test_a_refusal_names_the_rule_and_the_command_that_would_allow_it(
    spec: AttachSpec, rules: dict[str, object], sentence: str
) -> None:
    network = NEW.with_(**rules)
    assert refusal(spec, network) == sentence
    authorise(spec, obeyed(sentence, network), [POOL])


def obeyed(sentence: str, network: Network) -> Network:
    """The network after the operator did what the refusal says."""
    words = shlex.split(sentence.partition("`")[2].rstrip("`"))
    assert words[:4] == ["moorage", "network", "set", network.name]
    command = network_group.commands["set"]
    settings = command.make_context("set", words[3:]).params
    return network.with_(**read_settings(settings).fields())


def test_a_reservations_key_is_its_own_permission_and_for_its_addresses_only() -> None:
    reserved = [ip_address("10.64.0.20")]
    authorise(addresses("10.64.0.20", reservation="k"), NEW, [POOL], reserved)
    authorise(addresses(reservation="k"), NEW, [POOL], reserved)
    with pytest.raises(Refused, match=r"10\.64\.0\.21"):
        authorise(addresses("10.64.0.21", reservation="k"), NEW, [POOL], reserved)


def test_the_mac_that_follows_from_an_address_is_nobodys_choice() -> None:
    asked = addresses("10.64.0.20")
    own = [ip_address("10.64.0.20")]
    authorise(replace(asked, mac="0a:58:0a:40:00:14"), NEW, [POOL], own)
    for mac in ("0a:58:0a:40:00:15", "02:00:00:00:00:01"):
        with pytest.raises(Refused, match="lets nobody choose a MAC"):
            authorise(replace(asked, mac=mac), NEW, [POOL], own)
    with pytest.raises(Refused, match="lets nobody choose a MAC"):
        authorise(replace(SPEC, mac="0a:58:0a:40:00:14"), NEW, [POOL], own)


def test_the_default_netgroup_is_not_a_way_to_be_public() -> None:
    network = NEW.with_(name="public")
    assert "--allow-public" in refusal(replace(SPEC, network="public"), network)


def test_a_limit_that_the_network_sets_is_everybodys() -> None:
    assert Bandwidth().within(0) == Bandwidth()
    assert Bandwidth().within(10**8) == Bandwidth(Limit(10**8), Limit(10**8))
    asked = Bandwidth(egress=Limit(10**6, 8000))
    assert asked.within(10**8) == Bandwidth(Limit(10**8), Limit(10**6, 8000))


NAMES = st.sampled_from(["web", "db", "team-a", "team-b", "public", "x"])
PATTERNS = st.sampled_from(["*", "team-*", "db", "*-a", "public"])
ADDRESSES = st.integers(0, 255).map(lambda n: IPv4Address(0x0A400000 + n))
PORTS = st.integers(1, 65535) | st.sampled_from([30999, 31000, 32000, 32001])


@given(
    asked=st.lists(NAMES, max_size=3, unique=True),
    ips=st.lists(ADDRESSES, max_size=1),
    host_ports=st.lists(PORTS, max_size=2, unique=True),
    mac=st.none() | st.just("02:00:00:00:00:01"),
    rate=st.none() | st.integers(8000, 10**10),
    patterns=st.lists(PATTERNS, max_size=2),
    static=st.lists(st.sampled_from(["all", "ranges", "10.64.0.128/25"]), max_size=2),
    hostports=st.lists(st.sampled_from(["31000-32000", "80", "1-65535"]), max_size=2),
    public=st.booleans(),
    allow_mac=st.booleans(),
    most=st.sampled_from([0, 10**6, 10**9]),
)
def test_what_passes_is_what_the_rules_say_one_by_one(
    asked: Sequence[str],
    ips: Sequence[IPv4Address],
    host_ports: Sequence[int],
    mac: str | None,
    rate: int | None,
    patterns: list[str],
    static: list[str],
    hostports: list[str],
    public: bool,
    allow_mac: bool,
    most: int,
) -> None:
    """The rules once more, in the obvious way."""
    spec = replace(
        ports(*host_ports),
        netgroups=tuple(map(Netgroup, asked)),
        ips=tuple(ips),
        mac=mac,
        bandwidth=Bandwidth(egress=Limit(rate) if rate else None),
    )
    network = NEW.with_(
        allow_netgroups=patterns,
        allow_public=public,
        allow_static=static,
        allow_mac=allow_mac,
        allow_hostports=hostports,
        max_bandwidth=most,
    )
    spans = {"31000-32000": (31000, 32000), "80": (80, 80), "1-65535": (1, 65535)}
    groups_pass = all(
        public
        if name == PUBLIC
        else name == "web"
        or "*" in patterns
        or name in patterns
        or ("team-*" in patterns and name.startswith("team-"))
        or ("*-a" in patterns and name.endswith("-a"))
        for name in asked
    )
    last = int(ips[0]) & 0xFF if ips else 0
    static_passes = (
        not ips
        or "all" in static
        or ("ranges" in static and 10 <= last <= 19)
        or ("10.64.0.128/25" in static and last >= 128)
    )
    ports_pass = all(any(spans[r][0] <= p <= spans[r][1] for r in hostports) for p in host_ports)
    rate_passes = rate is None or most == 0 or rate <= most
    expected = groups_pass and static_passes and ports_pass and (mac is None or allow_mac) and rate_passes
    try:
        authorise(spec, network, [POOL])
        passed = True
    except Refused:
        passed = False
    assert passed == expected
