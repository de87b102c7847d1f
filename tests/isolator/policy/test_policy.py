"""The policy on real traffic: who gets through, who does not, and how the table is kept."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from ipaddress import ip_address, ip_network

import pytest

from isolator.drivers.naming import mac_for
from isolator.errors import KernelRefused
from isolator.model import IPAddress, PortMapping
from isolator.netlink import Connection
from isolator.netlink.codec import Request
from isolator.netlink.socket import NetlinkSocket
from isolator.policy import Admission, Hosts, Isolation, Policy, Surroundings, kernel, ruleset
from isolator.policy.book import Book
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import (
    AROUND,
    NODE4,
    NODE6,
    POOLS,
    SILENCE,
    WORLD4,
    WORLD6,
    Machine,
    Room,
    admission,
    heard,
    sh,
    wire,
    wrong_sets,
)
from tests.patience import PATIENCE

pytestmark = pytest.mark.kernel

A4, A6 = "10.0.0.5", "fd00::5"
B4, B6 = "10.0.0.6", "fd00::6"
WORLDS = ((4, WORLD4), (6, WORLD6))


def endpoint(number: int, *netgroups: str) -> Admission:
    """One of many dual-stack endpoints."""
    ips = (ip_address("10.0.0.0") + number, ip_address("fd00::") + number)
    return Admission(f"mrg{number:012d}", mac_for(ips), ips, "web", netgroups or ("web",))


# -- traffic


def test_without_an_element_nothing_goes_in_or_out(machine: Machine, make_container: MakeRoom) -> None:
    other, container = make_container(), make_container()
    machine.attach(other, "eth0", B4, B6)
    wiring = wire(container, "eth0", A4, A6)
    machine.do(machine.driver.setup, wiring)
    there, here = (ip_address(B4), ip_address(B6)), (ip_address(A4), ip_address(A6))
    for outside, targets in ((other, there), (machine, (NODE4, NODE6)), (machine.world, (WORLD4, WORLD6))):
        for target, ip in zip(targets, here, strict=True):
            assert not gets_through(container, outside, target)
            assert not gets_through(outside, container, ip)
    machine.do(machine.policy.admit, admission(wiring))
    assert heard(other, ip_address(B4), container) == A4
    assert heard(container, ip_address(A6), other) == B6


def gets_through(
    client: Room, server: Room, ip: IPAddress, source: IPAddress | None = None, *, within: float = SILENCE
) -> bool:
    """Whether a single packet arrives, answered or not."""
    listening = server.udp(ip)
    listening.settimeout(within)
    asking = client.udp(source or ip_address("0.0.0.0" if ip.version == 4 else "::"))
    try:
        asking.sendto(b"hello?", listening.getsockname()[:2])
        listening.recv(64)
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("spoofed4", "spoofed6"), [(B4, B6), ("192.0.2.77", "2001:db8::77"), ("10.0.0.99", "fd00::99")]
)
def test_a_spoofed_source_goes_nowhere(
    machine: Machine, make_container: MakeRoom, spoofed4: str, spoofed6: str
) -> None:
    victim, liar = make_container(), make_container()
    machine.attach(victim, "eth0", B4, B6)
    machine.attach(liar, "eth0", A4, A6)
    liar.sh(f"ip addr add {spoofed4}/32 dev eth0; ip addr add {spoofed6}/128 dev eth0 nodad")
    for source, own, target, node, world in (
        (ip_address(spoofed4), ip_address(A4), ip_address(B4), NODE4, WORLD4),
        (ip_address(spoofed6), ip_address(A6), ip_address(B6), NODE6, WORLD6),
    ):
        if source != target:
            assert not gets_through(liar, victim, target, source)
        assert not gets_through(liar, machine, node, source)
        assert not gets_through(liar, machine.world, world, source)
        assert gets_through(liar, machine.world, world, own, within=PATIENCE)


def test_packets_without_a_routable_source_are_dropped(machine: Machine, container: Room) -> None:
    """DHCP, router solicitations, neighbour discovery and MLD: nobody here would answer them rightly."""
    machine.attach(container, "eth0", A4, A6)
    container.sh("ip addr add fe80::77/64 dev eth0 nodad")
    index = container.do(socket.if_nametoindex, "eth0")
    seen = machine.unbound(socket.AF_INET6, socket.SOCK_DGRAM)
    seen.bind(("::", 547))
    seen.settimeout(SILENCE)
    asking = container.unbound(socket.AF_INET6, socket.SOCK_DGRAM)
    asking.bind(("fe80::77", 546, 0, index))
    asking.sendto(b"solicit", (str(NODE6), 547))
    with pytest.raises(TimeoutError):
        seen.recv(64)


def test_taking_an_element_away_cuts_what_is_established(machine: Machine, container: Room) -> None:
    wiring = machine.attach(container, "eth0", A4, A6, netgroups=("public",))
    for ip in wiring.ips:
        machine.do(machine.policy.admit, admission(wiring, "public"))
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        listening, client = (room.unbound(family, socket.SOCK_STREAM) for room in (container, machine.world))
        listening.bind((str(ip), 0))
        listening.listen()
        client.connect(listening.getsockname()[:2])
        server, _ = listening.accept()
        with server:
            client.send(b"before")
            assert server.recv(64) == b"before"
            server.settimeout(SILENCE)
            machine.do(machine.policy.revoke, [wiring.host_ifname])
            client.send(b"after")
            with pytest.raises(TimeoutError):
                server.recv(64)


def test_restoring_the_table_does_not_cut_what_is_established(machine: Machine, container: Room) -> None:
    wiring = machine.attach(container, "eth0", A4, A6)
    for version, world in WORLDS:
        server, client = machine.world.udp(world), container.udp(wiring.ips[version // 3 - 1], 4000)
        client.sendto(b"hello", server.getsockname()[:2])
        _, seen = server.recvfrom(64)
        machine.do(machine.policy.restore, [admission(wiring)], AROUND)
        server.sendto(b"again", seen[:2])
        assert client.recv(64) == b"again"
        client.sendto(b"hello", server.getsockname()[:2])
        assert server.recvfrom(64)[1] == seen, "the same masqueraded port"


def test_only_traffic_that_leaves_all_pools_from_a_nat_pool_is_masqueraded(
    machine: Machine, make_container: MakeRoom
) -> None:
    """10.0/16 and fd00::/64 are NAT pools, 10.1/16 is a pool without NAT."""
    one, other, plain = make_container(), make_container(), make_container()
    machine.attach(one, "eth0", A4, A6)
    machine.attach(other, "eth0", B4, B6)
    machine.attach(plain, "eth0", "10.1.0.5")
    assert heard(machine.world, WORLD4, one) == str(NODE4)
    assert heard(machine.world, WORLD6, one) == str(NODE6)
    assert heard(other, ip_address(B4), one) == A4
    assert heard(other, ip_address(B6), one) == A6
    assert heard(plain, ip_address("10.1.0.5"), one) == A4
    assert heard(one, ip_address(A4), plain) == "10.1.0.5"
    assert heard(machine.world, WORLD4, plain) == "10.1.0.5"
    # Another node's containers, behind the world: still pool to pool.
    machine.world.sh("ip addr add 10.0.200.1/32 dev lo; ip addr add fd00::c8/128 dev lo nodad")
    machine.world.delivers("fd00::c8")
    machine.sh("ip route add 10.0.200.0/24 via 192.0.2.2; ip route add fd00::c8 via 2001:db8::2")
    away = (ip_address("10.0.200.1"), ip_address("fd00::c8"))
    machine.do(machine.policy.set_others, [(ip, ("web",)) for ip in away])
    assert heard(machine.world, ip_address("10.0.200.1"), one) == A4
    assert heard(machine.world, ip_address("fd00::c8"), one) == A6


def test_pools_can_be_replaced_while_containers_run(machine: Machine, container: Room) -> None:
    machine.attach(container, "eth0", A4, A6)
    machine.do(machine.policy.set_surroundings, Surroundings(pools=POOLS))
    assert heard(machine.world, WORLD4, container) == A4
    assert heard(machine.world, WORLD6, container) == A6
    for _ in range(2):
        machine.do(
            machine.policy.set_surroundings,
            Surroundings(pools=(*POOLS, POOLS[0], ip_network("10.0.5.0/24")), nat_pools=POOLS),
        )
    assert heard(machine.world, WORLD4, container) == str(NODE4)
    machine.do(machine.policy.set_surroundings, Surroundings())
    assert heard(machine.world, WORLD6, container) == A6


# -- the table


@pytest.fixture
def policy(container: Room) -> Policy:
    """A policy in an otherwise empty namespace."""
    return container.do(Policy)


def pairs(*endpoints: Admission) -> set[tuple[str, IPAddress]]:
    return {(endpoint.host_ifname, ip) for endpoint in endpoints for ip in endpoint.ips}


def test_admit_and_revoke_may_be_repeated(container: Room, policy: Policy) -> None:
    container.do(policy.restore, [], AROUND)
    empty = container.sh("nft list table inet moorage")
    first, second = endpoint(1), endpoint(2, "db")
    for _ in range(2):
        container.do(policy.admit, first)
        container.do(policy.admit, second)
    assert container.do(policy.elements) == pairs(first, second)
    for _ in range(2):
        container.do(policy.revoke, [first.host_ifname])
    assert container.do(policy.elements) == pairs(second)
    container.do(policy.revoke, [first.host_ifname, second.host_ifname])
    container.do(policy.revoke, [])
    assert container.do(policy.elements) == set()
    assert container.sh("nft list table inet moorage") == empty
    assert container.do(wrong_sets, policy) == {}


def test_a_late_revoke_leaves_the_new_owner_of_an_address_alone(container: Room, policy: Policy) -> None:
    container.do(policy.restore, [], AROUND)
    old = replace(endpoint(1), host_ifname="mrgold")
    new = replace(endpoint(1, "db"), host_ifname="mrgnew")
    container.do(policy.admit, old)
    container.do(policy.admit, new)
    container.do(policy.revoke, ["mrgold"])
    assert container.do(policy.elements) == pairs(new)
    assert container.do(wrong_sets, policy) == {}
    table = container.sh("nft list table inet moorage")
    assert "netgroup4_db" in table
    assert "netgroup4_web" not in table


def test_keeping_our_table_touches_no_other(container: Room, policy: Policy) -> None:
    """DOCKER-USER is another matter: test_docker_user.py."""
    container.sh(
        "nft 'table inet other { set s { type ipv4_addr; elements = { 10.0.0.1 }; }; chain c { drop; }; }'"
    )
    container.sh("nft 'table ip moorage { chain c { drop; }; }'")
    before = container.sh("nft list table inet other; nft list table ip moorage")
    container.do(policy.restore, [endpoint(1)], AROUND)
    container.do(policy.set_surroundings, Surroundings(pools=POOLS))
    container.do(policy.revoke, [endpoint(1).host_ifname])
    assert container.sh("nft list table inet other; nft list table ip moorage") == before


def flushed(container: Room) -> None:
    container.sh("nft flush ruleset")


def rebuilt_from_a_file(container: Room) -> None:
    container.sh('saved=$(nft list ruleset); nft flush ruleset; echo "$saved" | nft -f -')


def without_a_rule(container: Room) -> None:
    container.sh("nft flush chain inet moorage sources")


def with_another_rule(container: Room) -> None:
    container.sh("nft insert rule inet moorage arriving accept")


def with_another_policy(container: Room) -> None:
    container.sh("nft 'add chain inet moorage forward { policy drop; }'")


@pytest.mark.parametrize(
    "damage", [flushed, rebuilt_from_a_file, without_a_rule, with_another_rule, with_another_policy]
)
def test_damage_by_others_is_noticed_and_restored(
    container: Room, policy: Policy, damage: Callable[[Room], None]
) -> None:
    assert not container.do(policy.is_intact), "before the first restore"
    container.do(policy.restore, [endpoint(1)], AROUND)
    container.do(policy.set_hosts, Hosts(nodes=frozenset([ip_address("192.0.2.9")])))
    container.do(policy.set_others, [(ip_address("10.0.9.9"), ("web", "db"))])
    golden = container.sh("nft list table inet moorage")
    assert container.do(policy.is_intact)
    damage(container)
    assert not container.do(policy.is_intact)
    container.do(policy.restore, [endpoint(1)], AROUND)
    assert container.do(policy.is_intact)
    assert container.do(wrong_sets, policy) == {}
    assert container.sh("nft list table inet moorage") == golden


def test_damage_is_not_taken_for_a_change_of_our_own(container: Room, policy: Policy) -> None:
    """The first endpoint of its kind changes the rules; whoever changed them before that is noticed all the same."""
    container.do(policy.restore, [endpoint(1)], AROUND)
    with_another_rule(container)
    with pytest.raises(KernelRefused, match="changed by somebody") as refused:
        container.do(policy.admit, endpoint(2, "db"))
    assert refused.value.errno == errno.ENOENT
    assert not container.do(policy.is_intact)


@pytest.mark.parametrize(
    "tampering",
    [
        "flush set inet moorage senders4",
        "flush set inet moorage endpoints6",
        "flush map inet moorage receivers4",
        "flush set inet moorage pools4",
        "flush map inet moorage ports4",
        "flush set inet moorage nodes4",
        "add element inet moorage public4 { 10.0.0.77 }",
        'add element inet moorage receivers4 { "mrgx" . 10.0.0.77 : accept }',
        "add element inet moorage open6 { fd00::/65 }",
    ],
)
def test_sets_that_somebody_tampered_with_are_named(container: Room, policy: Policy, tampering: str) -> None:
    mapping = PortMapping("tcp", 8080, 80)
    container.do(policy.restore, [replace(endpoint(1), ports=(mapping,))], AROUND)
    container.do(policy.set_hosts, Hosts(nodes=frozenset([ip_address("192.0.2.9")])))
    assert container.do(wrong_sets, policy) == {}
    container.sh(f"nft '{tampering}'")
    assert container.do(policy.is_intact)
    assert container.do(wrong_sets, policy).keys() == {tampering.split()[4]}


def test_only_connections_to_own_endpoints_that_may_not_begin_now_are_forbidden(
    container: Room, policy: Policy
) -> None:
    world, other, node = (ip_address(ip) for ip in ("192.0.2.2", "10.0.9.9", "192.0.2.9"))
    one, public = endpoint(1), endpoint(2, "public")
    container.do(policy.restore, [replace(one, isolation=Isolation(nodes=True)), public], AROUND)
    container.do(policy.set_others, [(other, ("web",))])
    container.do(policy.set_hosts, Hosts(nodes=frozenset([node])))
    own, open_one = one.ips[0], public.ips[0]

    def forbidden() -> set[tuple[str, str]]:
        pairs = [
            (world, own),
            (other, own),
            (node, own),
            (world, open_one),
            (own, world),
            (own, other),
            (own, open_one),
        ]
        nothing = Request(0, 0, b"", "")
        found = container.do(
            policy.forbidden, [Connection(*pair, socket.IPPROTO_TCP, nothing) for pair in pairs]
        )
        return {(str(connection.source), str(connection.target)) for connection in found}

    assert forbidden() == {(str(world), str(own))}
    container.do(policy.set_others, [(other, ("db",))])
    assert forbidden() == {(str(caller), str(own)) for caller in (world, other)}
    around = replace(AROUND, isolation={"web": Isolation()})
    assert container.do(policy.set_surroundings, around) == list(one.ips), (
        "whose network says something else now"
    )
    assert forbidden() == {(str(caller), str(own)) for caller in (world, other, node)}
    container.do(policy.admit, replace(public, netgroups=("db",)))
    assert forbidden() == {
        *((str(caller), str(own)) for caller in (world, other, node)),
        *((str(caller), str(open_one)) for caller in (world, own)),
    }


@pytest.mark.parametrize("emptied", ["map inet moorage receivers4", "set inet moorage endpoints6"])
def test_who_is_missing_in_part_is_revoked_in_whole(container: Room, policy: Policy, emptied: str) -> None:
    container.do(policy.restore, [endpoint(1), endpoint(2)], AROUND)
    container.sh(f"nft flush {emptied}")
    container.do(policy.revoke, [endpoint(1).host_ifname])
    assert "mrg000000000001" not in container.sh("nft list table inet moorage")
    assert not container.do(policy.is_intact), "to be restored"


def test_changes_that_are_no_damage_are_not_taken_for_it(container: Room, policy: Policy) -> None:
    container.do(policy.restore, [], AROUND)
    container.sh("nft add table inet other")
    container.do(policy.admit, endpoint(1))
    container.do(policy.admit, endpoint(2))
    container.do(policy.admit, endpoint(3, "db"))
    container.do(policy.set_surroundings, Surroundings(pools=POOLS))
    container.do(policy.revoke, [endpoint(3).host_ifname])
    for _ in range(2):
        assert container.do(policy.is_intact)
        assert container.do(wrong_sets, policy) == {}


def test_a_table_that_is_gone_says_so(container: Room, policy: Policy) -> None:
    container.do(policy.restore, [endpoint(1)], AROUND)
    flushed(container)
    assert container.do(policy.elements) == set()
    with pytest.raises(KernelRefused, match="admit mrg0") as refused:
        container.do(policy.admit, endpoint(2))
    assert refused.value.errno == errno.ENOENT
    container.do(policy.restore, [endpoint(1)], AROUND)
    assert container.do(policy.elements) == pairs(endpoint(1)), "what was refused is not in the book"


def test_an_agent_that_knows_less_keeps_what_the_table_knows(container: Room, policy: Policy) -> None:
    container.do(policy.restore, [endpoint(1), endpoint(2, "db")], AROUND)
    container.do(
        policy.set_others, [(ip_address("10.0.9.9"), ("web",)), (ip_address("10.0.9.8"), ("public",))]
    )
    container.do(policy.set_hosts, Hosts(nodes=frozenset([ip_address("192.0.2.9")])))
    before = container.sh("nft list table inet moorage")
    successor = container.do(Policy)
    container.do(partial(successor.restore, [endpoint(1), endpoint(2, "db")], AROUND, keep_others=True))
    assert container.sh("nft list table inet moorage") == before
    container.do(successor.replace_others, {ip_address("10.0.9.9"): ("web",)})
    assert "10.0.9.8" not in container.sh("nft list table inet moorage")

    container.do(partial(successor.restore, [endpoint(1)], AROUND, keep_endpoints=True))
    assert container.do(successor.elements) == pairs(endpoint(1), endpoint(2))
    container.do(successor.restore, [endpoint(1)], AROUND)
    assert container.do(successor.elements) == pairs(endpoint(1))


def test_a_change_is_as_short_with_thousands_as_with_ten() -> None:
    """What it takes is measured by ``python -m benchmarks --only policy``."""

    def commands(endpoints: int) -> list[str]:
        book = Book()
        for number in range(endpoints):
            book.admit(endpoint(number))
            book.set_others([(ip + 30_000, ("web",)) for ip in endpoint(number).ips])
        one = endpoint(60_000)
        away = one.ips[0] + 1
        changes = (book.admit(one), book.set_others([(away, ("web",))]), book.set_others([(away, ())]))
        return [ruleset.change(change) for change in (*changes, book.revoke([one.host_ifname]))]

    assert commands(10) == commands(3000)


def test_all_elements_are_listed_with_thousands(container: Room, policy: Policy) -> None:
    everyone = [endpoint(n) for n in range(3000)]
    container.do(policy.restore, everyone, AROUND)
    assert container.do(policy.elements) == pairs(*everyone)
    assert container.do(wrong_sets, policy) == {}


@pytest.mark.parametrize("how", ["restored", "adopted"])
def test_who_may_use_the_tunnel_is_taken_over_by_the_next_agent(container: Room, how: str) -> None:
    """Adopted: journal and store are away, so that the table is left as it is."""
    known = Hosts(
        nodes=frozenset({ip_address("192.0.2.1"), ip_address("192.0.2.2")}),
        underlays=frozenset({ip_address("192.0.2.1"), ip_address("2001:db8::2")}),
        here=frozenset({ip_address("192.0.2.1")}),
        tunnels=frozenset({4789, 8472}),
        tunnel=8472,
        stores=frozenset({(ip_address("192.0.2.2"), 2379)}),
    )
    before = container.do(Policy)
    container.do(before.restore, [], Surroundings())
    container.do(before.set_hosts, known)
    container.do(before.close)
    policy = container.do(Policy)
    if how == "restored":
        container.do(policy.restore, [], Surroundings())
    else:
        container.do(policy.adopt)
    assert policy.hosts == known
    container.do(policy.restore, [], Surroundings())
    assert policy.hosts == known
    assert "2001:db8::2" in container.sh("nft list set inet moorage underlays6")
    container.do(policy.close)


def test_what_is_taken_while_the_table_is_restored_is_noticed(
    container: Room, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever goes from chain to chain does not stop for a restore."""
    read, taken = kernel.fingerprints, []

    def late(netfilter: NetlinkSocket) -> dict[str, bytes] | None:
        if not taken:
            taken.append("sources")
            sh("nft flush chain inet moorage sources")  # on the room's own thread already
        return read(netfilter)

    monkeypatch.setattr(kernel, "fingerprints", late)
    container.do(policy.restore, [endpoint(1)], AROUND)
    monkeypatch.undo()
    assert taken
    if not container.do(policy.is_intact):
        container.do(policy.restore, [endpoint(1)], AROUND)
    assert "drop" in container.sh("nft list chain inet moorage sources")
    assert container.do(policy.is_intact)


def test_a_table_with_one_endpoint_that_the_kernel_refuses_is_restored_without_it_at_once(
    machine: Machine,
) -> None:
    """Two that have the same port of the node, as after a DEL that the journal could not be told of."""
    port = PortMapping("tcp", 31080, 80)
    several = [endpoint(number) for number in range(1, 8)]
    several[2] = replace(several[2], ports=(port,))
    several[5] = replace(several[5], ports=(port,))
    refused = machine.do(machine.policy.restore, several, AROUND)
    assert list(refused) == [several[5].host_ifname]
    assert (
        "File exists" in refused[several[5].host_ifname] or "conflicting" in refused[several[5].host_ifname]
    )
    admitted = {name for name, _ in machine.do(machine.policy.elements)}
    assert admitted == {one.host_ifname for one in several} - {several[5].host_ifname}
    assert machine.do(lambda: wrong_sets(machine.policy)) == {}
    assert machine.do(machine.policy.restore, several[3:], AROUND) == {}
