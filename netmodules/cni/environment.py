"""The CNI_* variables of a call, validated. All problems are reported at once, by the variable's name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ipam.errors import InvalidInput
from isolator.model import EndpointKey
from netmodules.cni.errors import BadEnvironment

# Mesos joins the ids of nested containers with dots, 37 characters a level, at most 32 levels.
LONGEST_CONTAINER_ID = 1280
LONGEST_NETNS = 4095

_CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", re.ASCII)
_IFNAME = re.compile(r"[!-.0-9;-~]{1,15}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Environment:
    """What the engine says about the endpoint.

    netns: "" when it is not given, which only DEL allows.
    args: CNI_ARGS, taken apart.
    """

    key: EndpointKey
    netns: str = ""
    args: Mapping[str, str] = field(default_factory=dict)


def read_environment(env: Mapping[str, str], *, netns_required: bool) -> Environment:
    """Raises BadEnvironment naming every variable that is missing or wrong, and why."""
    netns = env.get("CNI_NETNS", "")
    args, args_problem = _read_args(env.get("CNI_ARGS", ""))
    problems = [
        _container_id_problem(env.get("CNI_CONTAINERID", "")),
        _ifname_problem(env.get("CNI_IFNAME", "")),
        _netns_problem(netns) if netns_required else "",
        args_problem if netns_required else "",
    ]
    _refuse(problems)
    return Environment(EndpointKey(env["CNI_CONTAINERID"], env["CNI_IFNAME"]), netns, args)


def read_key(env: Mapping[str, str]) -> EndpointKey:
    """The endpoint's key alone, all that a DEL needs. Raises BadEnvironment."""
    return read_environment(env, netns_required=False).key


def read_attachment(container_id: str, ifname: str) -> EndpointKey:
    """An endpoint's key from a list of them. Raises InvalidInput."""
    problems = [
        _container_id_problem(container_id, "containerID"),
        _ifname_problem(ifname, "ifname"),
    ]
    found = "; ".join(filter(None, problems))
    if found:
        raise InvalidInput(f"an entry of cni.dev/valid-attachments is wrong: {found}")
    return EndpointKey(container_id, ifname)


def _refuse(problems: list[str]) -> None:
    found = "; ".join(filter(None, problems))
    if found:
        raise BadEnvironment(found)


def _container_id_problem(value: str, name: str = "CNI_CONTAINERID") -> str:
    if not value:
        return f"{name} is missing"
    if len(value) > LONGEST_CONTAINER_ID:
        return f"{name} is longer than {LONGEST_CONTAINER_ID} characters"
    if _CONTAINER_ID.fullmatch(value) is None:
        return f"{name} {value!r:.100} must be letters, digits, '_', '.', '-', no sign first"
    return ""


def _ifname_problem(value: str, name: str = "CNI_IFNAME") -> str:
    if not value:
        return f"{name} is missing"
    if value in (".", "..") or _IFNAME.fullmatch(value) is None:
        return f"{name} {value!r:.100} must be 1 to 15 characters without '/', ':' and white space"
    return ""


def _netns_problem(value: str) -> str:
    if not value:
        return "CNI_NETNS is missing"
    if not value.startswith("/") or len(value) > LONGEST_NETNS or not value.isprintable():
        return f"CNI_NETNS {value!r:.100} must be an absolute path"
    return ""


def _read_args(value: str) -> tuple[dict[str, str], str]:
    """CNI_ARGS is ``KEY=VALUE;KEY=VALUE``; returns the pairs and what is wrong with it."""
    args = {}
    for pair in filter(None, value.split(";")):
        name, equals, content = pair.partition("=")
        if not equals or not name:
            return {}, f"CNI_ARGS holds {pair!r:.100}, which is not KEY=VALUE"
        args[name] = content
    return args, ""
