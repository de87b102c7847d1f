"""moorage-cni in a chain of plugins, which are called as libcni calls them: each is given the result so far."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from moorage.lab import Container, LabNode
from moorage.lab.container import HOOK
from tests.system.conftest import assert_nothing_left

pytestmark = pytest.mark.kernel

DEBIANS_PLUGINS = Path("/usr/lib/cni")
LIMITS = {"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 8_000_000, "egressBurst": 800_000}


class Chain:
    """A list of plugins for one container; each version of CNI that has lists."""

    def __init__(
        self, node: LabNode, container: Container, version: str, *plugins: Mapping[str, Any]
    ) -> None:
        self.result: dict[str, Any] | None = None
        self._node = node
        self._container = container
        self._plugins = plugins
        self._own = {"cniVersion": version, "name": "web", "socket": str(node.socket)}

    def call(self, command: str, plugins: Sequence[Mapping[str, Any]] | None = None) -> None:
        """ADD in the list's order, CHECK in it too, DEL in the reverse one. Raises AssertionError with the answer."""
        for plugin in self._plugins if plugins is None else plugins:
            config = {**plugin, **self._own}
            if self.result is not None:
                config["prevResult"] = self.result
            name = plugin["type"]
            program = HOOK if name == "moorage-cni" else DEBIANS_PLUGINS / name
            done = self._node.namespace.run(
                str(program),
                stdin=json.dumps(config),
                check=False,
                environment=self._container.environment(command, "eth0"),
            )
            assert done.returncode == 0, (name, done.stdout, done.stderr)
            if command == "ADD":
                self.result = json.loads(done.stdout)

    def delete(self) -> None:
        self.call("DEL", self._plugins[::-1])


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0"])
def test_a_chain_of_each_version_is_added_checked_and_taken_off(node: LabNode, version: str) -> None:
    with node.container() as container:
        chain = Chain(
            node,
            container,
            version,
            {"type": "loopback"},
            {"type": "moorage-cni"},
            {"type": "bandwidth", **LIMITS},
            {"type": "tuning", "sysctl": {"net.ipv4.ip_default_ttl": "77"}},
        )
        chain.call("ADD")
        assert chain.result is not None
        [endpoint] = node.ask("endpoint", "list")
        names = [interface["name"] for interface in chain.result["interfaces"]]
        assert names[:3] == ["lo", endpoint["host_ifname"], "eth0"]
        at = {ip["address"].split("/")[0]: names[ip["interface"]] for ip in chain.result["ips"]}
        assert at == {"127.0.0.1": "lo", "::1": "lo", **dict.fromkeys(endpoint["addresses"], "eth0")}
        assert node.namespace.pings(endpoint["addresses"][0])
        assert "tbf" in node.namespace.run("tc", "qdisc", "show", "dev", endpoint["host_ifname"]).stdout
        if version >= "0.4":
            chain.call("CHECK")
        chain.delete()
        assert_nothing_left(node)


def test_a_chain_of_the_oldest_version_ends_with_our_addresses(node: LabNode) -> None:
    with node.container() as container:
        chain = Chain(node, container, "0.2.0", {"type": "loopback"}, {"type": "moorage-cni"})
        chain.call("ADD")
        assert chain.result is not None
        [endpoint] = node.ask("endpoint", "list")
        assert [chain.result[f"ip{family}"]["ip"].split("/")[0] for family in (4, 6)] == endpoint["addresses"]
        chain.delete()
        assert_nothing_left(node)


def test_an_interface_that_is_there_already_is_no_reason_to_take_it_over(node: LabNode) -> None:
    with node.container() as container:
        container.namespace.run("ip", "link", "add", "eth0", "type", "bridge")
        chain = Chain(node, container, "1.0.0", {"type": "moorage-cni"})
        with pytest.raises(AssertionError, match="already has an interface eth0"):
            chain.call("ADD")
        assert "bridge" in container.namespace.run("ip", "-d", "link", "show", "eth0").stdout
        assert_nothing_left(node)
        chain.delete()
        assert container.namespace.run("ip", "link", "show", "eth0").returncode == 0
