"""How everything of a standing lab is named, so that any command finds it.

    /var/lib/moorage-lab/LAB/           root only; making it claims the name, and locks are taken on it
        lab.json                        what was asked for, and in which boot of the machine
        n1/ n2/ ... gw/ etcd/           nodes' and members' files, logs and pid files (node.py, etcd.py)
        containers/NAME/                what runs in a container (task.py)
    /run/netns/mrg-LAB.PLACE            a namespace for the switch, each node, member and container

It is on a disk and not below /run, because etcd reserves more space than a /run in memory has.
"""

from __future__ import annotations

import re
from pathlib import Path

from ipam.errors import InvalidInput
from moorage.lab.namespace import NAMESPACES, Namespace

BASE = Path("/var/lib/moorage-lab")

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,18}[a-z0-9])?")
"""Of labs and containers: short, for unix sockets' paths; no dots, which part the two in namespaces' names."""


def directory_of(name: str) -> Path:
    """All files of a lab."""
    return BASE / name


def namespace_of(lab: str, place: str) -> Namespace:
    """That of its switch, or of a node, a member or a container."""
    return Namespace(prefix(lab) + place)


def prefix(lab: str) -> str:
    """What the names of its namespaces begin with."""
    return f"mrg-{lab}."


def all_labs() -> list[str]:
    """Every lab of which there is anything, whole or not."""
    by_namespace = re.compile(rf"mrg-({NAME.pattern})\.{NAME.pattern}")
    found = {match[1] for path in _listed(NAMESPACES) if (match := by_namespace.fullmatch(path.name))}
    return sorted(found | {path.name for path in _listed(BASE) if NAME.fullmatch(path.name)})


def namespaces_of(lab: str) -> list[Namespace]:
    """Those that there are."""
    return [Namespace(path.name) for path in _listed(NAMESPACES) if path.name.startswith(prefix(lab))]


def check_name(name: str, what: str) -> None:
    """Raises InvalidInput. what: of which kind it is."""
    if not NAME.fullmatch(name):
        raise InvalidInput(
            f"{name!r} cannot be the name of a {what}; use 1 to 20 lower-case letters, digits and dashes"
        )


def _listed(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []
