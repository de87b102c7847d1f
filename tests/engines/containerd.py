"""Debian's containerd, private to a test: on a node of the lab, with files, sockets and plugins of its own.

    machine            mount namespace of the test's containerd, its shims and ctr
    /etc               etc/      alternatives: the machine's, iptables is in there
                                 cni/net.d: a directory for each call of ctr, so that each may have a network of its own
    /opt               opt/      cni/bin: our hook, as it is installed, and Debian's plugins
    /run, /var/lib     of their own too: the shims' sockets, runc's state, what libcni keeps of results

``ctr`` has no option for where its CNI files are, so they are put where it looks, where only it sees them. All runs
in the node's network namespace. What containerd calls cgroups is below one of this containerd alone.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moorage.lab import LabNode, unique
from moorage.lab.container import HOOK
from moorage.lab.process import Daemon, ProcessId, end, opened
from moorage.lab.resource import Resource
from tests.system.conftest import eventually

DEBIANS_PLUGINS = Path("/usr/lib/cni")
BUSYBOX = Path("/bin/busybox")
CGROUPS = Path("/sys/fs/cgroup")
NAMESPACE = "default"
"""containerd's own namespace, which it puts before the ids that it tells CNI plugins."""

OWN = (
    "etc/cni/net.d",
    "etc/alternatives",
    "opt/cni/bin",
    "run/netns",
    "var/lib",
    "conf",
    "rootfs/bin",
    "rootfs/www",
)
MOUNTS = """
mount --bind /etc/alternatives "$0/etc/alternatives"
for own in etc opt run var/lib; do mount --rbind "$0/$own" "/$own"; done
exec containerd --config "$0/config.toml" --root "$0/root" --state "$0/state" --address "$0/containerd.sock"
"""
CONFIG = """
version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.overlayfs",
    "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.tracing"]
"""


class Containerd(Resource):
    """See the module's docstring. It runs as soon as it is created."""

    def __init__(self, node: LabNode) -> None:
        self.node = node
        # A short path: unix sockets have room for 107 bytes.
        self.directory = Path(tempfile.gettempdir(), unique("c"))
        self.daemon = Daemon(self.directory / "containerd.pid")
        self._cgroup = unique("cgroup")
        self._started: list[subprocess.Popen[str]] = []

    def create(self) -> None:
        for own in OWN:
            (self.directory / own).mkdir(mode=0o755, parents=True)
        plugins = self.directory / "opt" / "cni" / "bin"
        for plugin in (HOOK, *DEBIANS_PLUGINS.iterdir()):
            (plugins / plugin.name).symlink_to(plugin)
        shutil.copy(BUSYBOX, self.rootfs / "bin")
        for applet in ("sleep", "ping", "httpd", "cat"):
            (self.rootfs / "bin" / applet).symlink_to("busybox")
        (self.directory / "config.toml").write_text(CONFIG)
        self.start()

    def delete(self) -> None:
        self.daemon.kill()
        # Shims, and ctr if it was left.
        self.node.namespace.end_processes()
        self._end_containers()
        for ctr in self._started:
            ctr.wait(20)
            if ctr.stderr is not None:
                ctr.stderr.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        self._remove_cgroups()

    @property
    def results(self) -> list[Path]:
        """What libcni keeps of endpoints until their DEL."""
        return list(self.directory.glob("var/lib/cni/results/*"))

    @property
    def rootfs(self) -> Path:
        return self.directory / "rootfs"

    # -- the daemon

    def start(self) -> None:
        """Start it; returns when it answers."""
        unshared = ("unshare", "--mount", "--propagation", "slave", "sh", "-ec", MOUNTS, str(self.directory))
        self.daemon.start(self.node.namespace.command(*unshared), self.directory / "containerd.log")
        eventually(lambda: self.ctr("version", check=False).returncode == 0, within=20)

    def stop(self) -> None:
        """SIGTERM. Containers go on."""
        self.daemon.signal(signal.SIGTERM)
        self.daemon.wait(20)

    # -- ctr

    def ctr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``ctr ARGUMENTS`` and wait. Raises CalledProcessError unless told not to check."""
        return subprocess.run(
            self._command(self.directory / "conf", *arguments), check=check, capture_output=True, text=True
        )

    def _command(self, configurations: Path, *arguments: str) -> list[str]:
        inside = 'mount --bind "$0" /etc/cni/net.d; exec ctr --address "$@"'
        return [
            "nsenter", f"--mount=/proc/{self.daemon.pid}/ns/mnt", f"--net={self.node.namespace.path}",
            "unshare", "--mount", "--propagation", "slave",
            "sh", "-ec", inside, str(configurations),
            str(self.directory / "containerd.sock"), *arguments,
        ]  # fmt: skip

    def run(self, name: str, conflist: Mapping[str, Any], *command: str, detached: bool = False) -> Container:
        """``ctr run --cni``; in the foreground, where ctr itself sends the DEL in the end, unless detached.

        Returns when the container runs. Raises AssertionError with what ctr says if it does not.
        """
        configurations = self.directory / "conf" / name
        configurations.mkdir()
        (configurations / "10-net.conflist").write_text(json.dumps(conflist))
        how = ("--detach",) if detached else ("--rm",)
        started = subprocess.Popen(
            self._command(
                configurations, "run", *how, "--null-io", "--cni",
                "--cgroup", f"/{self._cgroup}/{name}",
                "--rootfs", str(self.rootfs), name, *(command or ("/bin/sleep", "1000")),
            ),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self._started.append(started)
        container = Container(self, name, started)
        if detached:
            _, said = started.communicate(timeout=60)
            assert started.returncode == 0, said
        else:
            eventually(lambda: container.is_running or started.poll() is not None, within=60)
            if not container.is_running:
                raise AssertionError(started.communicate()[1])
        return container

    # -- what is left

    def processes(self) -> Iterator[ProcessId]:
        """The first process of each container, as runc knows them, whether or not it runs."""
        for file in self.directory.glob("run/containerd/runc/*/*/state.json"):
            state = json.loads(file.read_text())
            found = ProcessId.of(state["init_process_pid"])
            if found is not None and found.started == state["init_process_start"]:
                yield found

    def _end_containers(self) -> None:
        for process in self.processes():
            with opened([process.pid]) as held:
                # Looked at again once it is held: the pid cannot pass to another process any more.
                end([held[process.pid]] if process.is_running else [])

    def _remove_cgroups(self) -> None:
        """A cgroup can be removed when its processes are gone, which they are some moments after they were killed."""
        deadline = time.monotonic() + 5
        for top in [*CGROUPS.glob(f"*/{self._cgroup}"), *CGROUPS.glob(self._cgroup)]:
            for group in sorted((top, *(p for p in top.rglob("*") if p.is_dir())), reverse=True):
                while True:
                    try:
                        group.rmdir()
                        break
                    except OSError:
                        if time.monotonic() > deadline:
                            raise
                        time.sleep(0.05)


class Container:
    """A container of containerd. ctr: the ``ctr run`` that waits for its end, unless it is detached."""

    def __init__(self, containerd: Containerd, name: str, ctr: subprocess.Popen[str]) -> None:
        self.name = name
        self.id = f"{NAMESPACE}-{name}"
        self.ctr = ctr
        self._containerd = containerd

    @property
    def is_running(self) -> bool:
        rows = self._containerd.ctr("tasks", "ls").stdout.splitlines()
        return any(row.split()[0] == self.name and "RUNNING" in row for row in rows)

    @property
    def pid(self) -> int:
        """Of its first process, as the machine numbers it."""
        rows = self._containerd.ctr("tasks", "ls").stdout.splitlines()
        return next(int(row.split()[1]) for row in rows if row.split()[0] == self.name)

    @property
    def shim(self) -> int:
        """The pid of the process between it and containerd."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[1])

    @property
    def ips(self) -> dict[int, str]:
        """family -> address, as moorage has it."""
        rows = self._containerd.node.ask("endpoint", "list")
        addresses = next(row["addresses"] for row in rows if row["container_id"] == self.id)
        return {6 if ":" in address else 4: address for address in addresses}

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run it inside, by ``ctr tasks exec``."""
        return self._containerd.ctr(
            "tasks", "exec", "--exec-id", unique("e"), self.name, *command, check=check
        )

    def pings(self, ip: str) -> bool:
        """Whether ``ip`` answers an echo request from inside."""
        return self.run("/bin/ping", "-c", "1", "-W", "2", ip, check=False).returncode == 0

    def kill(self) -> None:
        """kill -9 of what runs inside; a ctr that waits for that ends too."""
        self._containerd.ctr("tasks", "kill", "--signal", "SIGKILL", self.name)

    def end(self) -> None:
        """Kill it and wait until ctr has cleaned up, which sends the DEL."""
        self.kill()
        _, said = self.ctr.communicate(timeout=60)
        assert "network" not in said, said

    def remove(self) -> None:
        """What is done about a detached container: kill, then ``ctr tasks delete`` and ``ctr containers delete``."""
        self._containerd.ctr("tasks", "delete", "--force", self.name, check=False)
        self._containerd.ctr("containers", "delete", self.name)


def conflist(
    node: LabNode,
    name: str = "web",
    *,
    before: Sequence[Mapping[str, Any]] = (),
    after: Sequence[Mapping[str, Any]] = (),
    **ours: Any,
) -> dict[str, Any]:
    """A configuration with our plugin, and others of a chain around it. ours: more fields of our plugin's."""
    plugin = {"type": "moorage-cni", "socket": str(node.socket), **ours}
    return {"cniVersion": "1.0.0", "name": name, "plugins": [*before, plugin, *after]}
