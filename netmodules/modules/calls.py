"""The documents of the net-modules protocol, parsed into typed values. docs/facts/mesos.md has the protocol.

    {"command": "allocate",
     "args": {"hostname": …, "num_ipv4": 1, "num_ipv6": 0, "uid": …, "netgroups": […], "labels": […]}}

What is here comes from a framework by way of a Mesos agent: every field may be anything. ``null`` counts as absent.
Labels are a list of ``{"key", "value"}`` on the wire and an object in the protocol's own description; both are read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import msgspec

from ipam.errors import InvalidInput
from ipam.keys import Family, IPAddress
from ipam.netgroups import Netgroup
from ipam.records import Label
from netmodules import frame
from netmodules.labels import read_address, read_netgroups

COMMANDS = ("allocate", "reserve", "release", "isolate", "cleanup")

MOST_ADDRESSES = 64
"""In one call. They are on one interface, in one transaction of the store with their labels, and in one reply."""

MOST_RELEASED = 1024
"""Addresses in one release."""

LONGEST_UID = 253
LONGEST_CONTAINER_ID = 1280
"""As in CNI: 37 characters a level of nesting."""

MOST_PIDS = 1 << 22
"""PID_MAX_LIMIT of linux/threads.h."""

_CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Allocate:
    """``allocate``, and ``reserve`` with the addresses by name."""

    uid: str
    counts: dict[Family, int]
    ips: tuple[IPAddress, ...]
    netgroups: tuple[Netgroup, ...]
    labels: tuple[Label, ...]
    is_reserve: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """``release``: uid is "" if only addresses are given."""

    uid: str
    ips: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True)
class Isolate:
    """``isolate``. labels: None if the call has none, not even an empty list."""

    container_id: str
    pid: int
    ips: tuple[IPAddress, ...]
    netgroups: tuple[Netgroup, ...]
    labels: tuple[Label, ...] | None


@dataclass(frozen=True, slots=True)
class Cleanup:
    """``cleanup``."""

    container_id: str


Call: TypeAlias = Allocate | Release | Isolate | Cleanup


class _Arguments(msgspec.Struct, frozen=True):
    """Every argument of every command; others, such as hostname, say nothing that is not known here."""

    uid: str | None = None
    num_ipv4: int | None = None
    num_ipv6: int | None = None
    ipv4_addrs: list[str] | None = None
    ipv6_addrs: list[str] | None = None
    ips: list[str] | None = None
    container_id: str | None = None
    pid: int | None = None
    netgroups: list[str] | None = None
    labels: list[Label] | dict[str, str | None] | None = None


class _Document(msgspec.Struct, frozen=True):
    command: str
    args: _Arguments | None = None


class _Command(msgspec.Struct, frozen=True):
    command: str


def parse_call(stdin: bytes) -> Call:
    """Raises InvalidInput naming the field, and what it may be."""
    if len(stdin) > frame.MAX_STDIN:
        raise InvalidInput(f"the request is longer than {frame.MAX_STDIN} bytes; send one JSON document")
    if not stdin.strip():
        raise InvalidInput("the request is empty; send one JSON document on stdin")
    # The command first: of one that is not known nobody wants to hear what is wrong with its arguments.
    command = _decode(stdin, _Command).command
    if command not in COMMANDS:
        raise InvalidInput(
            f"the command {command!r:.80} is unknown; send one of {', '.join(COMMANDS)} (moorage-netmodules speaks the "
            "net-modules protocol; the plugin for CNI is moorage-cni)"
        )
    arguments = _decode(stdin, _Document).args or _Arguments()
    match command:
        case "allocate":
            return _allocate(arguments)
        case "reserve":
            return _reserve(arguments)
        case "release":
            return _release(arguments)
        case "isolate":
            return _isolate(arguments)
        case _:
            return Cleanup(_container_id(arguments))


def _allocate(arguments: _Arguments) -> Allocate:
    counts = _counts(arguments)
    return Allocate(_uid(arguments), counts, (), _netgroups(arguments), _labels(arguments) or ())


def _counts(arguments: _Arguments) -> dict[Family, int]:
    counts: dict[Family, int] = {
        4: _count("num_ipv4", arguments.num_ipv4),
        6: _count("num_ipv6", arguments.num_ipv6),
    }
    if sum(counts.values()) > MOST_ADDRESSES:
        raise InvalidInput(
            f"num_ipv4 and num_ipv6 are more than {MOST_ADDRESSES} together; ask for fewer at once"
        )
    return counts


def _count(name: str, value: int | None) -> int:
    count = value or 0
    if not 0 <= count <= MOST_ADDRESSES:
        raise InvalidInput(f"{name} must be from 0 to {MOST_ADDRESSES}, not {count!s:.40}")
    return count


def _reserve(arguments: _Arguments) -> Allocate:
    ips = _addresses(arguments)
    counts: dict[Family, int] = {4: sum(ip.version == 4 for ip in ips), 6: sum(ip.version == 6 for ip in ips)}
    return Allocate(
        _uid(arguments), counts, ips, _netgroups(arguments), _labels(arguments) or (), is_reserve=True
    )


def _release(arguments: _Arguments) -> Release:
    if not arguments.uid and not arguments.ips:
        raise InvalidInput("release needs a uid, or addresses in ips, and has neither; give one of them")
    uid = _uid(arguments) if arguments.uid else ""
    ips = [read_address("an address in ips", text) for text in _bounded("ips", arguments.ips, MOST_RELEASED)]
    return Release(uid, tuple(dict.fromkeys(ips)))


def _isolate(arguments: _Arguments) -> Isolate:
    pid = arguments.pid
    if pid is None or not 0 < pid <= MOST_PIDS:
        raise InvalidInput(
            f"pid must be the container's process, a number from 1 to {MOST_PIDS}, not {pid!s:.40}"
        )
    return Isolate(
        _container_id(arguments), pid, _addresses(arguments), _netgroups(arguments), _labels(arguments)
    )


def _uid(arguments: _Arguments) -> str:
    uid = arguments.uid or ""
    if not 0 < len(uid) <= LONGEST_UID or not uid.isprintable():
        raise InvalidInput(f"uid must be 1 to {LONGEST_UID} printable characters, not {uid!r:.80}")
    return uid


def _container_id(arguments: _Arguments) -> str:
    value = arguments.container_id or ""
    if len(value) > LONGEST_CONTAINER_ID or _CONTAINER_ID.fullmatch(value) is None:
        raise InvalidInput(
            f"container_id must be 1 to {LONGEST_CONTAINER_ID} letters, digits, '_', '.' and '-', no sign first, "
            f"not {value!r:.80}"
        )
    return value


def _addresses(arguments: _Arguments) -> tuple[IPAddress, ...]:
    """Those of ipv4_addrs and ipv6_addrs, of which there has to be one."""
    found: list[IPAddress] = []
    for name, version in (("ipv4_addrs", 4), ("ipv6_addrs", 6)):
        for text in _bounded(name, getattr(arguments, name), MOST_ADDRESSES):
            address = read_address(f"an address in {name}", text)
            if address.version != version:
                raise InvalidInput(f"an address in {name} must be of IPv{version}, not {address}")
            found.append(address)
    if not found:
        raise InvalidInput("ipv4_addrs and ipv6_addrs are both empty; name at least one address")
    _bounded("ipv4_addrs and ipv6_addrs", found, MOST_ADDRESSES)
    return tuple(dict.fromkeys(found))


T = TypeVar("T")


def _bounded(name: str, values: Sequence[T] | None, most: int) -> Sequence[T]:
    if values is not None and len(values) > most:
        raise InvalidInput(f"{name} has {len(values)} addresses; at most {most} are possible")
    return values or ()


def _netgroups(arguments: _Arguments) -> tuple[Netgroup, ...]:
    return read_netgroups("netgroups", arguments.netgroups or ())


def _labels(arguments: _Arguments) -> tuple[Label, ...] | None:
    labels = arguments.labels
    if labels is None:
        return None
    return tuple(labels if isinstance(labels, list) else (Label(key, value) for key, value in labels.items()))


D = TypeVar("D", bound=msgspec.Struct)


def _decode(stdin: bytes, kind: type[D]) -> D:
    """Raises InvalidInput; what is unpaired or undecodable in it is refused by the decoder."""
    try:
        return msgspec.json.decode(stdin, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise InvalidInput(
            f"the request is no document of the net-modules protocol ({error!s:.200}); "
            'send {"command": …, "args": {…}}'
        ) from error
