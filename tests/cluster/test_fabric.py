"""Containers reach each other by their own IPs wherever they run, through VXLAN and by routes, in both families."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolator.fabric.fabric import RESYNC_SELDOM
from moorage.lab import Lab, LabNode
from tests.cluster.guests import (
    DEVICE,
    NETWORKS,
    Guest,
    all_answer,
    between,
    echo,
    fabric_is_well,
    fabric_of,
    from_nodes,
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

MTUS = {"vx": 1450, "hg": 1500}
COMPARED_WITHIN = RESYNC_SELDOM + 20
"""Seconds until kernel and plan were compared, on a machine under any load; without, it is 5."""

STREAM = 8
"""Seconds of traffic in which an agent is started anew."""


def test_every_container_reaches_every_other_on_each_of_its_two_networks(guests: list[Guest]) -> None:
    all_answer(between(guests))


def test_what_is_not_bound_reaches_the_members_of_both_networks_on_every_node(guests: list[Guest]) -> None:
    all_answer((namespace, ip, "") for namespace, ip, _ in between(guests))


def test_a_process_of_any_node_reaches_every_container(lab: Lab, guests: list[Guest]) -> None:
    all_answer(from_nodes(lab.nodes, guests))


def test_nothing_of_it_is_a_finding_or_a_problem(lab: Lab, guests: list[Guest]) -> None:
    eventually(lambda: fabric_is_well(lab))
    report = lab.nodes[0].ask("ip", "check")
    assert (report["findings"], report["nodes_asked"], report["nodes_silent"]) == ([], 3, [])
    shown = lab.nodes[0].ask("node", "show", "n2")
    counts: Counter[str] = Counter()
    for row in shown["addresses"]:
        counts[row["state"]] += row["count"]
    assert (counts["assigned"], counts["own"]) == (4, 2)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_full_packet_passes_whole_and_one_byte_more_is_answered_with_the_mtu(
    guests: list[Guest], network: str, family: int
) -> None:
    one, _, other = guests
    mtu, ifname = MTUS[network], {"vx": "eth0", "hg": "eth1"}[network]
    assert f"mtu {mtu} " in one.namespace.run("ip", "-o", "link", "show", ifname).stdout
    all_answer(between([one, other], [network]))
    # Right before each: the agent puts the MTU back.
    larger_mtu = ("ip", "link", "set", ifname, "mtu", "9000")
    try:
        before = fragments(one.node)
        one.namespace.run(*larger_mtu)
        full = echo(one, other, network, family, mtu)
        assert ", 1 received" in full, full
        assert fragments(one.node) == before
        one.namespace.run(*larger_mtu)
        larger = echo(one, other, network, family, mtu + 1)
        assert ", 0 received" in larger
        said = {4: rf"Frag needed and DF set \(mtu = {mtu}\)", 6: rf"Packet too big: mtu={mtu}"}[family]
        assert re.search(said, larger), larger
    finally:
        one.namespace.run("ip", "link", "set", ifname, "mtu", str(mtu))
        one.namespace.run("ip", f"-{family}", "route", "flush", "cache")


def fragments(node: LabNode) -> int:
    """How many fragments a node's kernel has made."""
    names, values = re.findall(r"Ip: (.*)", node.namespace.run("cat", "/proc/net/snmp").stdout)
    six = re.search(r"Ip6FragCreates\s+(\d+)", node.namespace.run("cat", "/proc/net/snmp6").stdout)
    assert six is not None
    return int(dict(zip(names.split(), values.split(), strict=True))["FragCreates"]) + int(six[1])


def test_an_agent_that_ends_or_is_killed_and_is_started_anew_disturbs_no_traffic(
    guests: list[Guest],
) -> None:
    one, other, _ = guests
    before = fabric_of(one.node)
    with (
        tempfile.TemporaryFile("w+") as heard,
        streaming(one, other, "vx") as vxlan,
        streaming(one, other, "hg") as hostgw,
    ):
        watching = one.node.namespace.start("ip", "monitor", "link", "address", "route", stdout=heard)
        try:
            assert one.node.stop() == 0
            one.node.start()
            one.node.kill()
            one.node.start()
            for stream in (vxlan, hostgw):
                verify_unbroken(stream)
        finally:
            watching.kill()
            watching.wait()
        heard.seek(0)
        lines = heard.read().splitlines()
    assert [line for line in lines if DEVICE in line or "metric 2048" in line] == []
    assert fabric_of(one.node) == before


@contextlib.contextmanager
def streaming(one: Guest, other: Guest, network: str) -> Iterator[subprocess.Popen[bytes]]:
    """A TCP connection with data from one to the other for STREAM seconds; the client, which reports."""
    ip, port = other.ips[network, 4], "5201"
    server = other.namespace.start("iperf3", "-s", "-1", "-B", ip, "-p", port, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: ip in other.namespace.run("ss", "-Hltn", "sport", "=", f":{port}").stdout)
        client = one.namespace.start(
            "iperf3", "-c", ip, "-B", one.ips[network, 4], "-p", port,
            "-t", str(STREAM), "-b", "20M", "-i", "4", "-J",
            stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            yield client
        finally:
            client.kill()
            client.communicate()
    finally:
        server.kill()
        server.wait()


def verify_unbroken(client: subprocess.Popen[bytes]) -> None:
    """One connection from beginning to end, and at no time nothing arrived."""
    stdout, _ = client.communicate(timeout=2 * PATIENCE)
    report = json.loads(stdout)
    assert client.returncode == 0, report.get("error")
    assert "error" not in report
    assert len(report["start"]["connected"]) == 1
    assert all(interval["sum"]["bytes"] > 0 for interval in report["intervals"])


TAMPERING = {
    "the device is deleted": f"ip link delete {DEVICE}",
    "it is taken down": f"ip link set {DEVICE} down",
    "it is given another MAC, MTU and address, and loses its own": (
        f"ip link set {DEVICE} address 02:00:00:00:00:99; ip link set {DEVICE} mtu 1280; "
        f"ip address flush dev {DEVICE} scope global; ip address add 203.0.113.9/24 dev {DEVICE}"
    ),
    "routes are deleted, and a strange one is added": (
        "ip -4 route flush proto 157 metric 2048; ip -6 route flush proto 157 metric 2048; "
        f"ip route add 10.64.15.0/26 dev {DEVICE} proto 157 metric 2048"
    ),
    "tunnels and neighbours are deleted, and strange ones are added": (
        f"ip -6 neigh flush dev {DEVICE} nud permanent; "
        f"bridge fdb show dev {DEVICE} | while read mac rest; do bridge fdb del $mac dev {DEVICE}; done; "
        f"bridge fdb append 02:00:00:00:00:77 dev {DEVICE} dst 198.18.0.77; "
        f"bridge fdb append 00:00:00:00:00:00 dev {DEVICE} dst 198.18.0.78; "
        f"ip neigh add fe80::77 lladdr 02:00:00:00:00:77 dev {DEVICE} nud permanent"
    ),
    "another kind of link has its name": f"ip link delete {DEVICE}; ip link add {DEVICE} type bridge",
}


@pytest.mark.parametrize("what", TAMPERING)
def test_what_somebody_does_to_it_is_undone(guests: list[Guest], what: str) -> None:
    one = guests[0]
    before = fabric_of(one.node)
    one.node.namespace.run("sh", "-ec", TAMPERING[what])  # it may be mended before anybody could look
    eventually(lambda: fabric_of(one.node) == before, within=COMPARED_WITHIN)
    assert unanswered(between(guests[:2])) == []


def test_log_says_no_bug(lab: Lab, guests: list[Guest]) -> None:
    for node in lab.nodes:
        text = Path(node.log).read_text()
        assert "on a bug" not in text
        assert "Traceback" not in text
