"""Whose tunnel packets a node takes: what the store said once counts until it says that it is over."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from ipam.keys import IPAddress
from ipam.records import Node
from isolator import registered as registered_module
from isolator.policy import Hosts
from isolator.registered import Registered, stores_of

IP1, IP2, IP3, NEW = (ip_address(f"198.18.0.{n}") for n in (1, 2, 3, 9))


def node(name: str, *underlay: IPAddress, port: int = 4789, surroundings: tuple[str, ...] = ()) -> Node:
    return Node(
        name=name,
        version="1",
        underlay=[*map(str, underlay), "fe80::1"],
        vtep=["10.64.0.1"],
        vxlan_port=port,
        surroundings=list(surroundings),
    )


def records(*nodes: Node) -> dict[str, Node]:
    return {one.name: one for one in nodes}


def heard(registered: Registered, *nodes: Node, tunnelled: bool = True) -> Hosts:
    registered.hear(records(*nodes))
    return registered.hosts((), tunnelled=tunnelled)


def test_the_tunnel_is_open_until_somebody_said_which_nodes_there_are() -> None:
    assert Registered("n1").hosts((), tunnelled=True).tunnel == 0


def test_registered_underlay_addresses_may_send_to_this_nodes_own() -> None:
    hosts = heard(Registered("n1"), node("n1", IP1), node("n2", IP2, port=8472))
    assert hosts.underlays == {IP1, IP2}, "neither link-local ones nor those of the devices"
    assert (hosts.here, hosts.tunnel, hosts.tunnels) == ({IP1}, 4789, {4789, 8472})


def test_without_a_network_in_the_tunnel_its_port_may_be_another_programs() -> None:
    hosts = heard(Registered("n1"), node("n1", IP1), tunnelled=False)
    assert (hosts.tunnel, hosts.tunnels) == (0, {4789})


def test_a_listing_without_a_node_takes_nothing_from_it() -> None:
    registered = Registered("n1")
    heard(registered, node("n1", IP1), node("n2", IP2))
    for partial in ([node("n1", IP1)], [node("n2", IP2)], []):
        hosts = heard(registered, *partial)
        assert (hosts.underlays, hosts.here, hosts.tunnel) == ({IP1, IP2}, {IP1}, 4789)


def test_a_node_that_says_no_address_for_the_moment_keeps_what_it_had() -> None:
    registered = Registered("n1")
    heard(registered, node("n1", IP1), node("n2", IP2))
    hosts = heard(registered, node("n1"), node("n2"))
    assert (hosts.underlays, hosts.here) == ({IP1, IP2}, {IP1})


def test_a_node_that_says_another_address_has_that_one_only() -> None:
    registered = Registered("n1")
    heard(registered, node("n1", IP1), node("n2", IP2))
    assert heard(registered, node("n1", IP1), node("n2", NEW)).underlays == {IP1, NEW}


def test_a_removed_node_may_not_send_any_more() -> None:
    registered = Registered("n1")
    registered.inherit(Hosts(underlays=frozenset({IP1, IP2})))
    heard(registered, node("n1", IP1), node("n2", IP2))
    registered.remove("n2")
    assert heard(registered, node("n1", IP1)).underlays == {IP1}


def test_what_an_earlier_agent_left_is_kept_without_a_word_from_the_store() -> None:
    registered = Registered("n1")
    registered.inherit(
        Hosts(
            underlays=frozenset({IP1, IP2, IP3}),
            here=frozenset({IP1}),
            tunnels=frozenset({4789, 8472}),
            tunnel=4789,
        )
    )
    hosts = registered.hosts((), tunnelled=True)
    assert (hosts.underlays, hosts.here, hosts.tunnel) == ({IP1, IP2, IP3}, {IP1}, 4789)
    assert hosts.tunnels == {4789, 8472}
    hosts = heard(registered, node("n1", IP1), node("n2", IP2))
    assert hosts.underlays == {IP1, IP2, IP3}
    assert registered.unnamed == [IP3], "that one is said to be nobody's"


def test_an_address_of_an_earlier_agent_goes_when_its_node_has_another() -> None:
    registered = Registered("n1")
    registered.inherit(Hosts(underlays=frozenset({IP1, IP2}), tunnels=frozenset({53, 4789})))
    assert heard(registered, node("n1", IP1), node("n2", IP2)).tunnels == {4789}
    assert heard(registered, node("n1", IP1), node("n2", NEW)).underlays == {IP1, NEW}


def test_an_address_whose_node_the_store_does_not_list_is_named_as_nobodys() -> None:
    registered = Registered("n1")
    heard(registered, node("n1", IP1), node("n2", IP2))
    heard(registered, node("n1", IP1))
    assert registered.unnamed == [IP2]


@pytest.mark.parametrize(
    "odd",
    ["fe80::1%eth0", "2001:db8::1%\nflush ruleset\n#", "::", "127.0.0.1", "224.0.0.1", "::ffff:1.2.3.4", "?"],
)
def test_what_is_no_address_of_a_machine_gets_into_no_set(odd: str) -> None:
    """One element that nft cannot read refuses the whole table, on every node."""
    record = node("n2", IP2).with_(underlay=[odd, str(IP2)], vtep=[odd])
    registered = Registered("n1")
    registered.hear({"n1": node("n1", IP1), "n2": record})
    hosts = registered.hosts((), tunnelled=True)
    assert (hosts.underlays, hosts.nodes) == ({IP1, IP2}, {IP1, IP2, ip_address("10.64.0.1")})


def test_what_has_not_changed_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand nodes of 64 lines take more than a second to read."""
    everyone = records(*(node(f"n{i}", ip_address(f"198.18.1.{i}")) for i in range(100)))
    registered = Registered("n1")
    registered.hear(everyone)
    read: list[str] = []
    facts = registered_module._facts
    monkeypatch.setattr(registered_module, "_facts", lambda one: read.append(one.name) or facts(one))
    changed = everyone | {"n7": node("n7", NEW)}
    registered.hear(changed)
    assert read == ["n7"]
    assert NEW in registered.hosts((), tunnelled=True).underlays


def test_where_the_store_listens_is_known_of_all_nodes_and_with_all_addresses_of_its_machine() -> None:
    """etcd mostly listens on every address of its machine; whoever has it in its configuration names one."""
    etcd = node("n1", IP1, surroundings=("address 198.18.0.1 eth0", "address 172.17.0.1 docker0"))
    other = node("n2", IP2, surroundings=("store 198.18.0.1 tcp/2379", "store 203.0.113.9 tcp/23790", "odd"))
    assert stores_of([etcd, other]) == {
        (ip_address(ip), 2379) for ip in ("198.18.0.1", "172.17.0.1", "10.64.0.1")
    } | {(ip_address("203.0.113.9"), 23790)}
