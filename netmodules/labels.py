"""The ``moorage.*`` labels: what an app may ask for, whatever engine carries its labels.

Labels come from users. They are checked here for sense, never evaluated; whether they are *allowed* is
the network's to say (isolator). All other labels belong to the user and are only recorded.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

import msgspec

from ipam.errors import InvalidInput
from ipam.netgroups import MOST_NETGROUPS, Netgroup, parse_netgroup
from ipam.rates import parse_rate
from ipam.records import Label
from isolator.model import UNLIMITED, Bandwidth, IPAddress, Limit

PREFIX = "moorage."
DEFAULT_ROUTE = "moorage.default-route"
KNOWN = (
    "moorage.ip",
    "moorage.ip6",
    "moorage.reservation",
    "moorage.netgroups",
    "moorage.mac",
    "moorage.pool",
    DEFAULT_ROUTE,
    "moorage.bandwidth.ingress",
    "moorage.bandwidth.egress",
)
LARGEST_LABELS = 10 * 1024
"""Bytes of an endpoint's labels as JSON, which is how each of its addresses' records has them. Of such records
a hundred fit one transaction of the store (ipam/writer.py), so that one app does not delay all others."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,63}", re.ASCII)
_POOL = re.compile(r"[A-Za-z0-9:][A-Za-z0-9_.:/-]{0,62}", re.ASCII)
_MAC = re.compile(r"[0-9A-Fa-f]{2}([:-])[0-9A-Fa-f]{2}(\1[0-9A-Fa-f]{2}){4}", re.ASCII)
_LONGEST_RESERVATION = 253


@dataclass(frozen=True, slots=True)
class Requested:
    """What the ``moorage.*`` labels of one endpoint ask for."""

    ip: IPv4Address | None = None
    ip6: IPv6Address | None = None
    reservation: str | None = None
    netgroups: tuple[Netgroup, ...] = ()
    mac: str | None = None
    pool: str | None = None
    default_route: bool = False
    bandwidth: Bandwidth = UNLIMITED


def read_labels(labels: Sequence[Label]) -> Requested:
    """Raises InvalidInput naming the label, and what it may be."""
    _check_size(labels)
    ours: dict[str, str] = {}
    for label in labels:
        if label.key.startswith(PREFIX):
            value = _value(label)
            if ours.setdefault(label.key, value) != value:
                raise InvalidInput(
                    f"label {label.key} is given as {ours[label.key]!r:.80} and as {value!r:.80}"
                )
    ip = ours.get("moorage.ip")
    ip6 = ours.get("moorage.ip6")
    reservation = ours.get("moorage.reservation")
    netgroups = ours.get("moorage.netgroups")
    mac = ours.get("moorage.mac")
    pool = ours.get("moorage.pool")
    return Requested(
        ip=_ip4(ip) if ip is not None else None,
        ip6=_ip6(ip6) if ip6 is not None else None,
        reservation=_reservation(reservation) if reservation is not None else None,
        netgroups=read_netgroups("label moorage.netgroups", netgroups.split(",")) if netgroups else (),
        mac=read_mac("label moorage.mac", mac) if mac is not None else None,
        pool=_pool(pool) if pool is not None else None,
        default_route=_true_or_false(DEFAULT_ROUTE, ours.get(DEFAULT_ROUTE, "false")),
        bandwidth=Bandwidth(
            ingress=_limit("moorage.bandwidth.ingress", ours),
            egress=_limit("moorage.bandwidth.egress", ours),
        ),
    )


def wants_default_route(labels: Sequence[Label]) -> bool:
    """Whether labels that were accepted say that their interface is to have the default route."""
    return any(label.key == DEFAULT_ROUTE and (label.value or "").strip() == "true" for label in labels)


def read_name(what: str, value: str) -> str:
    """The name of a network. Raises InvalidInput."""
    if _NAME.fullmatch(value) is None:
        raise InvalidInput(f"{what} must be 1 to 63 letters, digits, '_', '.' and '-', not {value!r:.80}")
    return value


def read_netgroups(what: str, names: Sequence[str]) -> tuple[Netgroup, ...]:
    """Each name once, in the order given. Raises InvalidInput."""
    netgroups = tuple(dict.fromkeys(parse_netgroup(f"a netgroup in {what}", name.strip()) for name in names))
    if len(netgroups) > MOST_NETGROUPS:
        raise InvalidInput(f"{what} has {len(netgroups)} netgroups; at most {MOST_NETGROUPS} are possible")
    return netgroups


def read_mac(what: str, value: str) -> str:
    """A unicast MAC as ``aa:bb:cc:dd:ee:ff``. Raises InvalidInput."""
    octets = bytes.fromhex(re.sub("[:-]", "", value)) if _MAC.fullmatch(value) else b""
    if not octets or octets[0] & 1 or not any(octets):
        raise InvalidInput(f"{what} must be a unicast MAC like 02:00:00:00:00:01, not {value!r:.80}")
    return octets.hex(":")


def read_address(what: str, value: str) -> IPAddress:
    """An address that a container can have, with or without a prefix length. Raises InvalidInput."""
    host, slash, length = value.partition("/")
    try:
        address: IPAddress = IPv6Address(host) if ":" in host else IPv4Address(host)
    except AddressValueError:
        raise InvalidInput(f"{what} must be an IP address, not {value!r:.80}") from None
    if slash and not (length.isascii() and length.isdigit() and int(length[:4]) <= address.max_prefixlen):
        raise InvalidInput(f"{what} has no valid prefix length: {value!r:.80}")
    if isinstance(address, IPv6Address) and (address.scope_id or address.ipv4_mapped):
        raise InvalidInput(f"{what} must be a plain IPv6 address, not {value!r:.80}")
    if address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local:
        raise InvalidInput(f"{what} must be a unicast address that other hosts can reach, not {address}")
    return address


def _value(label: Label) -> str:
    """The value of a ``moorage.*`` label, trimmed."""
    if label.key not in KNOWN:
        close = difflib.get_close_matches(label.key, KNOWN, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InvalidInput(f"label {label.key!r:.80} is unknown; {hint}moorage knows {', '.join(KNOWN)}")
    value = (label.value or "").strip()
    if not value:
        raise InvalidInput(f"label {label.key} has no value; give it one or leave it out")
    return value


def _check_size(labels: Sequence[Label]) -> None:
    size = len(msgspec.json.encode(labels))
    if size > LARGEST_LABELS:
        raise InvalidInput(
            f"the {len(labels)} labels are {size} bytes as JSON, which is how they are recorded; at most "
            f"{LARGEST_LABELS} are possible: remove some from the app"
        )


def _ip4(value: str) -> IPv4Address:
    address = read_address("label moorage.ip", value)
    if not isinstance(address, IPv4Address):
        raise InvalidInput(f"label moorage.ip must be an IPv4 address, not {address}; use moorage.ip6")
    return address


def _ip6(value: str) -> IPv6Address:
    address = read_address("label moorage.ip6", value)
    if not isinstance(address, IPv6Address):
        raise InvalidInput(f"label moorage.ip6 must be an IPv6 address, not {address}; use moorage.ip")
    return address


def _pool(value: str) -> str:
    if _POOL.fullmatch(value) is None:
        raise InvalidInput(f"label moorage.pool must be a pool's CIDR or name, not {value!r:.80}")
    return value


def _reservation(value: str) -> str:
    if len(value) > _LONGEST_RESERVATION or not value.isprintable():
        raise InvalidInput(
            f"label moorage.reservation must be at most {_LONGEST_RESERVATION} printable characters, "
            f"not {value!r:.80}"
        )
    return value


def _limit(name: str, ours: Mapping[str, str]) -> Limit | None:
    return Limit(parse_rate(f"label {name}", ours[name])) if name in ours else None


def _true_or_false(name: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise InvalidInput(f"label {name} must be true or false, not {value!r:.80}")
    return value == "true"
