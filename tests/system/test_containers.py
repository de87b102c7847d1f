"""What a user sees: containers talk, each with its own IP, and leave nothing behind."""

from __future__ import annotations

import pytest

from moorage.lab import LabNode
from tests.patience import PATIENCE
from tests.system.conftest import assert_nothing_left, eventually, links, routes, rules

pytestmark = pytest.mark.kernel

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")


def test_two_containers_and_the_node_reach_each_other_over_both_families(node: LabNode) -> None:
    with node.container("a") as a, node.container("b") as b:
        of_a, of_b = a.add("web").ips, b.add("web").ips
        for family in (4, 6):
            assert a.namespace.pings(of_b[family])
            assert b.namespace.pings(of_a[family])
            assert node.namespace.pings(of_a[family])
        assert a.delete("web").exit == 0
        assert b.delete("web").exit == 0
        assert_nothing_left(node)
        assert rules(a) == []


def test_the_address_record_says_who_has_it(node: LabNode) -> None:
    with node.container() as container:
        ips = container.add("web", labels={"role": "frontend", "stage": ""}).ips
        row = node.ask("ip", "show", ips[4])
        row = row[0] if isinstance(row, list) else row
        assert (row["state"], row["container_id"], row["ifname"]) == ("assigned", container.id, "eth0")
        assert (row["network"], row["engine"], row["node"]) == ("web", "mesos", node.name)
        assert {"key": "role", "value": "frontend"} in row["labels"]
        container.delete("web")


@pytest.mark.parametrize("version", VERSIONS)
def test_each_cni_version_gets_its_own_result_shape(node: LabNode, version: str) -> None:
    with node.container() as container:
        config = {"cniVersion": version, "name": "web", "type": "moorage-cni", "socket": str(node.socket)}
        result = container.call("ADD", config).json
        assert result["cniVersion"] == version
        if version < "0.3":
            assert result["ip4"]["ip"].endswith("/32")
            assert result["ip6"]["ip"].endswith("/128")
            assert "ips" not in result
        else:
            assert {("version" in ip) for ip in result["ips"]} == {version < "1"}
            assert [i["name"] for i in result["interfaces"]][-1] == "eth0"
            assert ("mtu" in result["interfaces"][-1]) == (version >= "1.1")
            assert "ip4" not in result
        if version >= "0.4":
            check = container.call("CHECK", {**config, "prevResult": result})
            assert (check.exit, check.stdout) == (0, "")
        assert container.call("DEL", config).exit == 0


def test_check_fails_on_a_real_difference(node: LabNode) -> None:
    with node.container() as container:
        config = {"cniVersion": "1.0.0", "name": "web", "type": "moorage-cni", "socket": str(node.socket)}
        result = container.call("ADD", config).json
        container.namespace.run("ip", "-4", "addr", "flush", "dev", "eth0")
        answer = container.call("CHECK", {**config, "prevResult": result})
        assert answer.exit != 0
        assert result["ips"][0]["address"].split("/")[0] in answer.json["msg"]
        container.call("DEL", config)


def test_a_container_on_two_networks_answers_on_all_its_addresses(node: LabNode) -> None:
    node.cli(
        "network", "create", "db", "--pool", "10.65.0.0/16", "--pool", "fd65::/64", "--isolation", "open"
    )
    node.cli("network", "set", "web", "--isolation", "open")
    with node.container("both") as both, node.container("web") as on_web, node.container("db") as on_db:
        calls = [
            both.start_call("ADD", both.config(network), ifname)
            for network, ifname in (("db", "eth1"), ("web", "eth0"))
        ]
        db, web = (both.finish_call(call).ips for call in calls)
        on_web.add("web")
        on_db.add("db")
        for peer in (on_web, on_db):
            for ips in (web, db):
                for family in (4, 6):
                    assert peer.namespace.pings(ips[family]), (peer.namespace.name, ips[family])
        assert "dev eth0" in both.namespace.run("ip", "route", "get", "192.0.2.1").stdout
        assert "dev eth0" in both.namespace.run("ip", "route", "get", "2001:db8::1").stdout

        assert both.delete("web", "eth0").exit == 0
        eventually(lambda: len(links(node)) == 3)
        for family in (4, 6):
            assert on_db.namespace.pings(db[family])
        assert "dev eth1" in both.namespace.run("ip", "route", "get", "192.0.2.1").stdout
        assert both.delete("db", "eth1").exit == 0
        eventually(lambda: rules(both) == [])


def test_a_label_moves_the_default_route_to_another_interface(node: LabNode) -> None:
    with node.container() as container:
        container.add("web", "eth0")
        container.add("web", "eth1", labels={"moorage.default-route": "true"})
        assert "dev eth1" in container.namespace.run("ip", "route", "get", "192.0.2.1").stdout
        container.delete("web", "eth1")
        eventually(lambda: "dev eth0" in container.namespace.run("ip", "route", "get", "192.0.2.1").stdout)


def test_an_endpoint_whose_namespace_vanishes_is_collected_within_seconds(node: LabNode) -> None:
    with node.container() as container:
        container.add("web")
    assert_nothing_left(node)
    assert routes(node) == []


def test_a_reservation_survives_the_restart_of_its_app_without_a_cooldown(node: LabNode) -> None:
    node.cli("ip", "reserve", "10.64.7.7", "--key", "db-primary")
    labels = {"moorage.reservation": "db-primary"}
    for _ in range(3):
        with node.container() as container:
            assert container.add("web", labels=labels).ips[4] == "10.64.7.7"
            assert container.delete("web", labels=labels).exit == 0


def test_a_reserved_address_is_given_to_nobody_else(node: LabNode) -> None:
    node.cli("ip", "reserve", "10.64.7.7", "--key", "db-primary")
    with node.container() as container:
        answer = container.add("web", labels={"moorage.ip": "10.64.7.7"})
        assert answer.exit != 0
        assert "reserved" in answer.json["msg"]


def test_a_released_static_address_cools_down_and_says_so(node: LabNode) -> None:
    labels = {"moorage.ip": "10.64.9.9"}
    with node.container() as first, node.container() as second:
        assert first.add("web", labels=labels).ips[4] == "10.64.9.9"
        first.delete("web", labels=labels)
        eventually(lambda: node.ask("ip", "list", "--state", "cooling") != [])
        answer = second.add("web", labels=labels)
        assert answer.json["code"] == 11
        assert "cools down" in answer.json["msg"]


def test_dns_of_the_network_reaches_the_result(node: LabNode) -> None:
    node.cli(
        "network",
        "create",
        "named",
        "--pool",
        "10.66.0.0/24",
        "--dns",
        "10.0.0.53",
        "--search",
        "svc.internal",
    )
    with node.container() as container:
        assert container.add("named").json["dns"] == {
            "nameservers": ["10.0.0.53"],
            "search": ["svc.internal"],
        }
        container.delete("named")


@pytest.mark.slow
def test_a_network_is_deleted_when_its_last_address_has_cooled_down(node: LabNode) -> None:
    node.cli("network", "create", "brief", "--pool", "10.67.0.0/24")

    def refusal() -> str:
        return node.cli("network", "delete", "brief", check=False).stderr

    with node.container() as container:
        container.add("brief")
        eventually(lambda: "1 assigned" in refusal())
        container.delete("brief")
        eventually(lambda: "1 cooling" in refusal())
    eventually(lambda: refusal() == "", within=2 * PATIENCE)
    assert [network["name"] for network in node.ask("network", "list")] == ["web"]
    assert not [row for row in node.ask("ip", "list") if row["network"] == "brief"]


def test_traffic_that_leaves_the_pools_is_masqueraded(node: LabNode) -> None:
    from moorage.lab import Namespace, unique

    with Namespace(unique("world")) as world, node.container() as container:
        node.namespace.run(
            "ip", "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", world.name
        )
        for namespace, ip in ((node.namespace, "192.0.2.1/24"), (world, "192.0.2.2/24")):
            namespace.run("ip", "addr", "add", ip, "dev", "up0")
            namespace.run("ip", "link", "set", "up0", "up")
        container.add("web")
        # The world has no route to the pool: an answer proves that the node's address was used.
        assert container.namespace.pings("192.0.2.2")
        container.delete("web")
