"""`make lab-demo`: a cluster of three nodes inside this machine, with each fabric, in about a minute.

Everything is done with ``moorage lab``, as a user would; what is shown is that containers reach each other
across nodes by their own addresses, whatever happens to agents and to machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from moorage.lab import labs, names
from moorage.lab.namespace import NAMESPACES, Namespace
from moorage.lab.node import MOORAGE, with_source
from moorage.lab.process import ProcessId
from moorage.lab.standing import NETWORKS, StandingLab
from moorage.lab.ticks import Failed, eventually, expect, perform, show, step

FABRICS = ("vxlan", "hostgw")
NODES = ("n1", "n2", "n3")
MEGABYTES = 4
REACHED_WITHIN = 5.0
"""Seconds; every node knows of a change within one, on a machine that has time for it."""

SERVER = f"""# Gives {MEGABYTES} MB to whoever asks.
import socket, socketserver
class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = daemon_threads = True
class Give(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(bytes(range(256)) * 4096 * {MEGABYTES})
Server(("::", 9000), Give).serve_forever()
"""

FETCH = f"""
import socket, sys
link = socket.create_connection((sys.argv[1], 9000), timeout=10)
got = b"".join(iter(lambda: link.recv(1 << 20), b""))
sys.exit(got != bytes(range(256)) * 4096 * {MEGABYTES})
"""


@dataclass(frozen=True)
class Container:
    """One of the demo's: where it is, and how it is reached."""

    name: str
    node: str
    network: str
    addresses: tuple[str, ...]
    namespace: Namespace

    def reaches(self, other: Container) -> None:
        """Raises Failed unless ``other`` answers it at every address."""
        _answers(other, self.namespace, f"{self.name} on {self.node}")

    def fetches(self, other: Container) -> None:
        """Raises Failed unless everything that ``other`` serves arrives whole, by each of its addresses."""
        for ip in other.addresses:
            ended = self.namespace.run(sys.executable, "-c", FETCH, ip, check=False)
            expect(
                ended.returncode == 0,
                f"{self.name} on {self.node} did not get {MEGABYTES} MB of {other.name} at {ip}: "
                f"{ended.stderr[-300:]}",
            )


def main() -> int:
    """Run the demo; 0 if every step holds."""
    code = perform("sudo make lab-demo", _demo)
    if code == 0:
        print("\nThat was a cluster. Make one of your own: sudo .venv/bin/moorage lab up --nodes 3")
    return code


def _demo(stack: contextlib.ExitStack, made: list[Path]) -> None:
    """made: gets the path of every file and namespace that has to be gone afterwards."""
    labs.require_programs()
    for fabric in FABRICS:
        _on_fabric(fabric, stack, made)


def _on_fabric(fabric: str, stack: contextlib.ExitStack, made: list[Path]) -> None:
    name = f"show-{os.urandom(3).hex()}"
    print(f"\nmoorage lab: three nodes, a gateway and one etcd inside this machine, fabric {fabric}\n")
    stack.callback(labs.sweep, name)
    made.append(names.directory_of(name))
    with step(f"moorage lab up --nodes 3 --gateway --fabric {fabric}"):
        _lab(name, "up", "--nodes", "3", "--gateway", "--fabric", fabric)
    lab = labs.find(name)
    made += [machine.namespace.path for machine in lab.machines.values()]

    with step(
        "six containers, one of each network on every node: moorage lab run NODE --network NETWORK CMD"
    ):
        containers = [_run(name, node, network) for node in NODES for network in NETWORKS]
    made += [container.namespace.path for container in containers]
    show(f"$ moorage lab status --lab {name}", _lab(name, "status"))

    pairs = [pair for pair in permutations(containers, 2) if pair[0].network == pair[1].network]
    with step(
        f"each pings every other one of its network, IPv4 and IPv6: {len(pairs)} pairs, all across nodes"
    ):
        for one, other in pairs:
            one.reaches(other)
    with step(f"and gets {MEGABYTES} MB from it by TCP, IPv4 and IPv6"):
        for one, other in pairs:
            one.fetches(other)
    with step("the nodes themselves and the gateway reach every container"):
        for machine in lab.cluster.everyone:
            for container in containers:
                _answers(container, machine.namespace, machine.name)

    _agent_dies(name, containers)
    _machine_dies(name, containers)
    with step("moorage ip check finds nothing"):
        eventually(lambda: _is_clean(lab), "addresses, journals and kernels do not agree", within=30)
    _take_down(name)


def _agent_dies(name: str, containers: Sequence[Container]) -> None:
    """An agent is no part of the data path."""
    here, there = (next(c for c in containers if c.node == node) for node in ("n2", "n1"))
    with _without_loss(there, here), _without_loss(here, there):
        with step("moorage lab kill n2: its agent is dead, its containers answer and transfer all the same"):
            _lab(name, "kill", "n2")
            there.reaches(here)
            there.fetches(here)
        with step("moorage lab start n2: the next agent finds them again"):
            _lab(name, "start", "n2")
            here.fetches(there)
    print("    pings both ways all the while, none lost")


def _machine_dies(name: str, containers: Sequence[Container]) -> None:
    """What is on other nodes does not notice; what was on it is gone; what is started there anew is reached."""
    left = [container for container in containers if container.node != "n2"]
    with step("moorage lab kill n2 --power: the machine dies with its containers, the others go on"):
        _lab(name, "kill", "n2", "--power")
        expect(_containers(name) == {c.name for c in left}, "the dead node's containers are still listed")
        for one, other in permutations(left, 2):
            if one.network == other.network:
                one.reaches(other)
    with step("moorage lab start n2: a new container there reaches all, and is reached"):
        _lab(name, "start", "n2")
        late = _run(name, "n2", "blue")
        for other in left:
            if other.network == late.network:
                other.reaches(late)
                late.fetches(other)


def _take_down(name: str) -> None:
    """Nothing is left: asked of /proc and of the file system, not of the lab."""
    found = json.loads(_lab(name, "status", "-o", "json"))
    rows = [*found["nodes"], *found["etcd"], *found["containers"]]
    processes = [ProcessId.of(row["pid"]) for row in rows if row["pid"]]
    with step("moorage lab down: no process, namespace or file of it is left"):
        _lab(name, "down")
        running = [process.pid for process in processes if process is not None and process.is_running]
        expect(not running, f"processes are left: {running}")
        left = [str(path) for path in NAMESPACES.glob(f"mrg-{name}.*")]
        expect(not left, f"namespaces are left: {left}")
        expect(not names.directory_of(name).exists(), f"{names.directory_of(name)} is left")


@contextlib.contextmanager
def _without_loss(one: Container, other: Container) -> Iterator[None]:
    """``one`` pings ``other`` twenty times a second until the block ends, and every ping is answered."""
    ip = other.addresses[0]
    ping = one.namespace.start("ping", "-n", "-q", "-i", "0.05", ip, stdout=subprocess.PIPE)
    try:
        yield
        ping.send_signal(signal.SIGINT)
        said = ping.communicate(timeout=10)[0].decode()
    finally:
        ping.kill()
        ping.wait()
    counted = re.search(r"(\d+) packets transmitted, (\d+) received", said)
    if counted is None:
        raise Failed(f"ping said {said!r}")
    sent, answered = map(int, counted.groups())
    # The last one may have been on its way.
    expect(sent > 1 and sent - answered <= 1, f"{one.name} lost {sent - answered} of {sent} pings to {ip}")


def _answers(container: Container, asked: Namespace, asking: str) -> None:
    """Raises Failed unless a container answers pings from a namespace at every address, after moments."""
    eventually(
        lambda: all(asked.pings(ip, wait=1) for ip in container.addresses),
        f"{asking} does not reach {container.name} at {' and '.join(container.addresses)}",
        within=REACHED_WITHIN,
    )


def _run(name: str, node: str, network: str) -> Container:
    container = f"{network}-{node}"
    words = ("run", node, "--network", network, "--name", container, "-o", "json")
    row = json.loads(_lab(name, *words, "--", sys.executable, "-c", SERVER))
    namespace = labs.find(name).task(container).namespace
    eventually(
        lambda: namespace.run("ss", "-Hltn", "sport = :9000").stdout.strip() != "",
        f"the server in {container} does not start; see {row['log']}",
    )
    return Container(container, node, network, tuple(row["addresses"][network]), namespace)


def _containers(name: str) -> set[str]:
    return {row["container"] for row in json.loads(_lab(name, "status", "-o", "json"))["containers"]}


def _is_clean(lab: StandingLab) -> bool:
    answer = lab.cluster.nodes[0].cli("ip", "check", "-o", "json", check=False)
    report: dict[str, Any] = json.loads(answer.stdout) if answer.stdout.strip() else {}
    return report.get("findings") == [] and not report["nodes_silent"]


def _lab(name: str, command: str, *arguments: str) -> str:
    """What ``moorage lab COMMAND --lab NAME ARGUMENTS`` prints. Raises Failed with its sentence."""
    line = [*MOORAGE, "lab", command, "--lab", name, *arguments]
    ended = subprocess.run(
        line, text=True, capture_output=True, check=False, env=with_source(dict(os.environ))
    )
    expect(ended.returncode == 0, f"`{shlex.join(line[1:])}`: {ended.stderr.strip()}")
    return ended.stdout


if __name__ == "__main__":
    sys.exit(main())
