"""A lab that outlives the command that made it, as any later command finds it: ``moorage lab``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from ipam.errors import AlreadyExists, InvalidInput, NotFound
from moorage.lab.cluster import Lab, in_silence
from moorage.lab.etcd import Member
from moorage.lab.names import check_name, directory_of, namespace_of, prefix
from moorage.lab.node import LabNode
from moorage.lab.task import Task, Wanted

NETWORKS = {"blue": ("10.64.0.0/16", "fd64::/64"), "green": ("10.65.0.0/16", "fd65::/64")}
"""Networks that every lab begins with, and their pools. The first is where a container goes unless told."""

MOST_NODES, MOST_MEMBERS = 99, 5


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a lab is to be."""

    name: str
    nodes: int
    etcd: int
    fabric: str
    gateway: bool


class Record(Plan, frozen=True, kw_only=True):
    """lab.json. since: wall clock. complete: everything of the plan has been started once."""

    boot: str
    since: float
    complete: bool


class StandingLab:
    """A lab as any command finds it."""

    def __init__(self, record: Record, progress: Callable[[str], None] = in_silence) -> None:
        self.record = record
        self.cluster = Lab(
            record.nodes,
            record.etcd,
            gateway=record.gateway,
            prefix=prefix(record.name),
            directory=directory_of(record.name),
            progress=progress,
        )

    @property
    def name(self) -> str:
        return self.record.name

    # -- its parts, by name; each of these raises NotFound with the names that there are

    @property
    def machines(self) -> dict[str, LabNode | Member]:
        """name -> node, gateway or member of etcd."""
        machines: list[LabNode | Member] = [*self.cluster.everyone, *self.cluster.etcd.members]
        return {machine.name: machine for machine in machines}

    def machine(self, name: str) -> LabNode | Member:
        """What has its own wire to the underlay."""
        if (found := self.machines.get(name)) is None:
            raise NotFound(f"lab {self.name} has no node {name!r}; it has {', '.join(self.machines)}")
        return found

    def node(self, name: str) -> LabNode:
        for node in self.cluster.everyone:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.cluster.everyone)
        raise NotFound(f"lab {self.name} has no node {name!r}; it has {names}")

    def tasks(self) -> list[Task]:
        """What runs in containers, the oldest first; those included that have ended and were not removed."""
        places = (directory_of(self.name) / "containers").glob("*/")
        found = (Task.find(place, namespace_of(self.name, place.name)) for place in places)
        return sorted((task for task in found if task is not None), key=lambda task: task.record.since)

    def task(self, name: str) -> Task:
        """By its name, or by the beginning of its id."""
        tasks = self.tasks()
        exact = [task for task in tasks if task.name == name]
        found = exact or [task for task in tasks if name and task.record.id.startswith(name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise NotFound(f"{name!r} begins the ids of {len(found)} containers; write more of it")
        names = ", ".join(task.name for task in tasks)
        advice = f"it has {names}" if names else "it has none yet; start one with `moorage lab run`"
        raise NotFound(f"lab {self.name} has no container {name!r}; {advice}")

    def place(self, name: str) -> LabNode | Member | Task:
        """A machine, or a container."""
        if name in self.machines:
            return self.machines[name]
        with contextlib.suppress(NotFound):
            return self.task(name)
        names = ", ".join([*self.machines, *(task.name for task in self.tasks())])
        raise NotFound(f"lab {self.name} has no node and no container {name!r}; it has {names}")

    # -- containers

    def run(self, node: str, wanted: Wanted, name: str | None = None) -> Task:
        """Start a container on a node. name: made up unless given. Raises LabError if the node refuses it."""
        home = self.node(node)
        if not home.is_on:
            raise InvalidInput(f"{node} is switched off; switch it on with `moorage lab start {node}`")
        place = self._claim(name)
        return Task.start(place, namespace_of(self.name, place.name), home, wanted)

    def _claim(self, name: str | None) -> Path:
        """A new directory in ``containers``: its name is nobody else's."""
        containers = directory_of(self.name) / "containers"
        containers.mkdir(exist_ok=True)
        if name is not None:
            check_name(name, "container")
            if name in (*self.machines, "switch"):
                raise AlreadyExists(f"{name} is a machine of lab {self.name}; name the container otherwise")
        for number in range(1, 1_000_000):
            place = containers / (name or f"c{number}")
            try:
                place.mkdir()
            except FileExistsError:
                if name:
                    raise AlreadyExists(
                        f"lab {self.name} has a container {name} already; remove it with "
                        f"`moorage lab rm {name}`, or name this one otherwise"
                    ) from None
                continue
            return place
        raise AssertionError("a lab never has a million containers")

    # -- what may happen to machines

    def kill(self, name: str, *, power: bool = False) -> list[str]:
        """kill -9 of an agent or a member; with ``power`` the whole node dies. Returns the containers that died too."""
        machine = self.machine(name)
        if isinstance(machine, LabNode) and power:
            if not machine.is_on:
                raise InvalidInput(f"{name} is switched off already; see `moorage lab status`")
            lost = [task for task in self.tasks() if task.record.node == name]
            # The machine first: its agent must not see its containers end one by one.
            machine.switch_off()
            for task in lost:
                task.forget()
            return [task.name for task in lost]
        if power:
            raise InvalidInput(f"{name} is no node; --power is for {', '.join(self._node_names())}")
        if not machine.is_running:
            raise InvalidInput(f"{_program(machine)} does not run; see `moorage lab status`")
        machine.kill()
        return []

    def start(self, name: str) -> None:
        """Start what was killed; returns when an agent serves. Raises LabError with its log if it does not."""
        machine = self.machine(name)
        if machine.is_running:
            raise InvalidInput(f"{_program(machine)} runs already; see `moorage lab status`")
        if isinstance(machine, Member):
            # Not waited for: without a majority of the members none of them serves.
            machine.start(self.cluster.etcd.initial_cluster)
            return
        if not machine.is_on:
            try:
                machine.switch_on()
            except BaseException:
                # A machine is on or off; the next `start` would take half of one for a whole.
                machine.switch_off()
                raise
        machine.start()

    def partition(self, one: str, other: str) -> None:
        """Nothing passes between two machines any more."""
        if one == other:
            raise InvalidInput(f"{one} cannot be cut off from itself; name two machines")
        self.cluster.partition(self.machine(one), self.machine(other))

    def partitions(self) -> list[tuple[str, str]]:
        """The pairs that are cut off from each other."""
        by_host = {machine.host: name for name, machine in self.machines.items()}
        return [(by_host[one], by_host[other]) for one, other in sorted(self.cluster.switch.cuts())]

    def _node_names(self) -> list[str]:
        return [node.name for node in self.cluster.everyone]


def _program(machine: LabNode | Member) -> str:
    return machine.name if isinstance(machine, Member) else f"the agent of {machine.name}"
