"""Containers on several networks of one node, through the real hooks: what they send without choosing an address comes
from the one that the called network knows them by, whatever else they have."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from isolator.drivers.naming import route_metric
from moorage.lab import Container, LabNode, ModulesContainer, Namespace
from netmodules.cni.config import SUPPORTED_VERSIONS
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel

NETWORKS = {"web": 64, "db": 65, "logs": 66, "cache": 67, "mail": 68, "auth": 69, "jobs": 70, "test": 71}
"""Name -> what its pools have in common: 10.N.0.0/16 and fdN::/64."""


def create(node: LabNode, *names: str) -> None:
    for name in names:
        number = NETWORKS[name]
        node.cli(
            "network", "create", name, "--pool", f"10.{number}.0.0/16", "--pool", f"fd{number}::/64",
            "--fabric", "none",
        )  # fmt: skip


def join(container: Container, networks: Sequence[str]) -> dict[str, dict[int, str]]:
    """Addresses by network; interfaces are eth0, eth1, ... in that order."""
    found = {}
    for i, network in enumerate(networks):
        answer = container.add(network, f"eth{i}")
        assert answer.exit == 0, answer.stdout
        found[network] = answer.ips
    return found


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
    create(node, *networks[1:])
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
    create(node, "db")
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


@pytest.mark.parametrize("version", [None, *SUPPORTED_VERSIONS])
def test_results_of_every_version_carry_the_routes_and_each_networks_own_next_hop(
    node: LabNode, version: str | None
) -> None:
    create(node, "db")
    expected = [
        {"dst": "0.0.0.0/0", "gw": "169.254.1.2"},
        {"dst": "::/0", "gw": "fe80::2"},
        {"dst": "10.65.0.0/16", "gw": "169.254.1.2"},
        {"dst": "fd65::/64", "gw": "fe80::2"},
    ]
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
        inside = (
            one.namespace.run("ip", "-j", "route").stdout
            + one.namespace.run("ip", "-j", "-6", "route").stdout
        )
        assert inside.count('"169.254.1.2"') == inside.count('"fe80::2"') == 2


def routes_to(namespace: Namespace, cidr: str) -> str:
    family = "-6" if ":" in cidr else "-4"
    return namespace.run("ip", family, "route", "show", cidr).stdout.strip()


def test_routes_of_running_containers_follow_the_pools_in_both_families(node: LabNode) -> None:
    create(node, "db")
    added = ("10.165.0.0/16", "fd65:1::/64")
    with node.container() as one, node.container() as other:
        own = join(one, ["web", "db"])
        only4 = other.call("ADD", other.config("db"), "eth0")
        assert only4.exit == 0
        node.cli("network", "set", "db", *itertools.chain(*(("--add-pool", cidr) for cidr in added)))
        for cidr, family in zip(added, (4, 6), strict=True):
            eventually(lambda cidr=cidr: f"src {own['db'][family]}" in routes_to(one.namespace, cidr))
            assert "dev eth1" in routes_to(one.namespace, cidr)
            eventually(lambda cidr=cidr: routes_to(other.namespace, cidr))
        node.cli("network", "set", "db", "--disable-pool", "10.65.0.0/16", "--disable-pool", "fd65::/64")
        late = other.add("db", "eth1").ips
        assert late[4].startswith("10.165."), "of the pool that came"
        assert one.namespace.pings(late[4], wait=2)
        assert one.namespace.pings(late[6], wait=2)
        assert ways(one.namespace, own, ["web", "db"]) == {}, (
            "what is assigned of a disabled pool stays in use"
        )
        for ifname, network in (("eth0", "web"), ("eth1", "db")):
            checked = one.call(
                "CHECK", {**one.config(network), "cniVersion": "1.0.0", "prevResult": {}}, ifname
            )
            assert checked.exit == 0, checked.stdout


def test_a_route_that_somebody_deletes_is_put_back_and_check_names_it(node: LabNode) -> None:
    create(node, "db")
    with node.container() as one:
        own = join(one, ["web", "db"])
        node.kill()
        one.namespace.run("ip", "route", "del", "10.65.0.0/16")
        node.start()
        config = {**one.config("db"), "cniVersion": "1.0.0", "prevResult": {}}
        metric = route_metric("eth1", default_route=False)
        missing = (
            f"the route to 10.65.0.0/16 via 169.254.1.2 on eth1 from {own['db'][4]} with metric {metric}"
        )
        assert missing in one.call("CHECK", config, "eth1").json["msg"]
        for family, cidr in (("-4", "10.64.0.0/16"), ("-6", "fd65::/64")):
            one.namespace.run("ip", family, "route", "del", cidr)
        eventually(lambda: ways(one.namespace, own, ["web", "db"]) == {})
        assert one.call("CHECK", config, "eth1").exit == 0


def test_containers_of_an_older_agent_keep_their_next_hop_and_get_their_routes(node: LabNode) -> None:
    """What an agent before there were routes to pools left: neither in its journal nor in the kernel."""
    create(node, "db")
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
                    one.namespace.run("ip", family, "route", "replace", *line.replace(hop, first).split())
        _as_of_schema_3(node)
        node.start()
        eventually(lambda: ways(one.namespace, own, ["web", "db"]) == {})
        assert "via 169.254.1.1 dev eth1" in routes_to(one.namespace, "10.65.0.0/16")
        shown = {e["ifname"]: e for e in node.ask("endpoint", "list")}
        assert shown["eth1"]["network"] == "db"
        assert (
            one.call("CHECK", {**one.config("db"), "cniVersion": "1.0.0", "prevResult": {}}, "eth1").exit == 0
        )


def _as_of_schema_3(node: LabNode) -> None:
    """Make a stopped agent's journal what an older agent had written."""
    with sqlite3.connect(node.state_dir / "journal.db") as journal:
        for container, ifname, value in journal.execute("SELECT * FROM endpoints").fetchall():
            fields: dict[str, Any] = json.loads(value)
            del fields["next_hop"], fields["pools"]
            journal.execute(
                "UPDATE endpoints SET value = ? WHERE container_id = ? AND ifname = ?",
                (json.dumps(fields).encode(), container, ifname),
            )
        journal.execute("UPDATE meta SET value = '3' WHERE key = 'schema'")


def test_a_container_of_old_mesos_reaches_the_members_of_both_of_its_networks(node: LabNode) -> None:
    create(node, "db")
    with (
        ModulesContainer(node.socket, network="web") as one,
        members(node, ["web", "db"]) as there,
    ):
        web = one.allocate()
        assert one.isolate(web["ipv4"] + web["ipv6"])["error"] is None
        db_calls = ModulesContainer(node.socket, network="db")
        db_calls.id, db_calls.uid = one.id, one.uid
        db = db_calls.allocate()
        assert db["error"] is None, db
        assert db_calls.isolate(db["ipv4"] + db["ipv6"], pid=one.pid)["error"] is None
        own = {name: {4: given["ipv4"][0], 6: given["ipv6"][0]} for name, given in (("web", web), ("db", db))}
        assert ways(one.namespace, own, ["web", "db"]) == {}
        for _, ips in there.values():
            for ip in ips.values():
                assert one.namespace.pings(ip, wait=2), ip


def test_trace_and_policy_test_say_what_an_unbound_connection_comes_from(node: LabNode) -> None:
    create(node, "db")
    with node.container() as one, members(node, ["web", "db"]) as there:
        own = join(one, ["web", "db"])
        eventually(lambda: node.ask("status")["outbox"] == 0)
        for family in (4, 6):
            target = there["db"][1][family]
            by_eth1 = {"interface": "eth1", "source": own["db"][family]}
            for network in ("web", "db"):
                (row,) = node.ask("policy", "test", own[network][family], target, check=False)
                assert (row["allowed"], row["unbound"]) == (network == "db", by_eth1)
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
    create(node, "db", "logs")
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
