"""A container of the lab: a namespace that an engine has made, and the engine's calls of the hook.

The hook is executed exactly as a Mesos agent does it (recorded: tests/data/mesos/cni-calls.json): six
environment variables, the config on stdin from a regular file, NetworkInfo under ``org.apache.mesos``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moorage.lab.namespace import Namespace, unique

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOOK = Path(sys.executable).parent / "moorage-cni"
"""The hook as it is installed beside this interpreter."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the hook answered: its exit code and what it printed."""

    exit: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout as JSON; empty if there is none."""
        return dict(json.loads(self.stdout)) if self.stdout.strip() else {}

    @property
    def ips(self) -> dict[int, str]:
        """family -> address, without prefix length."""
        return {
            family: self.json[field]["ip"].split("/")[0]
            for family, field in ((4, "ip4"), (6, "ip6"))
            if field in self.json
        }


class Container:
    """One container: id, namespace, and where its agent's socket is. A context manager for the namespace.

    id, namespace: made up unless given.
    """

    def __init__(
        self,
        socket: Path,
        name: str = "container",
        *,
        id: str | None = None,
        namespace: Namespace | None = None,
    ) -> None:
        self.id = id or str(uuid.uuid4())
        self.namespace = namespace or Namespace(unique(name))
        self._socket = socket

    def __enter__(self) -> Container:
        self.namespace.create()
        return self

    def __exit__(self, *_: object) -> None:
        self.namespace.delete()

    def config(
        self, network: str, labels: Mapping[str, str] | None = None, **network_info: Any
    ) -> dict[str, Any]:
        """The config as Mesos passes it on; ``network_info`` are more fields of NetworkInfo."""
        info: dict[str, Any] = {"name": network, **network_info}
        if labels:
            info["labels"] = {"labels": [{"key": k, "value": v} for k, v in labels.items()]}
        return {
            "args": {"org.apache.mesos": {"network_info": info}},
            "name": network,
            "socket": str(self._socket),
            "type": "moorage-cni",
        }

    def environment(self, command: str, ifname: str) -> dict[str, str]:
        """The six variables that Mesos sets, and no other."""
        return {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.id,
            "CNI_IFNAME": ifname,
            "CNI_NETNS": str(self.namespace.path),
            "CNI_PATH": str(HOOK.parent),
            "PATH": PATH,
        }

    def start_call(
        self, command: str, config: Mapping[str, Any] | bytes, ifname: str = "eth0"
    ) -> subprocess.Popen[str]:
        """Start the hook; collect its answer with ``finish_call``."""
        raw = config if isinstance(config, bytes) else _compact(config)
        with tempfile.TemporaryFile() as stdin:
            stdin.write(raw)
            stdin.seek(0)
            return subprocess.Popen(
                [str(HOOK)],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self.environment(command, ifname),
                text=True,
            )

    @staticmethod
    def finish_call(process: subprocess.Popen[str], timeout: float = 60.0) -> Answer:
        """Wait for a started hook."""
        stdout, stderr = process.communicate(timeout=timeout)
        return Answer(process.returncode, stdout, stderr)

    def call(self, command: str, config: Mapping[str, Any] | bytes, ifname: str = "eth0") -> Answer:
        """Run the hook and wait for its answer."""
        return self.finish_call(self.start_call(command, config, ifname))

    def add(self, network: str, ifname: str = "eth0", **asked: Any) -> Answer:
        """ADD; ``asked`` goes to ``config``."""
        return self.call("ADD", self.config(network, **asked), ifname)

    def status(self, network: str) -> Answer:
        """STATUS: whether an ADD would work now. Asked with the first version of CNI that has it."""
        return self.call("STATUS", {**self.config(network), "cniVersion": "1.1.0"})

    def delete(self, network: str, ifname: str = "eth0", **asked: Any) -> Answer:
        """DEL, with the same config as ADD."""
        return self.call("DEL", self.config(network, **asked), ifname)


def _compact(config: Mapping[str, Any]) -> bytes:
    """As Mesos writes it: sorted keys, no white space, no final newline."""
    return json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
