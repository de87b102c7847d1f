"""A container that starts again, DEL and ADD of one id within milliseconds, has its address and its MAC back: beside
other nodes, without the store, and with an agent that was killed while the store was away.

The calls are those of engines that remember what a container had and ask for it (`podman restart`, `podman network
reload`). The network is one as it is created: nobody may choose an address or a MAC in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from moorage.lab import Answer, Container, Lab
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

NETWORK = "web"
AGAIN = 2
"""Times a container starts again in one test."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2, etcd=1) as lab:
        lab.start()
        lab.nodes[0].cli(
            "network", "create", NETWORK, "--pool", "10.64.0.0/20", "--pool", "fd64::/112",
            "--fabric", "vxlan", "--allow-netgroup", "*",
        )  # fmt: skip
        yield lab


@pytest.fixture
def container(lab: Lab) -> Iterator[Container]:
    with lab.nodes[0].container() as container:
        yield container
        container.delete(NETWORK)


@pytest.fixture
def peer(lab: Lab) -> Iterator[Container]:
    """On the other node, in the network's own netgroup."""
    with lab.nodes[1].container() as peer:
        assert peer.add(NETWORK).exit == 0
        yield peer
        peer.delete(NETWORK)


@contextlib.contextmanager
def store_away(lab: Lab) -> Iterator[None]:
    lab.etcd.kill()
    try:
        yield
    finally:
        lab.etcd.start()
        lab.etcd.wait_ready()


def mac_of(answer: Answer) -> str:
    return next(str(one["mac"]) for one in answer.json["interfaces"] if one.get("sandbox"))


def asking(container: Container, ips: Mapping[int, str], mac: str = "", **asked: Any) -> Answer:
    """ADD as an engine sends it that names what the container had."""
    runtime = {"ips": list(ips.values()), **({"mac": mac} if mac else {})}
    config = {**container.config(NETWORK, **asked), "cniVersion": "1.0.0", "runtimeConfig": runtime}
    return container.call("ADD", config)


def begun(container: Container) -> tuple[Mapping[int, str], str]:
    """A container's addresses and its MAC."""
    answer = container.call("ADD", {**container.config(NETWORK), "cniVersion": "1.0.0"})
    assert answer.exit == 0, answer
    return answer.ips, mac_of(answer)


def reached(peer: Container, *ips: str) -> bool:
    """Whether all answer, asked without patience."""
    return all(peer.namespace.pings(ip, wait=1) for ip in ips)


def started_again(container: Container, ips: Mapping[int, str], mac: str, **asked: Any) -> None:
    assert container.delete(NETWORK).exit == 0
    answer = asking(container, ips, mac, **asked)
    assert answer.exit == 0, answer
    assert (answer.ips, mac_of(answer)) == (ips, mac)


def in_touch(lab: Lab) -> None:
    for node in lab.nodes:
        eventually(lambda node=node: (node.ask("status")["problem"], node.ask("status")["outbox"]) == ("", 0))


def test_it_has_what_it_had_and_others_reach_it(lab: Lab, container: Container, peer: Container) -> None:
    ips, mac = begun(container)
    for _ in range(AGAIN):
        eventually(lambda: reached(peer, *ips.values()))
        started_again(container, ips, mac)
    eventually(lambda: reached(peer, *ips.values()))
    in_touch(lab)
    (row,) = [
        one for one in lab.nodes[0].ask("ip", "list", "--state", "assigned") if one["address"] == ips[4]
    ]
    assert row["container_id"] == container.id


def test_it_has_what_it_had_after_its_release_was_confirmed(lab: Lab, container: Container) -> None:
    ips, mac = begun(container)
    container.delete(NETWORK)
    eventually(lambda: lab.nodes[0].ask("ip", "show", ips[4])["state"] == "cooling")
    answer = asking(container, ips, mac)
    assert (answer.exit, answer.ips, mac_of(answer)) == (0, ips, mac)


def test_nobody_else_has_it(lab: Lab, container: Container) -> None:
    ips, mac = begun(container)
    container.delete(NETWORK)
    node = lab.nodes[0]
    with node.container() as another:
        assert asking(another, ips).json["code"] == 106
        assert asking(another, {}, mac).json["code"] == 106
        node.cli("network", "set", NETWORK, "--allow-static", "all")
        try:
            eventually(lambda: asking(another, ips).json["code"] == 11)
            assert "cools down" in asking(another, ips).json["msg"]
        finally:
            node.cli("network", "set", NETWORK, "--allow-static", "ranges")
    assert asking(container, ips, mac).exit == 0


def test_it_leaves_a_netgroup_when_it_starts_again_in_another(
    lab: Lab, container: Container, peer: Container
) -> None:
    ips, mac = begun(container)
    eventually(lambda: reached(peer, ips[4]))
    started_again(container, ips, mac, labels={"moorage.netgroups": "blue"})
    eventually(lambda: not reached(peer, ips[4]))
    started_again(container, ips, mac)
    eventually(lambda: reached(peer, ips[4]))


def test_it_has_what_it_had_while_the_store_is_away(lab: Lab, container: Container, peer: Container) -> None:
    ips, mac = begun(container)
    eventually(lambda: reached(peer, ips[4]))
    in_touch(lab)
    with store_away(lab):
        for _ in range(AGAIN):
            started_again(container, ips, mac)
            # What the store has not heard of has changed nothing for others.
            assert reached(peer, ips[4])
    in_touch(lab)
    assert reached(peer, *ips.values())


def test_an_idle_agent_killed_and_started_while_the_store_is_away_is_not_fenced_by_itself(
    lab: Lab, container: Container
) -> None:
    ips, mac = begun(container)
    in_touch(lab)
    node = lab.nodes[0]
    log = len(node.log.read_text())
    with store_away(lab):
        node.kill()
        node.start()
        assert node.namespace.pings(ips[4])
        started_again(container, ips, mac)
        assert not said_fenced(node.log.read_text()[log:])
    eventually(lambda: node.ask("status")["problem"] == "", within=PATIENCE / 2)
    with node.container() as another:
        assert another.add(NETWORK).exit == 0
        another.delete(NETWORK)
    assert not said_fenced(node.log.read_text()[log:])


def said_fenced(log: str) -> bool:
    return "another agent" in log
