"""Debian's dockerd in a node's namespace: all its files are its own, but for cgroups' mounts it sees nobody's.

`scripts/setup --test` has unpacked it into .venv. It runs no containers here; it writes the rules that it writes. What
it calls iptables is the nft kind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from moorage.lab import LabNode, unique
from moorage.lab.process import Daemon
from moorage.lab.resource import Resource
from tests.system.conftest import eventually

ROOT = Path(sys.prefix, "docker")
ENDS_WITHIN = 60.0
IPV6 = {"ip6tables": True, "experimental": True, "ipv6": True, "fixed-cidr-v6": "fd12:3456::/64"}
"""What has version 20.10 write rules for IPv6, which later ones do by themselves."""

PRIVATE = 'mount -t tmpfs none /run; exec dockerd "$@"'


class Dockerd(Resource):
    """See the module's docstring. It serves, and has written its rules, as soon as it is created."""

    def __init__(self, node: LabNode, **configuration: object) -> None:
        self._node = node
        # A short path: unix sockets have room for 107 bytes.
        self._directory = Path(tempfile.gettempdir(), unique("d"))
        self._daemon = Daemon(self._directory / "pid")
        self._configuration = configuration
        self._socket = f"unix://{self._directory}/docker.sock"

    def create(self) -> None:
        programs = self._directory / "bin"
        programs.mkdir(parents=True)
        for name in ("iptables", "ip6tables"):
            (programs / name).symlink_to(shutil.which(f"{name}-nft") or f"{name}-nft")
        settings = {"deprecated-key-path": str(self._directory / "key.json"), **self._configuration}
        (self._directory / "daemon.json").write_text(json.dumps(settings))
        self.start()

    def delete(self) -> None:
        if self._daemon.is_running:
            self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self) -> None:
        """Start it; returns when it serves."""
        command = (
            "unshare", "--mount", "--propagation", "slave", "sh", "-ec", PRIVATE, "dockerd",
            "--config-file", str(self._directory / "daemon.json"),
            "--data-root", str(self._directory / "data"),
            "--exec-root", str(self._directory / "exec"),
            "--pidfile", str(self._directory / "docker.pid"),
            "--storage-driver", "vfs",
            "--host", self._socket,
        )  # fmt: skip
        path = f"{self._directory}/bin:{ROOT}/usr/sbin:{ROOT}/usr/bin:{os.environ['PATH']}"
        self._daemon.start(
            self._node.namespace.command(*command), self._directory / "log", {**os.environ, "PATH": path}
        )
        eventually(lambda: self.docker("version", check=False).returncode == 0 or not self._daemon.is_running)
        assert self._daemon.is_running, (self._directory / "log").read_text()

    def stop(self) -> None:
        """SIGTERM, and wait until it is gone, with its containerd."""
        self._daemon.signal(signal.SIGTERM)
        self._daemon.wait(ENDS_WITHIN)

    def docker(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``docker ARGUMENTS``."""
        return subprocess.run(
            [ROOT / "usr/bin/docker", "--host", self._socket, *arguments],
            check=check,
            capture_output=True,
            text=True,
        )
