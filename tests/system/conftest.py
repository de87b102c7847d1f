"""A real node for each test: an agent process in a namespace of its own, and the engine's hook."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moorage.lab import Container, LabNode
from tests.patience import PATIENCE


@pytest.fixture
def node() -> Iterator[LabNode]:
    """A node whose agent serves the dual-stack network ``web``."""
    with LabNode("node") as node:
        node.start()
        node.cli(
            "network",
            "create",
            "web",
            "--pool",
            "10.64.0.0/16",
            "--pool",
            "fd64::/64",
            "--allow-static",
            "all",
        )
        yield node


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB, root's alone, which a test may fill."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "mrg-small", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


LISTEN = """
import socket, sys, time
protocol, ip, port = sys.argv[1:]
family = socket.AF_INET6 if ":" in ip else socket.AF_INET
made = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
made.bind((ip, int(port)))
if protocol == "tcp":
    made.listen()
print(flush=True)
time.sleep(3600)
"""


@contextmanager
def listening(node: LabNode, protocol: str, ip: str, port: int) -> Iterator[int]:
    """A process of the node that listens; its pid."""
    command = (sys.executable, "-c", LISTEN, protocol, ip, str(port))
    with node.namespace.start(*command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def eventually(holds: Callable[[], object], within: float = PATIENCE) -> None:
    """Wait until it holds. Fails with what it returned last."""
    deadline = time.monotonic() + within
    while not (last := holds()):
        assert time.monotonic() < deadline, f"still {last!r} after {within} s"
        time.sleep(0.05)


def links(node: LabNode) -> list[str]:
    """Endpoint interfaces on the node."""
    lines = node.namespace.run("ip", "-o", "link").stdout.splitlines()
    return [line.split(":")[1].split("@")[0].strip() for line in lines if ": mrg" in line]


def routes(node: LabNode) -> list[str]:
    """Our routes on the node, both families."""
    return [
        line
        for family in ("-4", "-6")
        for line in node.namespace.run(
            "ip", family, "route", "show", "table", "all", "proto", "157"
        ).stdout.splitlines()
    ]


def rules(container: Container) -> list[str]:
    """Source rules inside a container, both families."""
    return [
        line
        for family in ("-4", "-6")
        for line in container.namespace.run("ip", family, "rule").stdout.splitlines()
        if "from all" not in line
    ]


def elements(node: LabNode) -> int:
    """How many endpoint addresses the firewall admits."""
    text = node.namespace.run("nft", "list", "table", "inet", "moorage").stdout
    return len(re.findall(r'"mrg[a-z2-7]{12}"', text))


def assert_nothing_left(node: LabNode) -> None:
    """Neither kernel nor IPAM hold anything of an endpoint any more, after moments."""
    eventually(lambda: node.ask("endpoint", "list") == [])
    eventually(lambda: links(node) == [])
    eventually(lambda: routes(node) == [])
    eventually(lambda: elements(node) == 0)
    eventually(lambda: {row["state"] for row in node.ask("ip", "list")} <= {"warm", "cooling"})
