"""Containers on several networks of one node, through the real hooks: what they send without choosing an address comes
from the one that the called network knows them by, whatever else they have."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from ipam.networks import PoolSpec, create_network
from ipam.records import Network
from ipam.store import open_store
from isolator.drivers.naming import route_metric
from moorage.lab import Container, LabNode, Namespace
from moorage.lab.modules import ModulesContainer
from netmodules.cni.config import SUPPORTED_VERSIONS
from tests import journals
from tests.system.conftest import eventually

pytestmark = [pytest.mark.kernel, pytest.mark.xdist_group("several-networks")]

NETWORKS = {"web": 64, "db": 65, "logs": 66, "cache": 67, "mail": 68, "auth": 69, "jobs": 70, "test": 71}
"""Name -> what its pools have in common: 10.N.0.0/16 and fdN::/64."""


@pytest.fixture(scope="module")
def node() -> Iterator[LabNode]:
    """A node whose agent serves all of them; their next hops have the numbers 1 to 8."""
    with LabNode("node") as node:
        node.start()
        asyncio.run(_create(node.store))
        yield node


async def _create(url: str) -> None:
    store = await open_store(url)
    try:
        for name, number in NETWORKS.items():
            pools = [PoolSpec(f"10.{number}.0.0/16"), PoolSpec(f"fd{number}::/64")]
            await create_network(store, Network(name=name, pools=[]), pools)
    finally:
        await store.close()


def join(container: Container, networks: Sequence[str]) -> dict[str, dict[int, str]]:
    """Addresses by network; interfaces are eth0, eth1, ... in that order."""
    found = {}
    for i, network in enumerate(networks):
        answer = container.add(network, f"eth{i}")
        assert answer.exit == 0, answer.stdout
        found[network] = answer.ips
    return found


def check(container: Container, network: str, ifname: str, ips: dict[int, str]) -> str:
    """What CHECK says of an interface; "" if all is well."""
    previous = {"ips": [{"address": f"{ip}/{32 if family == 4 else 128}"} for family, ip in ips.items()]}
    config = {**container.config(network), "cniVersion": "1.0.0", "prevResult": previous}
    answer = container.call("CHECK", config, ifname)
    return str(answer.json["msg"]) if answer.exit else ""


def way_to(namespace: Namespace, ip: str) -> tuple[str, str]:
    """(interface, source) that the kernel takes for an unbound socket."""
    (route,) = json.loads(namespace.run("ip", "-j", "route", "get", ip).stdout)
    return route["dev"], route["prefsrc"]


def ways(namespace: Namespace, own: dict[str, dict[int, str]], networks: Sequence[str]) -> dict[str, str]:
    """Each of the networks that is not reached by its own interface and address, and what by instead."""
    wrong = {}
    for i, network in enumerate(networks):
        for family, ip in ((4, f"10.{NETWORKS[network]}.255.9"), (6, f"fd{NETWORKS[network]}::ffff:9")):
            found = way_to(namespace, ip)
            if network in own and found != (f"eth{i}", own[network][family]):
                wrong[ip] = str(found)
    return wrong


@contextmanager
def members(node: LabNode, networks: Sequence[str]) -> Iterator[dict[str, tuple[Container, dict[int, str]]]]:
    """A container on each of the networks alone, with its addresses."""
    with ExitStack() as stack:
        found = {}
        for network in networks:
            container = stack.enter_context(node.container())
            found[network] = (container, container.add(network).ips)
        yield found


@pytest.mark.parametrize("count", [2, 3, 8])
def test_members_of_every_network_of_its_own_are_reached_whichever_others_leave(
    node: LabNode, count: int
) -> None:
    networks = list(NETWORKS)[:count]
    with node.container() as one, members(node, networks) as there:
        own = join(one, networks)
        order = [networks[count // 2], networks[0], *networks[1:]]
        for leaving in dict.fromkeys(order):
            assert ways(one.namespace, own, networks) == {}
            for network in own:
                for ip in there[network][1].values():
                    assert one.namespace.pings(ip, wait=2), f"{network} {ip}"
            ifname = f"eth{networks.index(leaving)}"
            assert one.delete(leaving, ifname).exit == 0
            del own[leaving]
            eventually(lambda ifname=ifname: ifname not in one.namespace.run("ip", "link").stdout)


SERVE = """
import socket, sys
family = socket.AF_INET6 if sys.argv[1] == "6" else socket.AF_INET
made = socket.socket(family, socket.SOCK_DGRAM)
if sys.argv[1] == "6":
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
made.bind(("", 7000))
print(flush=True)
while True:
    question, caller = made.recvfrom(64)
    made.sendto(question, caller)
"""

ASK = """
import socket, sys
made = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
made.connect((sys.argv[1], 7000))  # hears nothing from any other address
made.settimeout(3)
made.send(b"hello?")
made.recv(64)
"""


@pytest.mark.parametrize("family", [4, 6])
def test_an_unbound_udp_server_answers_each_network_from_the_address_that_was_called(
    node: LabNode, family: int
) -> None:
    with node.container() as server, members(node, ["web", "db"]) as there:
        own = join(server, ["web", "db"])
        command = ("python3", "-c", SERVE, str(family))
        with server.namespace.start(*command, stdout=-1) as serving:
            try:
                assert serving.stdout is not None
                assert serving.stdout.readline()
                for network, (caller, _) in there.items():
                    caller.namespace.run("python3", "-c", ASK, own[network][family])
            finally:
                serving.kill()


def test_results_of_every_version_carry_the_routes_and_each_networks_own_next_hop(node: LabNode) -> None:
    expected = [
        {"dst": "0.0.0.0/0", "gw": "169.254.1.2"},
        {"dst": "::/0", "gw": "fe80::2"},
        {"dst": "10.65.0.0/16", "gw": "169.254.1.2"},
        {"dst": "fd65::/64", "gw": "fe80::2"},
    ]
    for version in (None, *SUPPORTED_VERSIONS):
        with node.container() as one:
            config = {key: value for key, value in one.config("db").items() if key != "args"}
            answer = one.call("ADD", {**config, **({"cniVersion": version} if version else {})}, "eth1")
            assert answer.exit == 0, answer
            given = answer.json
            if "ip4" in given:
                assert given["ip4"]["routes"] == [expected[0], expected[2]]
                assert given["ip6"]["routes"] == [expected[1], expected[3]]
                assert (given["ip4"]["gateway"], given["ip6"]["gateway"]) == ("169.254.1.2", "fe80::2")
            else:
                assert given["routes"] == expected
                assert [ip["gateway"] for ip in given["ips"]] == ["169.254.1.2", "fe80::2"]
            for family, gateway in (("-4", "169.254.1.2"), ("-6", "fe80::2")):
                inside = json.loads(one.namespace.run("ip", "-j", family, "route").stdout)
                assert [route["gateway"] for route in inside] == [gateway] * 2


def routes_to(namespace: Namespace, cidr: str) -> str:
    family = "-6" if ":" in cidr else "-4"
    return namespace.run("ip", family, "route", "show", cidr).stdout.strip()


def test_routes_of_running_containers_follow_the_pools_in_both_families(node: LabNode) -> None:
    added = ("10.170.0.0/16", "fd70:1::/64")
    networks = ["web", "jobs"]
    with node.container() as one, node.container() as other:
        own, elsewhere = join(one, networks), join(other, ["jobs"])
        pools = itertools.chain(*(("--add-pool", cidr) for cidr in added))
        disabled = ("--disable-pool", "10.70.0.0/16", "--disable-pool", "fd70::/64")
        node.cli("network", "set", "jobs", *pools, *disabled)
        for cidr, family in zip(added, (4, 6), strict=True):
            for container, source, ifname in (
                (one, own["jobs"][family], "eth1"),
                (other, elsewhere["jobs"][family], "eth0"),
            ):
                where = container.namespace
                eventually(lambda where=where, cidr=cidr: routes_to(where, cidr))
                assert f"dev {ifname} " in routes_to(where, cidr)
                assert f"src {source} " in routes_to(where, cidr)
        late = other.add("jobs", "eth1").ips
        assert late[4].startswith("10.170."), "of the pool that came"
        for ip in late.values():
            assert one.namespace.pings(ip, wait=2), ip
        assert ways(one.namespace, own, networks) == {}, "what is assigned of a disabled pool stays in use"
        assert check(one, "jobs", "eth1", own["jobs"]) == ""


def test_a_route_that_somebody_deletes_is_named_by_check_and_put_back(node: LabNode) -> None:
    networks = ["web", "db"]
    with node.container() as one:
        own = join(one, networks)
        metric = route_metric("eth1", default_route=False)
        missing = (
            f"the route to 10.65.0.0/16 via 169.254.1.2 on eth1 from {own['db'][4]} with metric {metric}"
        )

        def is_named() -> bool:
            one.namespace.run("ip", "route", "del", "10.65.0.0/16", check=False)
            return missing in check(one, "db", "eth1", own["db"])

        eventually(is_named)  # unless it is put back in between
        for family, cidr in (("-4", "10.64.0.0/16"), ("-6", "fd65::/64")):
            one.namespace.run("ip", family, "route", "del", cidr)
        eventually(lambda: ways(one.namespace, own, networks) == {})
        eventually(lambda: check(one, "db", "eth1", own["db"]) == "")


def test_containers_of_an_older_agent_keep_their_next_hop_and_get_their_routes(node: LabNode) -> None:
    """What an agent before there were routes to pools left: neither in its journal nor in the kernel."""
    with node.container() as one:
        own = join(one, ["web", "db"])
        node.kill()
        for cidr in ("10.64.0.0/16", "fd64::/64", "10.65.0.0/16", "fd65::/64"):
            one.namespace.run("ip", "-6" if ":" in cidr else "-4", "route", "del", cidr)
        # Of an older agent every next hop was the first.
        for family, first, hop in (("-4", "169.254.1.1", "169.254.1.2"), ("-6", "fe80::1", "fe80::2")):
            mac = ("lladdr", "ee:ee:ee:ee:ee:ee", "nud", "permanent", "dev", "eth1")
            one.namespace.run("ip", family, "neigh", "replace", first, *mac)
            one.namespace.run("ip", family, "neigh", "del", hop, "dev", "eth1")
            table = one.namespace.run("ip", family, "route", "show", "table", "all", "dev", "eth1").stdout
            for line in table.splitlines():
                if line.startswith("default"):
                    changed = line.replace(hop, first).split()
                    one.namespace.run("ip", family, "route", "replace", *changed, "dev", "eth1")
        _as_of_schema_3(node)
        node.start()
        eventually(lambda: ways(one.namespace, own, ["web", "db"]) == {})
        assert "via 169.254.1.1 dev eth1" in routes_to(one.namespace, "10.65.0.0/16")
        assert check(one, "db", "eth1", own["db"]) == ""


def _as_of_schema_3(node: LabNode) -> None:
    """Make a stopped agent's journal what an older agent had written."""

    def without(fields: dict[str, Any]) -> None:
        del fields["next_hop"], fields["pools"]

    journals.edit(node.state_dir, without)
    journals.make_older(node.state_dir, 3)


def test_a_container_of_old_mesos_reaches_the_members_of_both_of_its_networks(node: LabNode) -> None:
    with (
        ModulesContainer(node.socket, network="web") as one,
        members(node, ["web", "db"]) as there,
    ):
        web = one.allocate()
        assert one.isolate(web["ipv4"] + web["ipv6"])["error"] is None
        # The same container, asked for by another module's commands.
        second = ModulesContainer(node.socket, network="db")
        second.uid = one.uid
        db = second.allocate()
        given = {"ipv4_addrs": db["ipv4"], "ipv6_addrs": db["ipv6"], "netgroups": []}
        assert second.call("isolate", container_id=one.id, pid=one.pid, **given)["error"] is None
        own = {name: {4: given["ipv4"][0], 6: given["ipv6"][0]} for name, given in (("web", web), ("db", db))}
        assert ways(one.namespace, own, ["web", "db"]) == {}
        for _, ips in there.values():
            for ip in ips.values():
                assert one.namespace.pings(ip, wait=2), ip


def test_trace_and_policy_test_say_what_an_unbound_connection_comes_from(node: LabNode) -> None:
    with node.container() as one, members(node, ["web", "db"]) as there:
        own = join(one, ["web", "db"])
        eventually(lambda: node.ask("status")["outbox"] == 0)
        for family in (4, 6):
            target = there["db"][1][family]
            by_eth1 = {"interface": "eth1", "source": own["db"][family]}
            rows = node.ask("policy", "test", one.id, target, check=False)
            assert {row["source"]: row["allowed"] for row in rows} == {
                own["web"][family]: False,
                own["db"][family]: True,
            }
            assert [row["unbound"] for row in rows] == [by_eth1] * 2
            said = node.cli("policy", "test", own["web"][family], target, check=False).stdout
            assert (
                f"what is not bound to {own['web'][family]} leaves by eth1 from {own['db'][family]}" in said
            )

            assert _source_hop(node, own["db"][family], target) == (
                True,
                f"an unbound connection to {target} leaves by eth1 from {own['db'][family]}",
            )
            holds, says = _source_hop(node, own["web"][family], target)
            assert holds
            assert f"only what is bound to {own['web'][family]} comes from there" in says

        stray = there["db"][1][4]
        one.namespace.run("ip", "route", "add", f"{stray}/32", "via", "169.254.1.1", "dev", "eth0", "onlink")
        holds, says = _source_hop(node, own["db"][4], stray)
        assert not holds
        assert f"leaves by eth0 from {own['web'][4]}, and should by eth1 from {own['db'][4]}" in says


def _source_hop(node: LabNode, source: str, target: str) -> tuple[bool, str]:
    found = node.ask("endpoint", "trace", source, target, check=False)
    (hop,) = (hop for hop in found["ways"][0]["hops"] if hop["at"] == "source")
    return hop["holds"], hop["says"]


def test_trace_warns_of_an_unbound_udp_server_that_answers_from_another_address(node: LabNode) -> None:
    node.cli("network", "set", "db", "--isolation", "open")
    with node.container() as server, node.container() as caller:
        own = join(server, ["web", "db"])
        ips = caller.add("logs").ips
        eventually(lambda: node.ask("status")["outbox"] == 0)
        for family in (4, 6):
            ends = (ips[family], own["db"][family])
            answers = f"an unbound UDP server answers from {own['web'][family]}, not from {ends[1]}"
            assert answers in node.ask("endpoint", "trace", *ends, "--proto", "udp", check=False)["verdict"]
            assert "unbound" not in node.ask("endpoint", "trace", *ends, check=False)["verdict"]
