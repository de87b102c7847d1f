"""``commits``: how many allocations and releases a second etcd confirms to one node, and 100 nodes at once.

The yardstick is etcd itself, in the same run through the same client: plain puts, one after the other. How
many of those fit a second is the disk's business, so both are also measured with etcd FAR away, where a put
costs what it costs on a slower disk or across a network.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.committing import CALLERS, EACH, NODES
from benchmarks.figures import Budget, Row, Sample
from benchmarks.launch import CallFailed
from moorage.lab import DelayingProxy, EtcdCluster, Lab, Namespace, unique

FAR = 0.005
"""Seconds that a round trip to etcd takes longer: a usual disk's fsync, or another site."""

HOST, PROXY = 1, 150
"""Host numbers on the underlay."""

AIM = Budget(20.0, at_least=True)


def rows(rounds: int) -> list[Row]:
    repeats = max(3, rounds // 20)
    with _bench() as bench:
        near = _samples(bench.measure("loads", bench.etcd.url, repeats))
        far = _samples(bench.measure("loads", f"etcd://{bench.proxy.address}?prefix=/far", repeats))
        bursts = bench.measure("bursts", f"{bench.etcd.url}?prefix=/bursts", repeats)
    if any(burst["duplicates"] for burst in bursts):
        raise CallFailed(f"addresses were given twice: {bursts}")
    return [
        *_rows(near, "", AIM),
        *_rows(far, f", etcd {FAR * 1e3:.0f} ms away", None),
        Row(
            f"burst: {NODES} nodes x {EACH} addresses, one etcd",
            "s",
            Sample([burst["seconds"] for burst in bursts]),
            budget=Budget(5.0, of_peer=False),
        ),
        Row("  transactions it took", "", Sample([burst["transactions"] for burst in bursts])),
    ]


def _rows(rates: dict[str, Sample], where: str, aim: Budget | None) -> list[Row]:
    put = rates["put"]
    return [
        Row(f"etcd puts, one after the other{where}", "per s", put),
        Row(f"etcd puts, {CALLERS} at a time{where} (peer: one)", "per s", rates["put, many"], put),
        Row(f"IPAM commits, 1 caller{where} (peer: one put)", "per s", rates["commit"], put),
        Row(
            f"IPAM commits, {CALLERS} callers{where} (peer: one put)",
            "per s",
            rates["commit, many"],
            put,
            aim,
        ),
    ]


def _samples(rates: dict[str, list[float]]) -> dict[str, Sample]:
    return {name: Sample(values) for name, values in rates.items()}


@dataclass(frozen=True, slots=True)
class _Bench:
    """An etcd of one member, a proxy before it, and a place to measure from."""

    etcd: EtcdCluster
    proxy: DelayingProxy
    place: Namespace

    def measure(self, what: str, url: str, repeats: int) -> Any:
        """What benchmarks.committing prints. Raises CallFailed."""
        with tempfile.TemporaryDirectory(prefix="mrg-") as directory:
            done = self.place.run(
                sys.executable, "-m", "benchmarks.committing", what, url, directory, str(repeats), check=False
            )
        if done.returncode:
            raise CallFailed(f"committing ended with {done.returncode}: {done.stderr[-2000:]}")
        return json.loads(done.stdout)


@contextlib.contextmanager
def _bench() -> Iterator[_Bench]:
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(nodes=0))
        switch, etcd = lab.switch, lab.etcd
        proxy = stack.enter_context(DelayingProxy(switch, PROXY, etcd.addresses[0]))
        proxy.delay(round_trip=FAR)
        place = stack.enter_context(Namespace(unique("bench")))
        switch.plug(place, HOST)
        yield _Bench(etcd, proxy, place)
