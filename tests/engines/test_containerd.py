"""Containers that Debian's containerd starts, with moorage-cni alone and in chains with Debian's plugins."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from moorage.lab import LabNode, Namespace, unique
from tests.engines.containerd import Container, Containerd, conflist
from tests.system.conftest import assert_nothing_left, eventually, links

pytestmark = [pytest.mark.kernel, pytest.mark.engines]

FETCH = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=2).read())"
SERVE = ("/bin/httpd", "-f", "-p", "80", "-h", "/www")


def labels(**values: str) -> dict[str, Any]:
    """``args.cni.labels`` of a configuration."""
    listed = [{"key": f"moorage.{key}", "value": value} for key, value in values.items()]
    return {"args": {"cni": {"labels": listed}}}


def engines(node: LabNode) -> dict[str, str]:
    return {row["container_id"]: row["engine"] for row in node.ask("endpoint", "list")}


@pytest.fixture
def world(node: LabNode) -> Iterator[Namespace]:
    """Something beyond the node, which reaches its address 192.0.2.1."""
    with Namespace(unique("world")) as world:
        node.namespace.run(
            "ip", "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", world.name
        )
        for namespace, ip in ((node.namespace, "192.0.2.1/24"), (world, "192.0.2.2/24")):
            namespace.run("ip", "address", "add", ip, "dev", "up0")
            namespace.run("ip", "link", "set", "up0", "up")
        yield world


def fetches(namespace: Namespace, url: str) -> bool:
    """Whether a page can be fetched from inside a namespace."""
    return "hello" in namespace.run(sys.executable, "-IS", "-c", FETCH, url, check=False).stdout


def test_two_containers_talk_over_both_families_and_leave_nothing(
    node: LabNode, containerd: Containerd
) -> None:
    printed = json.loads(node.cli("network", "cni-config", "web", "--conflist").stdout)
    one = containerd.run("one", printed)
    two = containerd.run("two", printed)
    assert engines(node) == {"default-one": "cni", "default-two": "cni"}
    for here, there in ((one, two), (two, one)):
        for family in (4, 6):
            assert here.pings(there.ips[family])
    assert node.namespace.pings(one.ips[4])
    assert node.cli("ip", "check").returncode == 0
    for container in (one, two):
        container.end()
    assert_nothing_left(node)
    assert node.cli("ip", "check").returncode == 0
    assert containerd.results == []


def test_containers_without_a_common_netgroup_do_not_talk(node: LabNode, containerd: Containerd) -> None:
    web = containerd.run("web", conflist(node, **labels(netgroups="web")))
    both = containerd.run("both", conflist(node, **labels(netgroups="web,db")))
    db = containerd.run("db", conflist(node, **labels(netgroups="db")))
    for family in (4, 6):
        assert web.pings(both.ips[family])
        assert db.pings(both.ips[family])
        assert not web.pings(db.ips[family])
    for container in (web, both, db):
        container.end()
    assert_nothing_left(node)


def mapped(host_port: int) -> dict[str, Any]:
    """A port mapping as a runtime passes it on; ctr cannot be told of one, so it stands in the configuration."""
    mapping = {"hostPort": host_port, "containerPort": 80, "protocol": "tcp"}
    return {"capabilities": {"portMappings": True}, "runtimeConfig": {"portMappings": [mapping]}}


@pytest.mark.parametrize("whose", ["ours", "debians"])
def test_a_mapped_port_leads_into_the_container(
    node: LabNode, containerd: Containerd, world: Namespace, whose: str
) -> None:
    (containerd.rootfs / "www" / "index.html").write_text("hello")
    public = labels(netgroups="public")
    if whose == "ours":
        chain = conflist(node, **public, **mapped(31080))
    else:
        chain = conflist(node, **public, after=[{"type": "portmap", "snat": True, **mapped(31080)}])
    container = containerd.run("web", chain, *SERVE)
    eventually(lambda: fetches(world, "http://192.0.2.1:31080/"))
    assert fetches(node.namespace, "http://127.0.0.1:31080/")
    container.end()
    assert_nothing_left(node)
    assert not fetches(world, "http://192.0.2.1:31080/")


def test_a_chain_with_bandwidth_and_tuning_works_and_comes_off_whole(
    node: LabNode, containerd: Containerd
) -> None:
    limits = {
        "ingressRate": 8_000_000,
        "ingressBurst": 800_000,
        "egressRate": 8_000_000,
        "egressBurst": 800_000,
    }
    chain = conflist(
        node,
        before=[{"type": "loopback"}],
        after=[
            {"type": "bandwidth", **limits},
            {"type": "tuning", "sysctl": {"net.ipv4.ip_default_ttl": "77"}},
        ],
    )
    one = containerd.run("one", chain)
    two = containerd.run("two", conflist(node))
    before = node.namespace.run("ip", "-o", "link").stdout
    assert one.pings(two.ips[4])
    assert one.pings(two.ips[6])
    assert one.run("/bin/cat", "/proc/sys/net/ipv4/ip_default_ttl").stdout.strip() == "77"
    host_ifname = next(r["host_ifname"] for r in node.ask("endpoint", "list") if r["container_id"] == one.id)
    assert "tbf" in node.namespace.run("tc", "qdisc", "show", "dev", host_ifname).stdout
    assert node.cli("ip", "check").returncode == 0, "what other plugins add is no disorder"
    assert "bwp" in before
    for container in (one, two):
        container.end()
    assert_nothing_left(node)
    assert "bwp" not in node.namespace.run("ip", "-o", "link").stdout


def test_an_interface_that_another_plugin_made_is_left_alone_and_said(
    node: LabNode, containerd: Containerd
) -> None:
    ipam = {"type": "host-local", "subnet": "198.51.100.0/24"}
    chain = conflist(node, before=[{"type": "ptp", "ipam": ipam}])
    with pytest.raises(AssertionError, match="has made the container's eth0 already"):
        containerd.run("two", chain)
    assert_nothing_left(node)


def test_the_death_of_a_shim_takes_the_container_and_leaves_nothing(
    node: LabNode, containerd: Containerd
) -> None:
    container = containerd.run("one", conflist(node))
    os.kill(container.shim, signal.SIGKILL)
    # containerd cleans up after it, and ctr, which waits for the container, sends the DEL.
    container.ctr.communicate(timeout=60)
    assert_nothing_left(node)
    assert node.cli("ip", "check").returncode == 0


def test_a_container_deleted_while_the_agent_is_down_is_released_when_it_is_back(
    node: LabNode, containerd: Containerd
) -> None:
    gone = containerd.run("gone", conflist(node))
    stays = containerd.run("stays", conflist(node))
    ips = stays.ips
    node.kill()
    gone.end()
    assert len(list((node.socket.parent / "spool").glob("*.del"))) == 1
    node.start()
    eventually(lambda: engines(node) == {"default-stays": "cni"})
    assert node.namespace.pings(ips[4])
    stays.end()
    assert_nothing_left(node)


def test_containers_outlive_restarts_of_containerd_and_of_the_agent(
    node: LabNode, containerd: Containerd
) -> None:
    one = containerd.run("one", conflist(node), detached=True)
    two = containerd.run("two", conflist(node), detached=True)
    ips = one.ips
    containerd.stop()
    assert node.stop() == 0
    node.start()
    containerd.start()
    assert one.ips == ips
    for family in (4, 6):
        assert two.pings(ips[family])
    third = containerd.run("three", conflist(node))
    assert third.pings(ips[4])
    third.end()
    for container in (one, two):
        container.remove()
    assert_nothing_left(node)


def test_a_del_that_never_comes_is_made_up_for_when_the_namespace_is_gone(
    node: LabNode, containerd: Containerd
) -> None:
    """A detached container's network is nobody's to take away: ``ctr tasks delete`` knows nothing of it."""
    detached = containerd.run("detached", conflist(node), detached=True)
    attended = containerd.run("attended", conflist(node))
    # ctr dies: its container goes on, with its network, and nobody will send its DEL.
    end_ctr(attended)
    assert attended.is_running
    assert len(engines(node)) == 2
    assert node.cli("ip", "check").returncode == 0
    for container in (detached, attended):
        container.remove()
    assert_nothing_left(node)
    assert node.cli("ip", "check").returncode == 0
    assert len(containerd.results) == 2, "libcni does not know that it is over"
    again = containerd.run("again", conflist(node))
    again.end()


def test_a_container_that_ends_while_nobody_looks_is_collected_when_the_agent_is_back(
    node: LabNode, containerd: Containerd
) -> None:
    stays, ends = (containerd.run(name, conflist(node), detached=True) for name in ("a", "b"))
    node.kill()
    ends.remove()
    node.start()
    eventually(lambda: len(links(node)) == len(node.ask("endpoint", "list")) == 1)
    stays.remove()
    assert_nothing_left(node)


def test_containers_that_all_end_while_nobody_looks_are_a_question_to_the_operator(
    node: LabNode, containerd: Containerd
) -> None:
    containers = [containerd.run(name, conflist(node), detached=True) for name in ("a", "b")]
    node.kill()
    for container in containers:
        container.remove()
    node.start()
    assert len(node.ask("endpoint", "missing")) == 2
    node.cli("endpoint", "missing", "--release")
    assert_nothing_left(node)


def end_ctr(container: Container) -> None:
    """kill -9 of the ctr that waits for it."""
    container.ctr.kill()
    container.ctr.communicate(timeout=20)


def test_what_moorage_refuses_the_user_of_ctr_is_told(node: LabNode, containerd: Containerd) -> None:
    with pytest.raises(AssertionError, match="there is no network 'wbe'"):
        containerd.run("one", conflist(node, network="wbe"))
    with pytest.raises(AssertionError, match='take "ipRanges" out of "capabilities"'):
        containerd.run("two", conflist(node, runtimeConfig={"ipRanges": [[{"subnet": "10.64.0.0/24"}]]}))
    assert links(node) == []
    assert_nothing_left(node)
