"""Who is measured: our plugin with its agent, and the reference plugins, each in a node namespace of its own.

Both are called alike: six environment variables, the configuration of the network on stdin, containers in
namespaces that were made before.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.launch import Call
from moorage.lab import LabNode, Namespace, unique
from moorage.lab.container import HOOK, PATH
from moorage.lab.namespace import NAMESPACES

REFERENCE = Path("/usr/lib/cni/ptp")
"""Debian's containernetworking-plugins; it executes ``host-local`` from the same directory."""

NETWORK = "bench"
IPV4, IPV6 = "10.64.0.0/16", "fd64::/64"
IFNAME = "eth0"


@dataclass(frozen=True, slots=True)
class Container:
    """A container id, and the namespace it has."""

    id: str
    netns: Path

    def environment(self, command: str, plugins: Path) -> dict[str, str]:
        """The six variables that Mesos sets, and no other."""
        return {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.id,
            "CNI_IFNAME": IFNAME,
            "CNI_NETNS": str(self.netns),
            "CNI_PATH": str(plugins),
            "PATH": PATH,
        }


@dataclass(frozen=True, slots=True)
class Subject:
    """A plugin, the node's namespace it runs in, and the configuration that it reads from stdin."""

    plugin: Path
    node: Path
    config: Path

    def call(self, command: str, container: Container) -> Call:
        return Call(self.plugin, container.environment(command, self.plugin.parent), self.config)


@contextlib.contextmanager
def containers(count: int) -> Iterator[list[Container]]:
    """New namespaces, made and deleted by one process each time."""
    names = [unique("bench") for _ in range(count)]
    try:
        _ip("", *(f"netns add {name}" for name in names))
        yield [Container(str(uuid.uuid4()), NAMESPACES / name) for name in names]
    finally:
        present = [name for name in names if (NAMESPACES / name).exists()]
        _ip("-force", *(f"netns delete {name}" for name in present))


def _ip(option: str, *commands: str) -> None:
    options = [option] if option else []
    with tempfile.TemporaryFile() as batch:
        batch.write("\n".join(commands).encode())
        batch.seek(0)
        subprocess.run(["ip", *options, "-batch", "-"], stdin=batch, check=True)


@contextlib.contextmanager
def our_node(*pools: str, agent: Sequence[str] = ()) -> Iterator[LabNode]:
    """A node with a running agent and one network. agent: another command line that runs it."""
    node = LabNode("bench", agent=agent) if agent else LabNode("bench")
    with node:
        node.start()
        node.cli("network", "create", NETWORK, *(part for pool in pools for part in ("--pool", pool)))
        write_config(node)
        yield node


def write_config(node: LabNode) -> None:
    """Where ``subject_of`` expects it."""
    (node.directory / "config.json").write_bytes(config_of(node))


def config_of(node: LabNode) -> bytes:
    """The configuration as the Mesos agent writes it: sorted keys, no white space."""
    return _compact(_mesos({"socket": str(node.socket), "type": HOOK.name}))


def subject_of(node: LabNode) -> Subject:
    """The hook on that node."""
    return Subject(HOOK, node.namespace.path, node.directory / "config.json")


@contextlib.contextmanager
def reference() -> Iterator[Subject]:
    """``ptp`` with ``host-local``, without masquerading, which would only take longer."""
    if not REFERENCE.exists():
        raise FileNotFoundError(f"{REFERENCE} is missing; install the package containernetworking-plugins")
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mrg-")))
        node = stack.enter_context(Namespace(unique("bench-peer")))
        node.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        ipam = {
            "type": "host-local",
            "subnet": IPV4,
            "dataDir": str(directory / "addresses"),
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        config = directory / "config.json"
        config.write_bytes(_compact(_mesos({"type": REFERENCE.name, "ipMasq": False, "ipam": ipam})))
        yield Subject(REFERENCE, node.path, config)


def _mesos(config: dict[str, Any]) -> dict[str, Any]:
    return {"args": {"org.apache.mesos": {"network_info": {"name": NETWORK}}}, "name": NETWORK, **config}


def _compact(config: dict[str, Any]) -> bytes:
    return json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
