"""A node with Docker, started before the agent as at boot: containers pass its policy, and no other firewall's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from isolator.policy.docker_user import COMMENT
from moorage.lab import Container, LabNode
from tests.system.conftest import eventually
from tests.system.docker import IPV6, Dockerd

pytestmark = pytest.mark.kernel

PROGRAMS = {4: "iptables-nft", 6: "ip6tables-nft"}
FORWARD4 = "chain FORWARD of table ip filter"
FORWARD6 = "chain FORWARD of table ip6 filter"


class Host:
    """A node, Docker on it, and two containers of moorage's that share a netgroup."""

    def __init__(self, node: LabNode, docker: Dockerd) -> None:
        self.node = node
        self.docker = docker
        self.containers: list[Container] = []

    @contextmanager
    def two_containers(self) -> Iterator[tuple[Container, dict[int, str]]]:
        """One container, and the addresses of the other."""
        with ExitStack() as stack:
            self.containers = [stack.enter_context(self.node.container(name)) for name in ("a", "b")]
            ips = [container.add("web").ips for container in self.containers]
            yield self.containers[0], ips[1]

    def rules(self, chain: str = "DOCKER-USER", family: int = 4) -> list[str]:
        done = self.node.namespace.run(PROGRAMS[family], "-S", chain, check=False)
        return done.stdout.splitlines()

    def ours(self, family: int = 4) -> list[str]:
        """As iptables prints them, less the comment."""
        comment = f' -m comment --comment "{COMMENT}"'
        return [rule.replace(comment, "") for rule in self.rules(family=family) if comment in rule]

    def status(self) -> dict[str, Any]:
        return dict(self.node.ask("status"))

    def told(self) -> list[str]:
        return [row["chain"] for row in self.status()["firewalls"]]

    def sh(self, command: str) -> None:
        self.node.namespace.run("sh", "-ec", command)


ACCEPTS = ["-A DOCKER-USER -i mrg+ -j ACCEPT", "-A DOCKER-USER -o mrg+ -j ACCEPT"]


def guards(bridge: str) -> list[str]:
    return [f"-A DOCKER-USER {option} {bridge} -j RETURN" for option in ("-i", "-o")]


@pytest.fixture
def host() -> Iterator[Host]:
    """Version 20.10 has no DOCKER-USER for IPv6."""
    with LabNode("docker") as node, Dockerd(node, **IPV6) as docker:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16", "--pool", "fd64::/64")
        yield Host(node, docker)


def test_containers_pass_dockers_policy_while_there_are_any(host: Host) -> None:
    before = host.rules()
    for family in PROGRAMS:
        assert "-P FORWARD DROP" in host.rules("FORWARD", family)
    eventually(lambda: host.told() == [FORWARD6])

    with host.two_containers() as (a, ips):
        eventually(lambda: a.namespace.pings(ips[4], wait=1))
        assert host.ours() == [*guards("docker0"), *ACCEPTS]
        assert host.rules()[-1] == "-A DOCKER-USER -j RETURN", "nothing behind it is reached"
        assert "let pass by rules in DOCKER-USER" in host.node.log.read_text()

        # Where Docker has no such chain it is told and not made; later versions have it in both families.
        assert not a.namespace.pings(ips[6], wait=1)
        assert host.status()["firewalls"][0]["commands"][0] == "ip6tables-nft -I FORWARD -i mrg+ -j ACCEPT"
        host.sh("ip6tables-nft -N DOCKER-USER; ip6tables-nft -I FORWARD -j DOCKER-USER")
        eventually(lambda: a.namespace.pings(ips[6], wait=1))
        assert host.ours(6) == [*guards("docker0"), *ACCEPTS]
        eventually(lambda: (host.told(), len(host.status()["docker_user"]["chains"])) == ([], 2))
        assert host.node.cli("doctor").returncode == 0

        # What becomes of them when Docker starts again, somebody empties the chain, or there is another bridge.
        host.docker.stop()
        host.docker.start()
        assert a.namespace.pings(ips[4])
        host.sh("iptables-nft -F DOCKER-USER")
        eventually(lambda: a.namespace.pings(ips[4], wait=1))
        host.docker.docker("network", "create", "-o", "com.docker.network.bridge.name=other0", "other")
        eventually(lambda: guards("other0")[0] in host.ours())
        host.docker.docker("network", "rm", "other")
        eventually(lambda: host.ours() == [*guards("docker0"), *ACCEPTS])

        # Saved and restored by whoever keeps rules over a boot, they are still known as ours.
        saved = host.node.directory / "saved"
        host.sh(f"iptables-nft-save > {saved}; iptables-nft-restore < {saved}")
        assert host.ours() == [*guards("docker0"), *ACCEPTS]

        # They outlive the agent, as containers do.
        host.node.stop()
        assert a.namespace.pings(ips[4])
        host.node.start()
        for container in host.containers:
            container.delete("web")
    eventually(lambda: (host.rules(), host.rules(family=6)) == (before, ["-N DOCKER-USER"]))
    eventually(lambda: "the node has no containers" in host.node.log.read_text())


def test_an_administrators_drop_stands_and_is_told(host: Host) -> None:
    with host.two_containers() as (a, ips):
        eventually(lambda: a.namespace.pings(ips[4], wait=1))
        host.sh("iptables-nft -I DOCKER-USER -i mrg+ -j DROP")
        eventually(lambda: sorted(host.told()) == [FORWARD4, FORWARD6])
        assert not a.namespace.pings(ips[4], wait=1)
        why = {row["chain"]: row["why"] for row in host.status()["firewalls"]}
        assert why[FORWARD4] == "a rule in it would drop it"
        assert host.ours() == []
        assert "another firewall drops containers' traffic" in host.node.log.read_text()
        assert host.node.cli("doctor", check=False).returncode == 1
        host.sh("iptables-nft -D DOCKER-USER -i mrg+ -j DROP")
        eventually(lambda: a.namespace.pings(ips[4], wait=1))
        eventually(lambda: host.told() == [FORWARD6])
        assert "another firewall lets containers' traffic pass again" in host.node.log.read_text()


@pytest.mark.slow
def test_the_administrator_may_keep_the_chain_to_himself(host: Host) -> None:
    with host.two_containers() as (a, ips):
        eventually(lambda: a.namespace.pings(ips[4], wait=1))
        host.node.stop()
        host.node.start(MOORAGE_MANAGE_DOCKER_USER="false")
        eventually(lambda: len(host.told()) == 2)
        assert host.ours() == []
        assert not a.namespace.pings(ips[4], wait=1)
        assert "manage_docker_user is false" in host.node.log.read_text()


@pytest.mark.slow
def test_docker_leaves_the_policy_alone_where_the_node_forwarded_before() -> None:
    """The first cure (packaging/moorage-sysctl.conf). Of IPv4: version 20.10 sets that of IPv6 whatever was before."""
    with LabNode("docker") as node:
        node.namespace.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        with Dockerd(node, **IPV6):
            policies = [
                node.namespace.run(program, "-S", "FORWARD").stdout.splitlines()[0]
                for program in PROGRAMS.values()
            ]
            assert policies == ["-P FORWARD ACCEPT", "-P FORWARD DROP"]
