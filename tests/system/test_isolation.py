"""What operators and apps see of isolation on a node: netgroups, callers, port mappings, over restarts and changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from moorage.lab import Container, LabNode, Namespace, unique
from moorage.lab.container import Answer
from tests.system.conftest import assert_nothing_left, eventually, listening

pytestmark = pytest.mark.kernel

SERVE = """
import http.server
class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(self.client_address[0].encode())
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 80), Hello).serve_forever()
"""
FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


@pytest.fixture
def world(node: LabNode) -> Iterator[Namespace]:
    """What the node reaches by its uplink: 192.0.2.2 here, 192.0.2.1 there."""
    with Namespace(unique("world")) as world:
        node.namespace.run(
            "ip", "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", world.name
        )
        for namespace, number in ((node.namespace, 1), (world, 2)):
            namespace.run("ip", "addr", "add", f"192.0.2.{number}/24", "dev", "up0")
            namespace.run("ip", "link", "set", "up0", "up")
        world.run("ip", "route", "add", "default", "via", "192.0.2.1")
        yield world


@pytest.fixture
def server() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def serve(container: Container, started: list[subprocess.Popen[bytes]]) -> None:
    """HTTP on port 80 of a container; it answers whom it saw."""
    started.append(container.namespace.start(sys.executable, "-c", SERVE))
    eventually(lambda: container.namespace.run("ss", "-Hltn", "sport = :80").stdout.strip() != "")


def fetched(place: Namespace, url: str) -> str:
    """What comes from there; "" if nothing does."""
    return place.run(sys.executable, "-c", FETCH, url, check=False).stdout.strip()


def test_netgroups_outlive_the_agent_and_are_shown_by_everybody(node: LabNode) -> None:
    node.cli("network", "set", "web", "--allow-netgroup", "red", "--allow-netgroup", "blue")
    with node.container("a") as a, node.container("b") as b:
        a.add("web", labels={"moorage.netgroups": "red"})
        ips = b.add("web", labels={"moorage.netgroups": "blue"}).ips
        assert not any(a.namespace.pings(ips[family], wait=1) for family in (4, 6))
        denied = node.ask("policy", "test", a.id, b.id, check=False)
        assert {row["allowed"] for row in denied} == {False}
        (command,) = {row["command"] for row in denied}
        assert command == f"moorage endpoint set-netgroups {b.id}/eth0 blue red"
        node.cli(*command.split()[1:])
        assert all(a.namespace.pings(ips[family]) for family in (4, 6))
        node.kill()
        assert a.namespace.pings(ips[4])
        node.start()
        assert all(a.namespace.pings(ips[family]) for family in (4, 6))
        assert node.ask("endpoint", "show", f"{b.id}/eth0")["netgroups"] == ["blue", "red"]
        eventually(lambda: node.ask("ip", "show", ips[4])["netgroups"] == ["blue", "red"])
        (first, *_) = node.ask("policy", "show", b.id)
        assert [caller["who"] for caller in first["callers"]][1:] == [
            "members of the netgroup blue",
            "members of the netgroup red",
        ]
        assert (
            node.cli("policy", "test", a.id, b.id).stdout.count("allowed: both are in the netgroup red") == 2
        )
        refused = node.cli("endpoint", "set-netgroups", b.id, "green", check=False)
        assert refused.returncode == 1
        assert "allows the netgroups" in refused.stderr
        node.cli("endpoint", "set-netgroups", b.id)
        assert not a.namespace.pings(ips[4], wait=1)
        assert node.cli("ip", "check").returncode == 0


def test_callers_from_outside_are_let_in_and_out_live(
    node: LabNode, world: Namespace, server: list[subprocess.Popen[bytes]]
) -> None:
    node.cli("network", "set", "web", "--no-nat")
    with node.container() as container:
        ip = container.add("web").ips[4]
        serve(container, server)
        url = f"http://{ip}/"
        assert fetched(node.namespace, url), "the node reaches its containers"
        assert fetched(world, url) == ""
        for given in (("--allow-from", "192.0.2.0/24"), ("--isolation", "open")):
            node.cli("network", "set", "web", *given)
            eventually(lambda: fetched(world, url) == "192.0.2.2")
            node.cli("network", "set", "web", "--allow-from", "none", "--isolation", "netgroups")
            eventually(lambda: fetched(world, url) == "")
        assert container.namespace.pings("192.0.2.2"), "and it reaches the world all the while"


def test_a_mapped_port_reaches_the_container_and_a_taken_one_names_its_holder(
    node: LabNode, world: Namespace, server: list[subprocess.Popen[bytes]]
) -> None:
    mapping = {"host_port": 31080, "container_port": 80, "protocol": "tcp"}
    with node.container("one") as one, node.container("two") as two, node.container("other") as other:
        one.add("web", port_mappings=[mapping])
        other.add("web")
        serve(one, server)
        for place in (world, node.namespace, other.namespace, one.namespace):
            assert fetched(place, "http://192.0.2.1:31080/")
        assert fetched(node.namespace, "http://127.0.0.1:31080/")
        for port, words in (
            ("31080", f"mapped to {one.id}/eth0"),
            ("31081", "tcp port 31081 is not mapped to a container"),
        ):
            assert words in node.cli("policy", "test", other.id, "192.0.2.1", "--port", port).stdout
        assert "is not mapped" in node.cli("policy", "test", other.id, "::1", "--port", "31080").stdout
        answer = two.add("web", port_mappings=[mapping])
        assert answer.json["code"] == 107
        assert one.id in answer.json["msg"]
        assert "tcp port 31080" in answer.json["msg"]
        assert [e["container_id"] for e in node.ask("endpoint", "list")].count(two.id) == 0
        node.kill()
        node.start()
        assert fetched(world, "http://192.0.2.1:31080/"), "after a restart of the agent, too"
        assert one.delete("web", port_mappings=[mapping]).exit == 0
        assert fetched(world, "http://192.0.2.1:31080/") == ""
        assert two.add("web", port_mappings=[mapping]).exit == 0
        serve(two, server)
        assert fetched(world, "http://192.0.2.1:31080/")


@pytest.mark.parametrize(("protocol", "ip"), [("tcp", "127.0.0.1"), ("tcp", "::"), ("udp", "0.0.0.0")])
def test_a_port_that_a_process_of_the_node_listens_on_is_refused_by_its_name(
    node: LabNode, protocol: str, ip: str
) -> None:
    mapping = {"host_port": 31080, "container_port": 80, "protocol": protocol}
    with node.container() as container:
        with listening(node, protocol, ip, 31080) as pid:
            answer = container.add("web", port_mappings=[mapping])
            assert answer.json["code"] == 107
            assert f"(pid {pid}) listens on {protocol} " in answer.json["msg"]
            assert_nothing_left(node)
        assert container.add("web", port_mappings=[mapping]).exit == 0


def test_the_tunnels_port_is_refused_before_there_is_a_tunnel(node: LabNode) -> None:
    node.cli("network", "set", "web", "--allow-hostport", "4789")
    mapping = {"host_port": 4789, "container_port": 53, "protocol": "udp"}
    with node.container() as container:
        # The agent hears of the permission in its own time; until then it is code 106.
        eventually(lambda: container.add("web", port_mappings=[mapping]).json["code"] == 107)
        assert "--vxlan-port" in container.add("web", port_mappings=[mapping]).json["msg"]
        assert_nothing_left(node)


def mapped_at(node: LabNode, container: Container, host_ip: str) -> Answer:
    """ADD with a mapping of an address; the way of containerd, since Mesos cannot ask for one."""
    mapping = {"hostPort": 31080, "containerPort": 80, "hostIP": host_ip}
    config = {"name": "web", "type": "moorage-cni", "cniVersion": "1.0.0", "socket": str(node.socket)}
    return container.call("ADD", {**config, "runtimeConfig": {"portMappings": [mapping]}})


@pytest.mark.parametrize("host_ip", ["::1", "192.0.2.9", "2001:db8::9", "ff02::1", "10.64.0.1"])
def test_a_host_ip_that_is_none_of_the_nodes_is_refused(node: LabNode, host_ip: str) -> None:
    with node.container() as container:
        answer = mapped_at(node, container, host_ip)
        assert answer.json["code"] == 7
        assert host_ip in answer.json["msg"]
        assert_nothing_left(node)


def test_a_host_ip_of_the_node_is_mapped_beside_a_process_on_another(node: LabNode) -> None:
    with (
        node.container() as container,
        listening(node, "tcp", "127.0.0.53", 31080),
        listening(node, "tcp", "::1", 31080),
    ):
        for host_ip in ("198.18.0.1", "fd98::1", "127.0.0.1"):
            assert mapped_at(node, container, host_ip).exit == 0
            assert container.delete("web").exit == 0


def test_a_mapping_of_a_family_that_the_network_has_not_is_refused(node: LabNode) -> None:
    node.cli("network", "create", "four", "--pool", "10.70.0.0/24")
    mapping = {"hostPort": 31081, "containerPort": 80, "hostIP": "2001:db8::1"}
    with node.container() as container:
        config = {"name": "four", "type": "moorage-cni", "cniVersion": "1.0.0", "socket": str(node.socket)}
        answer = container.call("ADD", {**config, "runtimeConfig": {"portMappings": [mapping]}})
        assert answer.json["code"] == 7
        assert "has no IPv6" in answer.json["msg"]
