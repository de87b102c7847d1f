"""Real etcd members on loopback, for tests: started, paused, killed, and gone with the test process.

with Cluster(directory, size=3) as cluster:
    cluster.members[0].pause()
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.patience import PATIENCE

ATTEMPTS = 3
"""Somebody else may take a port between our looking for a free one and etcd's use of it."""


DIRECTORY = "moorage-etcd-"
"""Prefix of data directories; the pid of the test process follows."""


class Member:
    """One etcd process. Its data outlive it until the cluster is stopped."""

    def __init__(self, name: str, directory: Path, client_port: int, peer_port: int, host: str) -> None:
        self.name = name
        self.host = host
        self.client_port = client_port
        self.peer_port = peer_port
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.client_port}"

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self.peer_port}"

    def start(self, scheme: str, initial: str, arguments: Sequence[str]) -> None:
        client_url = f"{scheme}://{self.address}"
        # setpriv: the kernel kills it when the tests are killed.
        command = [
            *("setpriv", "--pdeathsig", "KILL", "etcd", "--name", self.name),
            *("--data-dir", str(self.directory / self.name), "--logger", "zap", "--log-level", "error"),
            *("--listen-client-urls", client_url, "--advertise-client-urls", client_url),
            *("--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", initial),
            *arguments,
        ]
        with (self.directory / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def log(self) -> str:
        return (self.directory / f"{self.name}.log").read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        # It goes on for a moment after that.
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Cluster:
    """``size`` members that know each other."""

    def __init__(
        self,
        size: int = 1,
        *,
        host: str = "127.0.0.1",
        tls: Sequence[str] = (),
        arguments: Sequence[str] = (),
        ctl: Sequence[str] = (),
        heartbeat: int = 20,
    ) -> None:
        """tls: etcd's arguments for it. ctl: etcdctl's. heartbeat: milliseconds; an election takes ten."""
        self.size = size
        self.members: list[Member] = []
        self._host = host
        self._scheme = "https" if tls else "http"
        timing = ["--heartbeat-interval", str(heartbeat), "--election-timeout", str(heartbeat * 10)]
        self._arguments = [*timing, *tls, *arguments]
        self._ctl = ctl
        self._directory: Path | None = None

    def __enter__(self) -> Cluster:
        for attempt in range(ATTEMPTS):
            try:
                self._start()
                return self
            except BaseException:
                self.stop()
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def url(self, **options: object) -> str:
        query = "&".join(f"{name.replace('_', '-')}={value}" for name, value in options.items())
        return f"etcd://{','.join(member.address for member in self.members)}{'?' * bool(query)}{query}"

    def ctl(self, *arguments: str, member: Member | None = None) -> str:
        """Run etcdctl against one member, the first one that runs by default."""
        chosen = member or next(member for member in self.members if member.running)
        done = subprocess.run(
            ["etcdctl", "--endpoints", f"{self._scheme}://{chosen.address}", *self._ctl, *arguments],
            env={**os.environ, "ETCDCTL_API": "3"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def leader(self) -> Member:
        """Who leads, as soon as somebody does."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for member in self.members:
                with contextlib.suppress(AssertionError):
                    (status,) = json.loads(self.ctl("endpoint", "status", "-w", "json", member=member))
                    if status["Status"]["leader"] == status["Status"]["header"]["member_id"]:
                        return member
        raise AssertionError("no member leads")

    def restart(self, member: Member) -> None:
        """Start a member that was killed, with the data it had."""
        member.start(self._scheme, self._initial(), self._arguments)

    def stop(self) -> None:
        for member in self.members:
            member.kill()
        self.members = []
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _start(self) -> None:
        remove_what_the_killed_left()
        self._directory = Path(tempfile.mkdtemp(prefix=f"{DIRECTORY}{os.getpid()}-"))
        ports = free_ports(2 * self.size)
        self.members = [
            Member(f"m{i}", self._directory, ports[2 * i], ports[2 * i + 1], self._host)
            for i in range(self.size)
        ]
        for member in self.members:
            self.restart(member)
        self.await_leader()

    def _initial(self) -> str:
        return ",".join(f"{member.name}={member.peer_url}" for member in self.members)

    def await_leader(self) -> None:
        """Until every member answers a linearizable read."""
        deadline = time.monotonic() + PATIENCE
        while True:
            for member in self.members:
                assert member.running, member.log()
            try:
                for member in self.members:
                    # etcdctl waits for a second after a refused connection.
                    assert accepts(member.host, member.client_port), f"{member.name} does not listen"
                for member in self.members:
                    self.ctl("get", "started", member=member)
                return
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def remove_what_the_killed_left() -> None:
    """Data of test processes that had no chance to remove them."""
    for path in Path(tempfile.gettempdir()).glob(f"{DIRECTORY}*"):
        pid = path.name.removeprefix(DIRECTORY).split("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)


def accepts(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=1).close()
    except OSError:
        return False
    return True


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
