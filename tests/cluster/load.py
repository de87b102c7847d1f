"""A load of containers that come and go through the real hook, and what must hold of it whatever happened.

Everything that is judged was seen by the callers: when they called, when they were answered, and what is
inside their namespaces.

    with Load(lab.nodes, seed=1) as load:
        load.settle(lab.nodes[0], 3)    containers that stay to the end
        ...                             others come and go meanwhile
        load.finish()
    load.verify()
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import random
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ipam.holder import COOLDOWN
from moorage.lab import Answer, Container, LabNode

NETWORK = "web"

WORKERS = 3
"""Containers that come and go at a time, on each node."""

STAYS = (0.02, 0.5)
"""Seconds a container lives: shortest, longest."""

REFUSED = 11
"""The CNI code of "try again later"."""

ADD_WITHIN = 40.0
"""Seconds an ADD may take: 10 s for an address (docs/design.md, section 3), and a machine under load."""

DEL_WITHIN = 40.0
"""Seconds a DEL may take: it waits for no store, only for a machine under load."""

LOOK_EVERY = 0.5
"""Seconds between looks into the namespaces."""


@dataclass(slots=True)
class Call:
    """One call of the hook. Times are monotonic; math.inf and None until there is an answer."""

    called: float
    answered: float = math.inf
    answer: Answer | None = None

    @property
    def took(self) -> float:
        return self.answered - self.called

    @property
    def kind(self) -> str:
        """ "ok", "error N", or "none"."""
        if self.answer is None:
            return "none"
        return "ok" if self.answer.exit == 0 else f"error {self.answer.json.get('code')}"


@dataclass(slots=True)
class Stay:
    """One container's time on a node: what its engine saw."""

    node: str
    container: Container
    add: Call
    delete: Call = field(default_factory=lambda: Call(math.inf))

    @property
    def ip(self) -> str:
        """The IPv4 address it was given, "" if it got none."""
        return self.add.answer.ips.get(4, "") if self.add.kind == "ok" and self.add.answer else ""


class Load:
    """See the module's docstring. A context manager that leaves no process and no namespace behind."""

    def __init__(self, nodes: Sequence[LabNode], seed: int, workers: int = WORKERS) -> None:
        self.stays: list[Stay] = []
        self.looks = 0
        self.carried_twice: list[str] = []
        self.nodes = nodes
        self._random = random.Random(seed)
        self._workers = workers
        self._residents: list[Stay] = []
        self._here: set[str] = set()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self._broken: list[Exception] = []
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._guard, args=(self._look_around, ()))]
        for node in self.nodes:
            for _ in range(self._workers):
                chance = random.Random(self._random.random())
                self._threads.append(threading.Thread(target=self._guard, args=(self._work, (node, chance))))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._resources.close()

    # -- what it does

    def settle(self, node: LabNode, count: int) -> list[Stay]:
        """Start containers that stay until ``finish``; ADDs may be refused."""
        made = []
        for _ in range(count):
            container = self._resources.enter_context(self._namespace(node))
            made.append(self._add(node, container))
            self._residents.append(made[-1])
        return made

    def end(self, stay: Stay) -> None:
        """End a settled container before the others."""
        self._residents.remove(stay)
        self._delete(stay)

    def finish(self) -> None:
        """Nothing new is started; every container is ended."""
        self._stop()
        for stay in self._residents:
            self._delete(stay)
        if self._broken:
            raise self._broken[0]

    def _stop(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _guard(self, work: object, arguments: tuple[object, ...]) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self._broken.append(error)

    def _work(self, node: LabNode, chance: random.Random) -> None:
        while not self._ending.wait(chance.uniform(0, STAYS[0])):
            with self._namespace(node) as container:
                stay = self._add(node, container)
                self._ending.wait(chance.uniform(*STAYS))
                # An engine deletes what it could not add, too.
                self._delete(stay)

    @contextlib.contextmanager
    def _namespace(self, node: LabNode) -> Iterator[Container]:
        with node.container("load") as container:
            with self._lock:
                self._here.add(container.namespace.name)
            try:
                yield container
            finally:
                with self._lock:
                    self._here.discard(container.namespace.name)

    def _add(self, node: LabNode, container: Container) -> Stay:
        stay = Stay(node.name, container, Call(time.monotonic()))
        with self._lock:
            self.stays.append(stay)
        _call(stay.add, container, "ADD")
        return stay

    def _delete(self, stay: Stay) -> None:
        stay.delete.called = time.monotonic()
        _call(stay.delete, stay.container, "DEL")

    # -- what is seen inside the namespaces

    def _look_around(self) -> None:
        while not self._ending.wait(LOOK_EVERY):
            self.look()

    def look(self) -> None:
        """Note every IP that two live namespaces carry. An address rests 30 s, so a look may take moments."""
        with self._lock:
            names = sorted(self._here)
        places: dict[str, list[str]] = {}
        for name in names:
            shown = subprocess.run(
                ["ip", "-netns", name, "-o", "address", "show", "scope", "global"],
                text=True,
                capture_output=True,
            ).stdout
            for ip in re.findall(r"inet6? (\S+)/", shown):
                places.setdefault(ip, []).append(name)
        self.looks += 1
        self.carried_twice += [f"{ip}: {found}" for ip, found in places.items() if len(found) > 1]

    # -- what came of it

    def adds(self, node: LabNode | None = None, since: float = 0.0) -> list[Call]:
        """The ADDs called after ``since``, on one node or on all, that were answered."""
        return [s.add for s in self._of(node) if s.add.called >= since and s.add.answer]

    def deletes(self, node: LabNode | None = None, since: float = 0.0) -> list[Call]:
        """Likewise the DELs."""
        return [s.delete for s in self._of(node) if math.inf > s.delete.called >= since and s.delete.answer]

    def _of(self, node: LabNode | None) -> list[Stay]:
        with self._lock:
            return [stay for stay in self.stays if node is None or stay.node == node.name]

    def figures(self) -> str:
        """One line: how many calls, and how they were answered."""
        adds, deletes = ([s.add for s in self.stays], [s.delete for s in self.stays])
        return (
            f"{len(adds)} ADDs ({kinds(adds)}; slowest {slowest(adds):.1f} s), "
            f"{len(deletes)} DELs ({kinds(deletes)}; slowest {slowest(deletes):.1f} s), "
            f"{len({s.ip for s in self.stays} - {''})} addresses, {self.looks} looks"
        )

    def verify(self) -> None:
        """What must hold after any fault. Call it when all containers are ended."""
        every_caller_was_answered(self.stays)
        no_address_was_had_twice(self.stays)
        assert self.carried_twice == []
        assert self.looks > 5


def _call(call: Call, container: Container, command: str) -> None:
    process = container.start_call(command, container.config(NETWORK))
    with process, contextlib.suppress(subprocess.TimeoutExpired):
        try:
            call.answer = container.finish_call(process)
            call.answered = time.monotonic()
        finally:
            process.kill()


def kinds(calls: Iterable[Call]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(c.kind for c in calls).items()))


def refused(calls: Iterable[Call]) -> list[Call]:
    return [call for call in calls if call.kind == f"error {REFUSED}"]


def succeeded(calls: Iterable[Call]) -> list[Call]:
    return [call for call in calls if call.kind == "ok"]


def slowest(calls: Iterable[Call]) -> float:
    return max((call.took for call in calls), default=0.0)


def every_caller_was_answered(stays: Sequence[Stay]) -> None:
    """ADD: an address, or error 11 with a reason. DEL: done."""
    for stay in stays:
        assert stay.add.kind in ("ok", f"error {REFUSED}"), (stay.node, stay.add)
        assert stay.add.took < ADD_WITHIN, (stay.node, stay.add)
        if stay.add.kind == "ok":
            ipaddress.ip_address(stay.ip)
        assert stay.delete.answer is not None, (stay.node, stay.delete)
        assert (stay.delete.answer.exit, stay.delete.answer.stdout) == (0, ""), (stay.node, stay.delete)
        assert stay.delete.took < DEL_WITHIN, (stay.node, stay.delete)


def no_address_was_had_twice(stays: Sequence[Stay], rest: float = COOLDOWN) -> None:
    """Of one IP, [ADD answered, DEL called] never overlap, and between two of them it rested so many seconds."""
    by_ip: dict[str, list[Stay]] = {}
    for stay in stays:
        if stay.ip:
            by_ip.setdefault(stay.ip, []).append(stay)
    for ip, holders in by_ip.items():
        holders.sort(key=lambda stay: stay.add.answered)
        for before, after in pairwise(holders):
            rested = after.add.answered - before.delete.called
            assert rested >= rest, (
                f"{ip} was given to {after.container.id} on {after.node} {rested:.2f} s after "
                f"{before.container.id} on {before.node} let go of it"
            )
