"""Labs that outlive the command that made them: ``moorage lab``.

    /var/lib/moorage-lab/NAME/          root only; making it claims the name, and locks are taken on it
        lab.json                        what was asked for, and in which boot of the machine
        n1/ n2/ ... gw/ etcd/           nodes' and members' files, logs and pid files (node.py, etcd.py)
        containers/NAME/                what runs in a container (task.py)
    /run/netns/mrg-NAME.PLACE           a namespace for the switch, each node, member and container

Nothing else is remembered: everything of a lab is found again by these names, and whatever runs inside one
of its namespaces belongs to it. So taking a lab down needs no record of it, whichever part has got lost. It
is on a disk and not below /run, because etcd reserves more space than a /run in memory has.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ipam.errors import AlreadyExists, InvalidInput, NotFound, TryAgain
from isolator.identity import boot_id
from moorage.lab.cluster import Lab, in_silence
from moorage.lab.etcd import Member
from moorage.lab.namespace import NAMESPACES, Namespace
from moorage.lab.node import LabNode
from moorage.lab.task import Task, Wanted

BASE = Path("/var/lib/moorage-lab")
RECORD = "lab.json"

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,18}[a-z0-9])?")
"""Of labs and containers: short, for unix sockets' paths; no dots, which part the two in namespaces' names."""

NETWORKS = {"blue": ("10.64.0.0/16", "fd64::/64"), "green": ("10.65.0.0/16", "fd65::/64")}
"""Networks that every lab begins with, and their pools. The first is where a container goes unless told."""

BLOCK_SIZES = ("28", "124")
"""Small, so that a handful of containers needs more than one."""

MOST_NODES, MOST_MEMBERS = 99, 5

PATIENCE = 30.0
"""Seconds a command waits for another one that is at work on the same lab."""

PROGRAMS = {"etcd": "etcd-server", "etcdctl": "etcd-client", "ip": "iproute2", "nft": "nftables"}
"""What a lab cannot do without, and Debian's package of it."""


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
            prefix=_prefix(record.name),
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
        found = (Task.find(place, Namespace(_prefix(self.name) + place.name)) for place in places)
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
        namespace = Namespace(_prefix(self.name) + place.name)
        try:
            return Task.start(place, namespace, home, wanted)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise

    def _claim(self, name: str | None) -> Path:
        """A new directory in ``containers``: its name is nobody else's."""
        containers = directory_of(self.name) / "containers"
        containers.mkdir(exist_ok=True)
        if name is not None:
            _check_name(name, "container")
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
            machine.switch_on()
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


# -- labs by name


def directory_of(name: str) -> Path:
    """All files of a lab."""
    return BASE / name


def names() -> list[str]:
    """Every lab of which there is anything, whole or not."""
    by_namespace = re.compile(rf"mrg-({NAME.pattern})\.{NAME.pattern}")
    found = {match[1] for path in _listed(NAMESPACES) if (match := by_namespace.fullmatch(path.name))}
    return sorted(found | {path.name for path in _listed(BASE) if NAME.fullmatch(path.name)})


def chosen(name: str | None) -> str:
    """The lab that is meant: the only one, unless named. Raises NotFound, InvalidInput."""
    known = names()
    if name is not None and name in known:
        return name
    if not known:
        which = "no lab is up" if name is None else f"there is no lab {name!r}"
        raise NotFound(f"{which}; start one with `moorage lab up --nodes 3`")
    if name is not None:
        raise NotFound(f"there is no lab {name!r}; there is {', '.join(known)}")
    if len(known) > 1:
        raise InvalidInput(
            f"there are {len(known)} labs: {', '.join(known)}; say which one is meant with --lab"
        )
    return known[0]


def find(name: str | None, *, incomplete: bool = False) -> StandingLab:
    """The lab called ``name``, or the only one. Raises NotFound if there is none that can be used.

    incomplete: also one that is coming up, or whose ``up`` was killed.
    """
    name = chosen(name)
    record = _read(name)
    if record is None:
        raise NotFound(f"only remains of lab {name} are left; clear them away with {_down(name)}")
    if record.boot != boot_id():
        raise NotFound(
            f"lab {name} ended when this machine was restarted; clear its files away with {_down(name)}"
        )
    if not record.complete and not incomplete:
        raise NotFound(
            f"lab {name} is not complete; wait if its `moorage lab up` goes on, else end it with {_down(name)}"
        )
    return StandingLab(record)


def up(plan: Plan, progress: Callable[[str], None] = in_silence) -> StandingLab:
    """Make a lab and start everything in it; nothing is left of it if that fails.

    progress: is called ``parts(plan)`` times, as each part is begun. Raises AlreadyExists, InvalidInput, LabError.
    """
    _check_name(plan.name, "lab")
    require_programs()
    _claim(plan.name)
    with locked(plan.name):
        try:
            return _make(plan, progress)
        except BaseException:
            sweep(plan.name)
            raise


def _make(plan: Plan, progress: Callable[[str], None]) -> StandingLab:
    record = Record(**msgspec.structs.asdict(plan), boot=boot_id(), since=time.time(), complete=False)
    _write(record)
    lab = StandingLab(record, progress)
    lab.cluster.create()
    lab.cluster.start()
    for network in NETWORKS:
        progress(f"network {network}")
        _create_network(lab.cluster.nodes[0], network, plan.fabric)
    lab.record = msgspec.structs.replace(record, complete=True)
    _write(lab.record)
    return lab


def parts(plan: Plan) -> int:
    """How many steps ``up`` has."""
    return Lab(plan.nodes, plan.etcd, gateway=plan.gateway).parts + len(NETWORKS)


def down(name: str | None) -> str:
    """End everything of a lab and remove it, whatever is left of it; returns its name. Raises NotFound."""
    name = chosen(name)
    lock = locked(name) if directory_of(name).exists() else contextlib.nullcontext()
    with lock:
        sweep(name)
    return name


def sweep(name: str) -> None:
    """End every process and remove every namespace and file that is named as a lab's are."""
    while namespaces := _namespaces(name):
        for namespace in namespaces:
            namespace.end_processes()
        for namespace in namespaces:
            namespace.delete()
    shutil.rmtree(directory_of(name), ignore_errors=True)
    with contextlib.suppress(OSError):
        BASE.rmdir()


@contextlib.contextmanager
def locked(name: str, *, shared: bool = False) -> Iterator[None]:
    """Keep other commands from changing this lab; ``shared``: only from taking it down.

    Raises TryAgain when another command goes on, NotFound when it took the lab down.
    """
    try:
        directory = os.open(directory_of(name), os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise _is_gone(name) from None
    try:
        _lock(directory, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, name)
        # The lock may be one on a directory that was removed while we waited for it.
        if not _is_at(directory, directory_of(name)):
            raise _is_gone(name)
        yield
    finally:
        os.close(directory)


def _is_at(directory: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(directory), path.stat())
    except FileNotFoundError:
        return False


def _lock(directory: int, kind: int, name: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return fcntl.flock(directory, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TryAgain(
                    f"another `moorage lab` command is at work on lab {name}; wait for it, or end it"
                ) from None
        time.sleep(0.05)


def require_programs() -> None:
    """Raises InvalidInput naming the packages of what is missing."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        packages = " ".join(PROGRAMS[program] for program in missing)
        raise InvalidInput(
            f"a lab needs {', '.join(missing)}, which this machine does not have; install with: "
            f"apt-get install {packages}"
        )


def _claim(name: str) -> None:
    """Make the lab's directory. Raises AlreadyExists; a lab of an earlier boot is cleared away."""
    record = _read(name)
    if record is not None and record.boot != boot_id():
        with locked(name):
            sweep(name)
    if name in names():
        unfinished = "" if record is not None and record.complete else ", not all of it"
        raise AlreadyExists(
            f"a lab called {name} exists already{unfinished}; end it with {_down(name)}, or name this one with --lab"
        )
    BASE.mkdir(mode=0o700, exist_ok=True)
    try:
        directory_of(name).mkdir(mode=0o700)
    except FileExistsError:
        raise AlreadyExists(f"a lab called {name} is coming up just now; name this one with --lab") from None


def _create_network(node: LabNode, name: str, fabric: str) -> None:
    pools = [word for pool in NETWORKS[name] for word in ("--pool", pool)]
    sizes = [word for size in BLOCK_SIZES for word in ("--block-size", size)]
    node.cli("network", "create", name, *pools, *sizes, *(("--fabric", fabric) if fabric != "none" else ()))


def _check_name(name: str, what: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} cannot be the name of a {what}; use 1 to 20 lower-case letters, digits and dashes"
        )


def _prefix(name: str) -> str:
    return f"mrg-{name}."


def _namespaces(name: str) -> list[Namespace]:
    return [Namespace(path.name) for path in _listed(NAMESPACES) if path.name.startswith(_prefix(name))]


def _listed(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def _read(name: str) -> Record | None:
    try:
        return msgspec.json.decode((directory_of(name) / RECORD).read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def _write(record: Record) -> None:
    file = directory_of(record.name) / RECORD
    new = file.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(record))
    new.replace(file)


def _down(name: str) -> str:
    return f"`moorage lab down --lab {name}`"


def _is_gone(name: str) -> NotFound:
    return NotFound(f"lab {name} was taken down meanwhile; start it anew with `moorage lab up`")
