"""All standing labs by name: making one, finding it again, taking it down.

Whatever has one of a lab's names belongs to it (names.py), and so does everything that runs inside one of its
namespaces. Taking a lab down therefore needs no record of it, whichever part of it has got lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ipam.errors import AlreadyExists, InvalidInput, NotFound, TryAgain
from isolator.identity import boot_id
from moorage.lab import names
from moorage.lab.cluster import Lab, in_silence
from moorage.lab.errors import LabError
from moorage.lab.names import all_labs, check_name, directory_of, namespaces_of
from moorage.lab.node import LabNode
from moorage.lab.standing import NETWORKS, Plan, Record, StandingLab

RECORD = "lab.json"

BLOCK_SIZES = ("28", "124")
"""Small, so that a handful of containers needs more than one."""

EVERYTHING_ALLOWED = (
    "--allow-netgroup", "*", "--allow-public", "--allow-static", "all", "--allow-mac", "--allow-hostport", "1-65535",
    "--allow-from", "nodes",
)  # fmt: skip
"""Whoever has a lab may try all labels and call from all its nodes; `moorage network set` takes away what shall be
refused."""

PATIENCE = 30.0
"""Seconds a command waits for another one that is at work on the same lab."""

SWEEPS = 3
"""How often namespaces are looked for when a lab is taken down."""

PROGRAMS = {"etcd": "etcd-server", "etcdctl": "etcd-client", "ip": "iproute2", "nft": "nftables"}
"""What a lab cannot do without, and Debian's package of it."""


def chosen(name: str | None) -> str:
    """The lab that is meant: the only one, unless named. Raises NotFound, InvalidInput."""
    known = all_labs()
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
    check_name(plan.name, "lab")
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
    """End every process and remove every namespace and file that is named as a lab's are. Raises LabError."""
    for namespace in namespaces_of(name):
        namespace.refuse_inside()
    # Again, for what a command that was killed had begun to make.
    for _ in range(SWEEPS):
        for namespace in namespaces_of(name):
            namespace.end_processes()
        for namespace in namespaces_of(name):
            namespace.delete()
    if left := namespaces_of(name):
        raise LabError(
            f"{left[0].path} cannot be removed; see `ip netns delete {left[0].name}`, then try again"
        )
    shutil.rmtree(directory_of(name), ignore_errors=True)
    with contextlib.suppress(OSError):
        names.BASE.rmdir()


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
    if name in all_labs():
        unfinished = "" if record is not None and record.complete else ", not all of it"
        raise AlreadyExists(
            f"a lab called {name} exists already{unfinished}; end it with {_down(name)}, or name this one with --lab"
        )
    while True:
        names.BASE.mkdir(mode=0o700, exist_ok=True)
        try:
            return directory_of(name).mkdir(mode=0o700)
        except FileNotFoundError:
            continue  # the last other lab was taken down meanwhile, and what is above us went with it
        except FileExistsError:
            raise AlreadyExists(
                f"a lab called {name} is coming up just now; name this one with --lab"
            ) from None


def _create_network(node: LabNode, name: str, fabric: str) -> None:
    pools = [word for pool in NETWORKS[name] for word in ("--pool", pool)]
    sizes = [word for size in BLOCK_SIZES for word in ("--block-size", size)]
    node.cli("network", "create", name, *pools, *sizes, "--fabric", fabric, *EVERYTHING_ALLOWED)


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
