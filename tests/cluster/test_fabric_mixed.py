"""A node whose underlay has both families reaches one that has only IPv4 and one that has only IPv6.

n1  198.18.0.1, fd98::1      n2  198.18.0.2      n3  fd98::3, and IPv4 for the store alone, on another interface
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from isolator.fabric.plan import SECOND_DEVICE
from moorage.lab import Lab
from moorage.lab.switch import UPLINK
from tests.cluster.guests import (
    DEVICE,
    FAMILIES,
    Guest,
    all_answer,
    between,
    create_networks,
    echo,
    guest,
    routes_of,
    unanswered,
)
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

SECOND = SECOND_DEVICE[6]


@pytest.fixture(scope="module")
def mixed() -> Iterator[Lab]:
    with Lab(nodes=3, etcd=1) as lab:
        lab.nodes[1].namespace.run("ip", "-6", "address", "flush", "dev", UPLINK, "scope", "global")
        lab.nodes[2].namespace.run(
            "sh", "-ec",
            f"ip -4 address flush dev {UPLINK}; ip link add st0 link {UPLINK} type macvlan mode bridge; "
            "ip link set st0 up; ip address add 198.18.0.3/24 dev st0",
        )  # fmt: skip
        for node in lab.nodes:
            node.launch(MOORAGE_UNDERLAY=UPLINK)
        for node in lab.nodes:
            node.wait_ready()
        create_networks(lab.nodes[0])
        yield lab


@pytest.fixture(scope="module")
def guests(mixed: Lab) -> Iterator[list[Guest]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(guest(node)) for node in mixed.nodes]


def test_it_reaches_both_in_every_way_and_both_reach_it(mixed: Lab, guests: list[Guest]) -> None:
    both, four, six = guests
    pings = between([both, four]) + between([both, six])
    # With hostgw a process of a node calls from the underlay, whose families are what they are.
    for one, other in ((both, four), (four, both), (both, six), (six, both)):
        pings += [(one.node.namespace, other.ips["vx", family], "") for family in FAMILIES]
    all_answer(pings)
    assert mixed.nodes[0].ask("ip", "check")["findings"] == []


def test_it_alone_has_a_second_device_and_says_so(mixed: Lab, guests: list[Guest]) -> None:
    said = [node.ask("status")["fabric"] for node in mixed.nodes]
    assert [list(fabric["devices"]) for fabric in said] == [[DEVICE, SECOND], [DEVICE], [DEVICE]]
    assert said[0]["problems"] == []
    assert said[0]["devices"][SECOND]["local"] == "fd98::1"
    assert [fabric["devices"][DEVICE]["local"] for fabric in said] == ["198.18.0.1", "198.18.0.2", "fd98::3"]
    assert not any(fabric["tunnel"]["open"] for fabric in said)


def test_the_two_that_have_no_family_in_common_are_named_and_reach_each_other_without_a_tunnel(
    mixed: Lab, guests: list[Guest]
) -> None:
    _, four, six = guests
    all_answer(between([four, six], ["hg"]))
    assert len(unanswered(between([four, six], ["vx"]), wait=1)) == 4
    for one, has, others in ((four, "IPv4", "IPv6"), (six, "IPv6", "IPv4")):
        problems = "\n".join(one.node.ask("status")["fabric"]["problems"])
        assert f"the underlay of this node has {has}, and that node's {others}" in problems
        assert "node n1" not in problems


@pytest.mark.parametrize("family", [4, 6])
def test_what_is_too_large_for_the_second_device_is_answered_with_its_mtu(
    guests: list[Guest], family: int
) -> None:
    both, _, six = guests
    for guest_, mtu in ((both, 1450), (six, 1430)):
        assert f"mtu {mtu} " in guest_.namespace.run("ip", "-o", "link", "show", "eth0").stdout
    try:
        assert ", 1 received" in echo(both, six, "vx", family, 1430)
        said = {4: r"Frag needed and DF set \(mtu = 1430\)", 6: r"Packet too big: mtu=1430"}[family]
        assert re.search(said, echo(both, six, "vx", family, 1431))
    finally:
        both.namespace.run("ip", f"-{family}", "route", "flush", "cache")


def test_a_trace_names_the_device_that_a_packet_takes(guests: list[Guest]) -> None:
    both, four, six = guests
    for other, device in ((four, DEVICE), (six, SECOND)):
        for one, to in ((both, other), (other, both)):
            shown = both.node.cli("endpoint", "trace", one.ips["vx", 4], to.ips["vx", 4], check=False)
            assert shown.returncode == 0, shown.stdout
            assert f"{device} {'leads' if one is both else 'takes'}" in shown.stdout, shown.stdout


def test_the_second_device_comes_back_and_goes_with_the_last_node_that_needs_it(
    mixed: Lab, guests: list[Guest]
) -> None:
    both, _, six = guests
    before = routes_of(both.node)
    both.node.namespace.run("ip", "link", "delete", SECOND)
    eventually(lambda: routes_of(both.node) == before)
    all_answer(between([both, six]))
    six.node.namespace.run("ip", "address", "add", "198.18.0.33/24", "dev", UPLINK)
    eventually(lambda: SECOND not in both.node.namespace.run("ip", "link").stdout)
    all_answer(between(guests))
    assert [list(node.ask("status")["fabric"]["devices"]) for node in mixed.nodes[:2]] == [[DEVICE]] * 2
