"""One call of the net-modules protocol: the JSON document on stdin, decoded, typed and bounded.

    {"command": "isolate", "args": {"hostname": ..., "container_id": ..., "pid": ..., ...}}

What is not known is ignored: modules of other ages send more. ``null`` counts as absent. ``hostname`` is the node's own
name for itself, and this agent knows better which node it is on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import msgspec

from ipam.errors import InvalidInput
from ipam.keys import Family, IPAddress
from ipam.netgroups import Netgroup
from ipam.records import Label
from isolator.model import EndpointKey
from netmodules.cni.environment import LONGEST_CONTAINER_ID
from netmodules.frame import MAX_STDIN
from netmodules.labels import Requested, read_address, read_labels, read_netgroups

CALL = "netmodules"
"""The kind of request that a hook sends."""

IFNAME = "eth0"
"""The one interface that a container of net-modules gets."""

MOST_ADDRESSES = 64
"""In one call. An answer has to stay under the 40 KB that the module reads."""

LONGEST_UID = 253
LARGEST_PID = 4_194_304
"""The kernel's PID_MAX_LIMIT; proc(5)."""

RELEASE_KEY = EndpointKey(CALL, "release")
"""What a release that waits in the spool is filed under; it is no endpoint's."""

_CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Allocate:
    """Any addresses. counts: of each family, without ``ips``, which are those that a label names."""

    uid: str
    counts: dict[Family, int]
    ips: tuple[IPAddress, ...]
    netgroups: tuple[Netgroup, ...]
    labels: tuple[Label, ...]
    requested: Requested


@dataclass(frozen=True, slots=True)
class Reserve:
    """Certain addresses."""

    uid: str
    ips: tuple[IPAddress, ...]
    netgroups: tuple[Netgroup, ...]
    labels: tuple[Label, ...]
    requested: Requested


@dataclass(frozen=True, slots=True)
class Release:
    """All that a uid has, or certain addresses, or both."""

    uid: str = ""
    ips: tuple[IPAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Isolate:
    """Wire the namespace of a process. netgroups, labels: () if none are given."""

    key: EndpointKey
    pid: int
    ips: tuple[IPAddress, ...]
    netgroups: tuple[Netgroup, ...]
    labels: tuple[Label, ...]


@dataclass(frozen=True, slots=True)
class Cleanup:
    """Take it away again."""

    key: EndpointKey


ModuleCall: TypeAlias = Allocate | Reserve | Release | Isolate | Cleanup

_Labels: TypeAlias = list[Label] | dict[str, str | None] | None


class _Document(msgspec.Struct, frozen=True):
    command: str
    args: msgspec.Raw = field(default_factory=lambda: msgspec.Raw(b"{}"))


class _Asked(msgspec.Struct, frozen=True):
    uid: str
    netgroups: list[str] | None = None
    labels: _Labels = None


class _Allocate(_Asked, frozen=True):
    num_ipv4: int | None = None
    num_ipv6: int | None = None


class _Reserve(_Asked, frozen=True):
    ipv4_addrs: list[str] | None = None
    ipv6_addrs: list[str] | None = None


class _Release(msgspec.Struct, frozen=True):
    uid: str | None = None
    ips: list[str] | None = None


class _Isolate(msgspec.Struct, frozen=True):
    container_id: str
    pid: int
    ipv4_addrs: list[str] | None = None
    ipv6_addrs: list[str] | None = None
    netgroups: list[str] | None = None
    labels: _Labels = None


class _Cleanup(msgspec.Struct, frozen=True):
    container_id: str


def parse_call(stdin: bytes) -> ModuleCall:
    """Raises InvalidInput: one sentence that names what is wrong."""
    if len(stdin) > MAX_STDIN:
        raise InvalidInput(f"the document on stdin is larger than {MAX_STDIN} bytes")
    document = _decoded("the document on stdin", stdin, _Document)
    parse = _COMMANDS.get(document.command)
    if parse is None:
        raise InvalidInput(
            f"the command {document.command!r:.40} is unknown; moorage knows {', '.join(_COMMANDS)}"
        )
    raw = bytes(document.args)
    return parse(b"{}" if raw == b"null" else raw)


def command_of(stdin: bytes) -> str:
    """What a document asks for, "" if that cannot be told."""
    try:
        return msgspec.json.decode(stdin, type=_Document).command
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""


def spooled_key(stdin: bytes) -> EndpointKey:
    """What a call that waits in the spool is filed under. Raises InvalidInput for one that does not wait there."""
    match parse_call(stdin):
        case Cleanup(key):
            return key
        case Release():
            return RELEASE_KEY
        case _:
            raise InvalidInput("only release and cleanup wait for an agent")


def _allocate(raw: bytes) -> Allocate:
    args = _decoded("args of allocate", raw, _Allocate)
    labels, netgroups, requested = _asked(args.labels, args.netgroups)
    counts: dict[Family, int] = {
        4: _count("num_ipv4", args.num_ipv4),
        6: _count("num_ipv6", args.num_ipv6),
    }
    if not sum(counts.values()):
        raise InvalidInput("allocate asks for no address; give num_ipv4 or num_ipv6")
    named = [ip for ip in (requested.ip, requested.ip6) if ip is not None]
    for ip in named:
        if not counts[ip.version]:
            raise InvalidInput(
                f"the labels ask for {ip}, and num_ipv{ip.version} for no IPv{ip.version} address; make them agree"
            )
        counts[ip.version] -= 1
    counts = {family: count for family, count in counts.items() if count}
    return Allocate(_uid(args.uid), counts, tuple(named), netgroups, labels, requested)


def _reserve(raw: bytes) -> Reserve:
    args = _decoded("args of reserve", raw, _Reserve)
    labels, netgroups, requested = _asked(args.labels, args.netgroups)
    ips = _ips(args.ipv4_addrs, args.ipv6_addrs)
    if not ips:
        raise InvalidInput("reserve names no address; give ipv4_addrs or ipv6_addrs")
    _agree(ips, requested)
    return Reserve(_uid(args.uid), ips, netgroups, labels, requested)


def _release(raw: bytes) -> Release:
    args = _decoded("args of release", raw, _Release)
    if not args.uid and not args.ips:
        raise InvalidInput("release says neither whose addresses nor which; give uid or ips")
    return Release(_uid(args.uid) if args.uid else "", _addresses("ips", args.ips))


def _isolate(raw: bytes) -> Isolate:
    args = _decoded("args of isolate", raw, _Isolate)
    labels, netgroups, requested = _asked(args.labels, args.netgroups)
    if not 0 < args.pid <= LARGEST_PID:
        raise InvalidInput(f"pid must be from 1 to {LARGEST_PID}, not {args.pid!s:.40}")
    ips = _ips(args.ipv4_addrs, args.ipv6_addrs)
    if not ips:
        raise InvalidInput(
            "isolate names no address; give those that were allocated, in ipv4_addrs and ipv6_addrs"
        )
    if len({ip.version for ip in ips}) < len(ips):
        raise InvalidInput(
            f"{', '.join(map(str, ips))} are several addresses of one family; a container's interface has one of each "
            "at most"
        )
    _agree(ips, requested)
    return Isolate(_key(args.container_id), args.pid, ips, netgroups, labels)


def _cleanup(raw: bytes) -> Cleanup:
    return Cleanup(_key(_decoded("args of cleanup", raw, _Cleanup).container_id))


_COMMANDS: dict[str, Callable[[bytes], ModuleCall]] = {
    "allocate": _allocate,
    "reserve": _reserve,
    "release": _release,
    "isolate": _isolate,
    "cleanup": _cleanup,
}

_Decoded = TypeVar("_Decoded")


def _decoded(what: str, raw: bytes, kind: type[_Decoded]) -> _Decoded:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{what}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"{what}: not JSON ({error})") from None


def _asked(
    labels: _Labels, netgroups: list[str] | None
) -> tuple[tuple[Label, ...], tuple[Netgroup, ...], Requested]:
    """Labels as a list, netgroups of both sources, and what the labels ask for."""
    if isinstance(labels, dict):
        labels = [Label(key, value) for key, value in labels.items()]
    given = tuple(labels or ())
    requested = read_labels(given)
    names = read_netgroups("netgroups", [*(netgroups or ()), *requested.netgroups])
    return given, names, requested


def _count(name: str, number: int | None) -> int:
    if not 0 <= (number or 0) <= MOST_ADDRESSES:
        raise InvalidInput(f"{name} must be from 0 to {MOST_ADDRESSES}, not {number!s:.40}")
    return number or 0


def _ips(v4: list[str] | None, v6: list[str] | None) -> tuple[IPAddress, ...]:
    """Of both lists, each once. Frameworks are known to mix them up: the address says what it is."""
    return tuple(
        sorted(
            {*_addresses("ipv4_addrs", v4), *_addresses("ipv6_addrs", v6)},
            key=lambda ip: (ip.version, int(ip)),
        )
    )


def _addresses(name: str, texts: Sequence[str] | None) -> tuple[IPAddress, ...]:
    if len(texts or ()) > MOST_ADDRESSES:
        raise InvalidInput(f"{name} has {len(texts or ())} addresses; at most {MOST_ADDRESSES} are possible")
    return tuple(dict.fromkeys(read_address(f"an address in {name}", text) for text in texts or ()))


def _agree(ips: Sequence[IPAddress], requested: Requested) -> None:
    """Labels may name addresses, too, but no others."""
    for ip in (requested.ip, requested.ip6):
        if ip is not None and ip not in ips:
            raise InvalidInput(
                f"the labels ask for {ip}, and the call for {', '.join(map(str, ips))}; make them agree"
            )


def _uid(text: str) -> str:
    if not 0 < len(text) <= LONGEST_UID or not text.isprintable():
        raise InvalidInput(f"uid must be 1 to {LONGEST_UID} printable characters, not {text!r:.80}")
    return text


def _key(container_id: str) -> EndpointKey:
    if len(container_id) > LONGEST_CONTAINER_ID or _CONTAINER_ID.fullmatch(container_id) is None:
        raise InvalidInput(
            f"container_id must be 1 to {LONGEST_CONTAINER_ID} letters, digits, '_', '.' and '-', no sign first, "
            f"not {container_id!r:.100}"
        )
    return EndpointKey(container_id, IFNAME)


def describe(call: ModuleCall) -> dict[str, Any]:
    """What a log line says of it."""
    names: dict[str, Any] = {"command": type(call).__name__.lower()}
    if isinstance(call, (Isolate, Cleanup)):
        names["container_id"] = call.key.container_id
    elif call.uid:
        names["uid"] = call.uid
    return names
