"""``policy``: what the firewall's table costs: a change of it, and a packet through it, by how many it knows.

A node and two containers that share a netgroup, wired by the driver, without an agent. The peer of traffic is the same
node without the table, and so without connection tracking; rounds take turns.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_network

from benchmarks.figures import Budget, Row, Sample
from isolator.drivers import Wiring
from isolator.drivers.naming import host_ifname, mac_for
from isolator.drivers.routed import Routed
from isolator.model import EndpointKey, IPAddress
from isolator.netlink import Node
from isolator.policy import Admission, Policy, Surroundings
from isolator.sysctl import enable_forwarding
from moorage.lab import Namespace, unique

FEW, MANY = 10, 10_000
POOL = ip_network("10.64.0.0/16")
AROUND = Surroundings(pools=(POOL,), nat_pools=(POOL,))
FASTER = Budget(2.0, of_peer=False)
SAME = Budget(1.5)
AS_FAST = Budget(0.95, at_least=True)
ELSEWHERE = IPv4Address("10.64.63.1")
MOST_TRAFFIC_ROUNDS = 8
SECONDS = 1


def endpoint(number: int) -> Admission:
    """One of many."""
    ips = (IPv4Address("10.64.128.0") + number,)
    return Admission(f"mrg{number:012d}", mac_for(ips), ips, "web", ("web",))


class Stage:
    """A node with two containers."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.node = stack.enter_context(Namespace(unique("bench")))
        self.one, self.other = (stack.enter_context(Namespace(unique("bench"))) for _ in range(2))
        self._home = stack.enter_context(Node())
        self._place = stack.enter_context(self._home.open_namespace(str(self.node.path)))
        self._ends: list[Admission] = []
        with self._place.inside():
            node = stack.enter_context(Node())
            enable_forwarding(node)
            self.policy = Policy()
            stack.callback(self.policy.close)
            driver = Routed(node)
            for number, container in enumerate((self.one, self.other), 1):
                ips = (IPv4Address("10.64.0.0") + number,)
                name = host_ifname(EndpointKey(container.name, "eth0"))
                self._ends.append(Admission(name, mac_for(ips), ips, "web", ("web",)))
                driver.setup(
                    Wiring(name, "eth0", str(container.path), ips, mac_for(ips), 1500),
                )

    def knows(self, here: int, elsewhere: int) -> None:
        """A table with that many endpoints of this node, and of others, all in one netgroup."""
        self.policy.restore([*self._ends, *map(endpoint, range(here))], AROUND)
        known: dict[IPAddress, tuple[str, ...]] = {
            IPv4Address("10.64.64.0") + n: ("web",) for n in range(elsewhere)
        }
        self.policy.replace_others(known)

    def no_table(self) -> None:
        self.node.run("nft", "delete", "table", "inet", "moorage")

    @contextlib.contextmanager
    def server(self) -> Iterator[None]:
        process = self.other.start("iperf3", "-s", "-1", "--forceflush", stdout=-3)
        try:
            while "5201" not in self.other.run("ss", "-Hltn").stdout:
                time.sleep(0.01)
            yield
        finally:
            process.kill()
            process.wait()

    def gigabits(self) -> float:
        """TCP, one stream."""
        return float(self._iperf()["end"]["sum_received"]["bits_per_second"]) / 1e9

    def kilopackets(self) -> float:
        """UDP of 64 bytes, those that arrive."""
        end = self._iperf("-u", "-l", "64", "-b", "0")["end"]["sum"]
        return float(end["packets"] - end["lost_packets"]) / float(end["seconds"]) / 1e3

    def _iperf(self, *options: str) -> dict[str, dict[str, dict[str, float]]]:
        with self.server():
            target = str(self._ends[1].ips[0])
            result = self.one.run("iperf3", "-J", "-c", target, "-t", str(SECONDS), "-O", "0.5", *options)
        return dict(json.loads(result.stdout))


def rows(rounds: int) -> list[Row]:
    with contextlib.ExitStack() as stack:
        stage, few, many, all_here = (Stage(stack) for _ in range(4))
        for one, here, elsewhere in ((few, FEW, FEW), (many, FEW, MANY), (all_here, MANY, FEW)):
            one.knows(here, elsewhere)
        took = {one: _Took() for one in (few, many, all_here)}
        for number in range(rounds):
            for one, times in took.items():
                _change(one, number, times)
        found = [
            Row(f"policy, an endpoint comes and goes, {MANY} known (peer: {FEW})", "ms",
                Sample(took[many].own), Sample(took[few].own), SAME),
            Row("  of it: it comes", "ms", Sample(took[many].admit), budget=FASTER),
            Row(f"  all {MANY} on this node (peer: {FEW})", "ms",
                Sample(took[all_here].own), Sample(took[few].own)),
            Row(f"policy, another node's comes and goes, {MANY} known (peer: {FEW})", "ms",
                Sample(took[many].other), Sample(took[few].other), SAME),
        ]  # fmt: skip
        traffic = _traffic(stage, min(rounds, MOST_TRAFFIC_ROUNDS))
    for members in (FEW, MANY):
        for what, unit in (("TCP, one stream", "Gbit/s"), ("UDP, 64 bytes", "kpps")):
            ours, peer = traffic[members, unit], traffic[0, unit]
            found.append(
                Row(
                    f"{what}, same node, {members} members (peer: no table)",
                    unit,
                    Sample(ours),
                    Sample(peer),
                    AS_FAST,
                )
            )
    return found


@dataclass(slots=True)
class _Took:
    """Milliseconds of an endpoint that comes, comes and goes, and of another node's that comes and goes."""

    admit: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)


def _change(stage: Stage, number: int, took: _Took) -> None:
    one = endpoint(20_000 + number)
    begun = time.perf_counter()
    stage.policy.admit(one)
    took.admit.append((time.perf_counter() - begun) * 1e3)
    stage.policy.revoke([one.host_ifname])
    took.own.append((time.perf_counter() - begun) * 1e3)
    begun = time.perf_counter()
    stage.policy.set_others([(ELSEWHERE, ("web",))])
    stage.policy.set_others([(ELSEWHERE, ())])
    took.other.append((time.perf_counter() - begun) * 1e3)


def _traffic(stage: Stage, rounds: int) -> dict[tuple[int, str], list[float]]:
    """(members, unit) -> a value a round; 0 members is no table."""
    found: dict[tuple[int, str], list[float]] = {}
    for _ in range(rounds):
        for members in (0, FEW, MANY):
            stage.knows(FEW, members)
            if not members:
                stage.no_table()
            for unit, measure in (("Gbit/s", stage.gigabits), ("kpps", stage.kilopackets)):
                found.setdefault((members, unit), []).append(measure())
    return found
