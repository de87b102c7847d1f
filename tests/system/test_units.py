"""What a unit of packaging/ leaves its program is what the program needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from moorage.lab import LabNode
from moorage.lab.node import AGENT
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel

UNIT = Path(__file__).parents[2] / "packaging" / "moorage-agent.service"


def capabilities() -> list[str]:
    """Those of the agent's unit, as setpriv calls them."""
    found = re.search(r"^CapabilityBoundingSet=(.+)$", UNIT.read_text(), re.MULTILINE)
    assert found
    return [name.removeprefix("CAP_").lower() for name in found[1].split()]


@pytest.fixture
def confined() -> Iterator[LabNode]:
    """A node whose agent has the capabilities that its unit names, and no other."""
    bounds = ",".join(["-all", *(f"+{name}" for name in capabilities())])
    command = ("setpriv", "--no-new-privs", f"--bounding-set={bounds}", *AGENT)
    with LabNode("unit", agent=command) as node:
        node.start()
        node.cli(
            "network", "create", "web", "--pool", "10.64.0.0/16", "--pool", "fd64::/64", "--fabric", "vxlan"
        )
        yield node


def test_an_agent_with_the_rights_of_its_unit_attaches_mends_and_detaches(confined: LabNode) -> None:
    with confined.container() as container:
        assert container.add("web").exit == 0

        def address() -> str:
            return container.namespace.run("ip", "-4", "-o", "address", "show", "dev", "eth0").stdout

        before = address()
        container.namespace.run("ip", "-4", "address", "flush", "dev", "eth0")
        eventually(lambda: address() == before)
        assert container.delete("web").exit == 0
    eventually(lambda: confined.ask("endpoint", "list") == [])
    assert "failed" not in confined.log.read_text()


def test_an_agent_with_the_rights_of_its_unit_opens_dockers_chain(confined: LabNode) -> None:
    confined.namespace.run(
        "sh",
        "-ec",
        "iptables-nft -N DOCKER-USER; iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -j DOCKER-USER",
    )
    with confined.container() as container:
        container.add("web")
        eventually(lambda: confined.ask("status")["docker_user"]["chains"])
        container.delete("web")
    eventually(lambda: not confined.ask("status")["docker_user"]["chains"])
