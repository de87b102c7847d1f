"""``fabric-throughput``: what a container's traffic loses on its way, on one node and between two.

Throughput is one TCP stream of iperf3's, and what it is for each core that it keeps busy, which other load on the
machine disturbs less. Latency is a request of 100 bytes and its answer over a standing TCP connection, in Python
on both sides.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

from benchmarks import echo
from benchmarks.figures import Budget, Row, Sample
from benchmarks.paths import Path, Way, paths
from isolator.netlink import Node

SECONDS = 1
"""Of each stream."""

REQUESTS = 2000
"""One after the other, each time."""

REQUEST = bytes(100)

READY_WITHIN = 10.0
"""Seconds for a server to listen."""


def rows(rounds: int) -> list[Row]:
    with paths() as ways, _servers(ways):
        speeds, cheapness, median, worst = (defaultdict[Way, list[float]](list) for _ in range(4))
        names = list(ways)
        for number in range(1 + max(5, rounds // 10)):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                (speed, cores), times = _stream(ways[name]), _requests(ways[name])
                if number:
                    speeds[name].append(speed)
                    cheapness[name].append(speed / cores)
                    median[name].append(statistics.median(times))
                    worst[name].append(statistics.quantiles(times, n=100)[98])
    return [
        *_rows("TCP", "Gbit/s", speeds, Budget(0.95, at_least=True)),
        *_rows("TCP for each core", "Gbit/s", cheapness),
        *_rows("request, p50", "us", median, Budget(1.05)),
        *_rows("request, p99", "us", worst),
    ]


def _rows(what: str, unit: str, found: Mapping[Way, list[float]], aim: Budget | None = None) -> list[Row]:
    ours = {way: Sample(values) for (way, whose), values in found.items() if whose == "ours"}
    compared = (
        ("one node", "routed", "one node (peer: veths, routed)", aim),
        ("one node", "bare", "one node (peer: one veth pair, no node)", None),
        ("vxlan", "routed", "two nodes, vxlan (peer: bare VXLAN)", aim),
        ("hostgw", "routed", "two nodes, hostgw (peer: bare routes)", aim),
    )
    return [
        Row(f"{what}, {text}", unit, ours[way], Sample(found[way, peer]), budget)
        for way, peer, text, budget in compared
    ]


@contextlib.contextmanager
def _servers(ways: Mapping[Way, Path]) -> Iterator[None]:
    """iperf3 and echo run at the end of each path."""
    with contextlib.ExitStack() as stack:
        for way in ways.values():
            for command in (("iperf3", "-s", "--forceflush"), (sys.executable, "-m", "benchmarks.echo")):
                server = way.server.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                stack.callback(_end, server)
                assert server.stdout is not None, "it was started with a pipe"
                server.stdout.readline()
        yield


def _end(server: subprocess.Popen[bytes]) -> None:
    server.kill()
    server.communicate()


def _stream(way: Path) -> tuple[float, float]:
    """Gbit/s that arrived, and the cores that sender and receiver kept busy with it, the kernel's work included."""
    end = json.loads(way.client.run("iperf3", "-J", "-c", way.ip, "-t", str(SECONDS)).stdout)["end"]
    busy = end["cpu_utilization_percent"]
    return float(end["sum_received"]["bits_per_second"]) / 1e9, (
        busy["host_total"] + busy["remote_total"]
    ) / 100


def _requests(way: Path) -> list[float]:
    """Microseconds of each."""
    times = []
    with _connection(way) as link:
        for _ in range(REQUESTS):
            begun = time.perf_counter()
            link.sendall(REQUEST)
            left = len(REQUEST)
            while left:
                left -= len(link.recv(left))
            times.append((time.perf_counter() - begun) * 1e6)
    return times


@contextlib.contextmanager
def _connection(way: Path) -> Iterator[socket.socket]:
    with Node() as home, home.open_namespace(str(way.client.path)) as place:
        with place.inside():
            link = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        with link:
            link.settimeout(READY_WITHIN)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.connect((way.ip, echo.PORT))
            yield link
