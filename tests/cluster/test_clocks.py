"""Two nodes whose clocks are an hour wrong, one either way, are asked for everything that is asked of nodes.

``CLOCKS=1`` has both of them asked, and for all; tests/ipam/test_intents.py has that in one process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moorage.lab import Container, Lab, LabNode
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]

SKEWED = Path(__file__).with_name("skewed_agent.py")
SKEWS = {"n1": -3600, "n2": 3600}
NETWORK = "web"
ALL = "CLOCKS" in os.environ


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=0) as lab, contextlib.ExitStack() as stack:
        for number, (name, skew) in enumerate(SKEWS.items(), 1):
            agent = (sys.executable, str(SKEWED), "agent")
            node = LabNode(name, agent=agent, store=lab.etcd.url, switch=lab.switch, host=number)
            lab.nodes.append(stack.enter_context(node))
            node.start(SKEW=str(skew))
        lab.nodes[0].cli(
            "network", "create", NETWORK, "--pool", "10.64.0.0/24", "--block-size", "28", "--warm", "2",
            "--allow-static", "all", "--allow-netgroup", "*", "--fabric", "vxlan",
        )  # fmt: skip
        yield lab
        lab.nodes.clear()


@pytest.fixture(params=[1, 0][: 1 + ALL], ids=lambda number: f"n{number + 1} is asked")
def pair(lab: Lab, request: pytest.FixtureRequest) -> tuple[LabNode, LabNode]:
    """The node that is asked, and one whose clock is two hours from its."""
    return lab.nodes[request.param], lab.nodes[1 - request.param]


@pytest.fixture
def container(pair: tuple[LabNode, LabNode]) -> Iterator[tuple[Container, str]]:
    """A container of the node that is asked, and its address, which the store knows."""
    node = pair[0]
    with node.container() as container:
        answer = container.add(NETWORK)
        assert answer.exit == 0, (answer, node.log.read_text()[-3000:])
        ip = answer.ips[4]
        eventually(lambda: node.ask("status")["outbox"] == 0)
        yield container, ip
        container.delete(NETWORK)


def test_check_labels_trace_verify_and_release_are_answered(
    pair: tuple[LabNode, LabNode], container: tuple[Container, str]
) -> None:
    node, other = pair
    one, ip = container
    other.cli("endpoint", "set-netgroups", one.id, "blue")
    eventually(lambda: other.ask("ip", "show", ip)["netgroups"] == ["blue"])
    with other.container() as peer:
        peer_ip = peer.add(NETWORK).ips[4]
        traced = other.cli("endpoint", "trace", peer_ip, ip, check=False)
        peer.delete(NETWORK)
    assert "did not answer" not in traced.stdout + traced.stderr
    eventually(lambda: "did not answer" not in other.cli("ip", "check", check=False).stdout)
    # No process is in its namespace.
    assert f"released by node {node.name}" in other.cli("ip", "release", ip).stdout
    again = one.add(NETWORK).ips[4]
    eventually(lambda: node.ask("status")["outbox"] == 0)
    assert f"released by node {node.name}" in other.cli("ip", "release", again, "--force").stdout


@pytest.mark.skipif(not ALL, reason="takes long; wanted with CLOCKS=1")
def test_a_warm_address_is_given_back_to_the_node_that_names_it(pair: tuple[LabNode, LabNode]) -> None:
    node, other = pair
    eventually(lambda: warm(node))
    with other.container() as container:
        answer = container.add(NETWORK, labels={"moorage.ip": warm(node)[-1]})
        assert answer.exit == 0, answer
        container.delete(NETWORK)


def warm(node: LabNode) -> list[str]:
    rows = node.ask("ip", "list", "--node", node.name, "--state", "warm")
    return [str(row["address"]) for row in rows if "." in row["address"]]


@pytest.mark.skipif(not ALL, reason="takes long; wanted with CLOCKS=1")
def test_a_drain_and_the_return_of_a_block_are_answered(
    pair: tuple[LabNode, LabNode], container: tuple[Container, str]
) -> None:
    node, other = pair
    _, ip = container
    (block,) = [row["block"] for row in other.ask("block", "list", "--node", node.name)][:1]
    refused = other.cli("block", "release", block, check=False)
    assert ip in refused.stderr, "it is in use, says the node"
    other.cli("node", "drain", node.name)
    other.cli("node", "drain", node.name, "--undo")
