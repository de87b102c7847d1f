"""What all nodes' networks use together, and what pools make of it."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.errors import InvalidInput
from ipam.nodes_networks import NodesNetworks
from ipam.pool_collisions import check_pool, colliding_pools, warnings
from ipam.pools import Geometry, geometry, parse_pool
from ipam.records import Node
from ipam.taken import FIRM, Kind, parse_all

LAN = ("address 10.50.0.3 eth0", "connected 10.50.0.0/29 eth0", "gateway 10.50.0.1 eth0")


def pool(cidr: str, *, forced: bool = False, excluded: Sequence[str] = ()) -> Geometry:
    return geometry(parse_pool(cidr, network="web", forced=forced, excluded=excluded))


def around(**nodes: Sequence[str]) -> NodesNetworks:
    return NodesNetworks(
        Node(name=name, version="1", surroundings=list(said)) for name, said in nodes.items()
    )


def usable(shape: Geometry) -> list[str]:
    return [str(ip) for ip in shape.cidr if shape.usable(ip)]


def test_nothing_of_a_connected_network_is_given_out() -> None:
    assert usable(around(n1=LAN).effective(pool("10.50.0.0/28"))) == [f"10.50.0.{n}" for n in range(8, 15)]


def test_a_node_that_does_not_say_yet_what_its_networks_use_has_its_underlay_addresses() -> None:
    """Agents of an earlier version go on while others are upgraded."""
    older = NodesNetworks([Node(name="n1", version="1", underlay=["10.50.0.3", "fe80::1"])])
    with pytest.raises(InvalidInput, match=r"10\.50\.0\.3"):
        check_pool(pool("10.50.0.0/29"), older)


def test_a_forced_pool_gives_out_all_but_single_addresses() -> None:
    shape = around(n1=LAN).effective(pool("10.50.0.0/29", forced=True))
    assert usable(shape) == ["10.50.0.2", "10.50.0.4", "10.50.0.5", "10.50.0.6"]


def test_a_route_closes_nothing() -> None:
    shape = pool("10.50.0.0/29")
    assert around(n1=["route 10.0.0.0/8 tun0"]).effective(shape) == shape


def test_what_two_nodes_use_is_closed_until_both_do_not() -> None:
    known = around(n1=LAN, n2=LAN)
    assert known.tell("n1", ()) is False
    assert known.closed_to(pool("10.50.0.0/29"))
    assert known.tell("n2", ()) is True
    assert not known.closed_to(pool("10.50.0.0/29"))


def test_a_node_that_says_the_same_in_other_words_changes_nothing() -> None:
    known = around(n1=LAN)
    assert known.tell("n1", parse_all(["resolver 10.50.0.3", *LAN[1:], "route 10.9.0.0/16 tun0"])) is False


SAID = st.lists(
    st.builds("{} 10.50.0.{}".format, st.sampled_from(["address", "gateway", "resolver"]), st.integers(0, 15))
    | st.builds("connected 10.50.0.{}/30".format, st.sampled_from([0, 4, 8, 12]))
    | st.just("route 10.50.0.0/28"),
    max_size=4,
)


@given(st.lists(st.tuples(st.sampled_from(["n1", "n2", "n3"]), SAID), max_size=12))
def test_whatever_nodes_say_in_whatever_order_the_last_word_of_each_holds(
    told: list[tuple[str, list[str]]],
) -> None:
    known = NodesNetworks()
    last: dict[str, list[str]] = {}
    for node, said in told:
        before = [set(closed(known, forced)) for forced in (False, True)]
        changed = known.tell(node, parse_all(said))
        last[node] = said
        after = [set(closed(known, forced)) for forced in (False, True)]
        assert changed or before == after
    entries = [one for said in last.values() for one in parse_all(said)]
    for forced in (False, True):
        kinds = FIRM if forced else FIRM | {Kind.CONNECTED}
        expected = {str(ip) for one in entries if one.kind in kinds for ip in one.network}
        assert set(closed(known, forced)) == expected


def closed(known: NodesNetworks, forced: bool) -> list[str]:
    numbers = known.closed(4, forced=forced)
    return [str(ip) for ip in ip_network("10.50.0.0/28") if int(ip) in numbers]


def test_an_address_is_said_to_be_whose_it_is() -> None:
    known = around(n1=LAN, n2=LAN)
    assert known.why_closed(ip_address("10.50.0.1"), pool("10.50.0.0/28")) == (
        "the gateway 10.50.0.1 (eth0) of node n1 and 1 more"
    )
    assert known.why_closed(ip_address("10.50.0.2"), pool("10.50.0.0/28")) == (
        "the network 10.50.0.0/29 (eth0) of node n1 and 1 more"
    )
    assert known.why_closed(ip_address("10.50.0.2"), pool("10.50.0.0/28", forced=True)) == ""
    assert known.why_closed(ip_address("10.50.0.9"), pool("10.50.0.0/28")) == ""


@pytest.mark.parametrize(
    ("said", "cidr", "named"),
    [
        ("connected 10.50.0.0/24 eth0", "10.50.0.0/16", "the network 10.50.0.0/24 (eth0) of node n1"),
        ("connected 10.0.0.0/8 eth0", "10.50.0.0/16", "the network 10.0.0.0/8 (eth0) of node n1"),
        ("connected fd50::/64 eth0", "fd50::/60", "the network fd50::/64 (eth0) of node n1"),
        ("address 10.50.0.3 eth0", "10.50.0.0/16", "the address 10.50.0.3 (eth0) of node n1"),
        ("gateway 10.50.0.3 eth0", "10.50.0.0/16", "the gateway 10.50.0.3 (eth0) of node n1"),
        ("resolver 10.50.0.3", "10.50.0.0/16", "the name server 10.50.0.3 of node n1"),
        ("store 10.50.0.3 tcp/2379", "10.50.0.0/16", "the store's endpoint 10.50.0.3 (tcp/2379) of node n1"),
        ("several 10.50.0.0/28", "10.50.0.0/16", "several addresses of 10.50.0.0/28 of node n1"),
    ],
)
def test_a_pool_over_what_nodes_use_is_refused_naming_it(said: str, cidr: str, named: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_pool(pool(cidr), around(n1=[said]))
    assert named in str(refused.value)
    assert "choose another CIDR" in str(refused.value)


def test_a_pool_that_excludes_what_nodes_use_is_fine() -> None:
    check_pool(pool("10.50.0.0/24", excluded=["10.50.0.0/29"]), around(n1=LAN))


def test_a_forced_pool_needs_an_address_that_is_left() -> None:
    addresses = [f"address 10.50.0.{n} eth0" for n in (1, 2)]
    with pytest.raises(InvalidInput, match="no address that nodes do not use") as refused:
        check_pool(pool("10.50.0.0/30", forced=True), around(n1=addresses))
    assert "--force" not in str(refused.value)


def test_a_route_only_warns() -> None:
    known = around(n1=["route 10.0.0.0/8 tun0"])
    check_pool(pool("10.50.0.0/24"), known)
    (warning,) = warnings([pool("10.50.0.0/24")], known)
    assert "a route to 10.0.0.0/8 (tun0) of node n1" in warning


def test_pools_that_were_there_first_are_named_with_the_next_step() -> None:
    (sentence,) = colliding_pools([pool("10.50.0.0/24"), pool("10.60.0.0/24")], around(n1=LAN))
    assert (
        "the pool 10.50.0.0/24 of network web collides with the address 10.50.0.3 (eth0) of node n1"
        in sentence
    )
    assert "moorage network set web --enable-pool 10.50.0.0/24 --force" in sentence
