"""What changes in a cluster is in every node's kernel within moments: nodes, addresses, networks, the underlay."""

from __future__ import annotations

import contextlib
import re
from ipaddress import ip_address

import pytest

from ipam.membership import LEASE
from isolator.fabric import mac_of
from isolator.fabric.plan import next_hop
from moorage.lab import Lab, LabNode
from moorage.lab.node import MOORAGE
from tests.cluster.guests import (
    DEVICE,
    FAMILIES,
    NETWORKS,
    Guest,
    all_answer,
    between,
    fabric_is_well,
    fabric_of,
    from_nodes,
    guest,
    routes_of,
    took,
    unanswered,
)
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]


def test_static_addresses_of_other_nodes_blocks_are_reached_from_everywhere(
    lab: Lab, guests: list[Guest]
) -> None:
    for network in NETWORKS:
        # The container of the third node has addresses of the first one's block.
        ips = [neighbour(guests[0].ips[network, family]) for family in (4, 6)]
        with lab.nodes[2].container() as container:
            answer = container.add(network, labels={"moorage.ip": ips[0], "moorage.ip6": ips[1]})
            assert list(answer.ips.values()) == ips, answer
            away = Guest(lab.nodes[2], container, {(network, f): ip for f, ip in answer.ips.items()})
            all_answer(between([away, guests[1]], [network]) + from_nodes(lab.nodes, [away]))
            container.delete(network)


def neighbour(ip: str, bit: int = 0x20) -> str:
    """An address of the same block that nobody has."""
    packed = ip_address(ip).packed
    return str(ip_address(packed[:-1] + bytes([packed[-1] ^ bit])))


def test_borrowed_addresses_are_reached_from_everywhere(lab: Lab) -> None:
    # One block for all: whoever comes second borrows of it.
    lab.nodes[0].cli(
        "network", "create", "small",
        "--pool", "10.66.0.0/28", "--block-size", "28", "--pool", "fd66::/124", "--warm", "1",
        "--allow-from", "nodes",
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        everyone = [stack.enter_context(guest(node, "small")) for node in lab.nodes]
        blocks = [row for row in lab.nodes[0].ask("block", "list") if row["pool"].startswith("small")]
        assert len({row["node"] for row in blocks}) < 3, blocks
        all_answer(between(everyone, ["small"]) + from_nodes(lab.nodes, everyone))
    lab.nodes[0].cli("network", "set", "small", "--fabric", "none")


SMALL = {"bv": ("vxlan", "10.70.0.0/27", "fd70::/121"), "bh": ("hostgw", "10.71.0.0/27", "fd71::/121")}
"""Networks of two blocks: fabric, and a pool of each family."""

PINGS = 10


@pytest.mark.parametrize("network", SMALL)
def test_what_is_sent_to_a_borrowed_address_without_a_container_ends_at_the_node_that_holds_it(
    lab: Lab, network: str, tell: list[str]
) -> None:
    owner, holder, third = lab.nodes
    fabric, *pools = SMALL[network]
    owner.cli(
        "network", "create", network, "--pool", pools[0], "--block-size", "28", "--pool", pools[1],
        "--fabric", fabric, "--allow-static", "all", "--warm", "1",
    )  # fmt: skip
    with guest(owner, network) as there, guest(third, network) as caller, holder.container() as container:
        ips = {family: neighbour(there.ips[network, family], 8) for family in FAMILIES}
        answer = container.add(network, labels={"moorage.ip": ips[4], "moorage.ip6": ips[6]})
        assert answer.ips == ips, answer
        eventually(lambda: all(f"{ip} via " in routes_of(owner) for ip in ips.values()))
        container.delete(network)
        for family, ip in ips.items():
            before = sum(map(forwarded, lab.nodes))
            caller.namespace.run(
                "ping", "-n", "-q", "-c", str(PINGS), "-i", "0.02", "-W", "0.3", ip, check=False
            )
            packets = sum(map(forwarded, lab.nodes)) - before
            assert f"{ip} via " in routes_of(owner), "it is the holder's no more: this took too long"
            tell.append(f"IPv{family}: {packets} packets forwarded for {PINGS} pings")
            assert packets < 6 * PINGS, "they go round"
    owner.cli("network", "set", network, "--fabric", "none")


def forwarded(node: LabNode) -> int:
    """Packets that the node's kernel forwarded."""
    names, values = re.findall(r"Ip: (.*)", node.namespace.run("cat", "/proc/net/snmp").stdout)
    six = re.search(r"Ip6OutForwDatagrams\s+(\d+)", node.namespace.run("cat", "/proc/net/snmp6").stdout)
    assert six is not None
    return int(dict(zip(names.split(), values.split(), strict=True))["ForwDatagrams"]) + int(six[1])


def test_a_gateway_reaches_every_container_and_refuses_to_start_one(lab: Lab, guests: list[Guest]) -> None:
    gateway = LabNode(
        "gw", agent=(*MOORAGE, "agent", "--gateway"), store=lab.etcd.url, switch=lab.switch, host=100
    )
    with gateway:
        gateway.start()
        all_answer(from_nodes([gateway], guests))
        with gateway.container() as container:
            answer = container.add("vx")
            assert answer.exit != 0
            assert "is a gateway" in answer.json["msg"]
        assert gateway.stop() == 0
        lab.nodes[0].cli("node", "remove", "gw")
    eventually(lambda: "gw" not in {row["name"] for row in lab.nodes[0].ask("node", "list")})


def test_an_address_away_from_its_block_is_in_every_kernel_within_moments(
    lab: Lab, guests: list[Guest], tell: list[str]
) -> None:
    for network in NETWORKS:
        ip = neighbour(guests[1].ips[network, 4], 0x10)
        with lab.nodes[0].container() as container:
            assert container.add(network, labels={"moorage.ip": ip}).exit == 0
            seconds = max(took(lambda node=node, ip=ip: ip in routes_of(node)) for node in lab.nodes[1:])
            tell.append(f"{network}: {seconds * 1000:.0f} ms after its ADD")
            container.delete(network)


def test_a_node_joins_leaves_and_is_forgotten(lab: Lab, guests: list[Guest], tell: list[str]) -> None:
    with LabNode("late", store=lab.etcd.url, switch=lab.switch, host=110) as late:
        late.start()
        with guest(late) as new:
            tell.append(
                f"reached {took(lambda: unanswered(between([new, guests[0]]), 1) == []):.1f} s after its first ADD"
            )
            all_answer(between([new, *guests]) + from_nodes([late, *lab.nodes], [new, *guests]))
            late.kill()
            eventually(lambda: not is_alive("late", asked=lab.nodes[0]), within=LEASE + PATIENCE)
            # Nobody knows whether its containers are: the way to them stays.
            assert unanswered(between([new, guests[0]]) + from_nodes(lab.nodes, [new])) == []
            hops = {"via 198.18.0.110 ", str(next_hop(mac_of("late")))}
            assert all(hop in routes_of(node) for node in lab.nodes for hop in hops)
            lab.nodes[0].cli("node", "remove", "late", "--force", "--yes", "late")
            seconds = took(lambda: not any(hop in routes_of(n) for n in lab.nodes for hop in hops))
            tell.append(f"forgotten {seconds * 1000:.0f} ms after it was removed")
            assert not any("198.18.0.110" in line for node in lab.nodes for line in fabric_of(node))
            # It was not dead after all. What its container uses is free, and so it has it again.
            late.start()
            all_answer(between([new, *guests]) + from_nodes([late, *lab.nodes], [new, *guests]))
        # The next time in order.
        eventually(lambda: late.ask("endpoint", "list") == [])
        late.cli("node", "drain", "late")
        assert late.stop() == 0
        lab.nodes[0].cli("node", "remove", "late")
        eventually(lambda: not any("198.18.0.110" in line for node in lab.nodes for line in fabric_of(node)))


def is_alive(name: str, *, asked: LabNode) -> bool:
    return any(row["name"] == name and row["alive"] for row in asked.ask("node", "list"))


def test_a_networks_fabric_is_switched_while_it_is_used(lab: Lab) -> None:
    lab.nodes[0].cli(
        "network", "create", "sw", "--pool", "10.67.0.0/20", "--pool", "fd67::/112", "--allow-from", "nodes"
    )
    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(guest(node, "sw")) for node in lab.nodes[:2]]
        for fabric in ("vxlan", "hostgw", "vxlan", "none"):
            lab.nodes[0].cli("network", "set", "sw", "--fabric", fabric)
            if fabric == "none":
                eventually(lambda: "10.67." not in routes_of(pair[0].node) + routes_of(pair[1].node))
                assert len(unanswered(between(pair, ["sw"]), wait=1)) == 4
            else:
                all_answer(between(pair, ["sw"]) + from_nodes(lab.nodes[:2], pair))
                device = DEVICE if fabric == "vxlan" else "up0"
                lines = [
                    line for line in routes_of(pair[0].node).splitlines() if "67" in line.split(" ")[0][:5]
                ]
                assert all(f"dev {device}" in line for line in lines if "blackhole" not in line), lines


def test_nodes_own_addresses_move_out_of_a_pool_that_is_disabled_and_let_a_network_go(lab: Lab) -> None:
    first = lab.nodes[0]
    first.cli("network", "create", "also", "--pool", "10.68.0.0/20", "--fabric", "vxlan")
    eventually(lambda: fabric_is_well(lab))
    try:
        first.cli("network", "set", "vx", "--disable-pool", "10.64.0.0/20")
        eventually(lambda: all(own(node)[4].startswith("10.68.") for node in lab.nodes))
        first.cli("network", "set", "vx", "--enable-pool", "10.64.0.0/20")
        refused = first.cli("network", "delete", "also", check=False)
        assert refused.returncode == 0, refused.stderr
        eventually(lambda: all(own(node).get(4, "").startswith("10.64.") for node in lab.nodes))
    finally:
        first.cli("network", "set", "vx", "--enable-pool", "10.64.0.0/20")


def own(node: LabNode) -> dict[int, str]:
    """The addresses that a node's device has, by family, if its kernel and the store agree on them."""
    ips = node.ask("status")["fabric"]["addresses"]
    shown = "\n".join(fabric_of(node))
    kept = {
        row["address"] for row in node.ask("ip", "list", "--state", "assigned") if row["node"] == node.name
    }
    return {6 if ":" in ip else 4: ip for ip in ips if f" {ip}/" in shown and ip in kept}


def test_a_node_changes_its_underlay_address(lab: Lab, guests: list[Guest], tell: list[str]) -> None:
    node, others = lab.nodes[2], lab.nodes[:2]
    node.namespace.run(
        "sh", "-ec",
        "ip address del 198.18.0.3/24 dev up0; ip address add 198.18.0.33/24 dev up0; "
        "ip route add default via 198.18.0.254",
    )  # fmt: skip
    seconds = took(
        lambda: all(
            "via 198.18.0.33 " in routes_of(o) and "dst 198.18.0.33 " in "".join(fabric_of(o)) for o in others
        )
    )
    tell.append(f"in the others' kernels after {seconds:.1f} s")
    assert not any("198.18.0.3 " in line for other in others for line in fabric_of(other))
    all_answer(between(guests) + from_nodes(lab.nodes, guests))


def test_the_underlays_mtu_is_followed(lab: Lab, guests: list[Guest]) -> None:
    node = lab.nodes[1]
    node.namespace.run("ip", "link", "set", "up0", "mtu", "1400")
    try:
        eventually(lambda: "mtu 1350" in fabric_of(node))
        with guest(node) as late:
            sizes = late.namespace.run("ip", "-o", "link").stdout
            assert "mtu 1350" in sizes
            assert "mtu 1400" in sizes
    finally:
        node.namespace.run("ip", "link", "set", "up0", "mtu", "1500")
    eventually(lambda: "mtu 1450" in fabric_of(node))


def test_a_node_without_an_address_for_a_moment_keeps_what_it_has(lab: Lab, guests: list[Guest]) -> None:
    node = lab.nodes[1]
    before = fabric_of(node)
    node.namespace.run("ip", "route", "delete", "default")
    try:
        eventually(lambda: "what it was is kept" in node.log.read_text())
        assert fabric_of(node) == before
        assert unanswered(between(guests)) == []
    finally:
        node.namespace.run("ip", "route", "add", "default", "via", "198.18.0.254")
