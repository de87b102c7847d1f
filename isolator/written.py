"""An endpoint in writing. Its journal has all of it; what is lost with the journal is found again in two other places:

    journal         every field                                                   isolator/journal.py
    address record  what the record does not say by itself: ``Address.endpoint``  of its first address
    interface       as much as fits the alias of the node's end (``ip link``)     217 bytes; dearest things first

The store has the record as soon as it answers; the kernel has the alias from the first moment on, and is there when
the store is not. A field that none of them has holds its default, and its name stands in ``Endpoint.lost``.

Pure. A new field of Endpoint goes to all three by itself.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from ipaddress import ip_address, ip_network
from typing import Any, TypeAlias

import msgspec

from ipam.records import Address, Label
from isolator.drivers.naming import host_ifname, mac_for
from isolator.model import Asked, Bandwidth, Endpoint, EndpointKey, EndpointState, Limit, PortMapping
from isolator.netlink.seal import MOST_SAID

Fields: TypeAlias = dict[str, Any]
"""Of an Endpoint, by name, as JSON has them."""

_FOUND_AGAIN = frozenset({"state", "host_ifname", "netns", "lost"})
"""What nobody has to remember: it follows from others, or netlink/whereabouts.py finds it."""

_IN_RECORD = frozenset({"key", "engine", "network", "ips", "netgroups", "labels", "since"})
"""What an address record has in fields of its own; ips by being several."""

_DEAREST = (
    "key",
    "engine",
    "network",
    "asked",
    "request_id",
    "netgroups",
    "port_mappings",
    "bandwidth",
    "mac",
    "default_route",
    "next_hop",
    "engine_network",
    "ips",
)
"""What an alias has to say before all else."""

_NOT_IN_ALIAS = frozenset({"mtu", "since", "pools", "nameservers", "search"})
"""What the link, the time of its ADD, and its network say as well."""

_DEFAULTS = {field.name: field.default for field in fields(Endpoint) if field.default is not MISSING}

_NAMES = tuple(field.name for field in fields(Endpoint))

_LETTERS = dict(zip(_NAMES, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=False))
"""Names of fields in an alias, by their order in Endpoint; new fields are added at its end."""

_NO_ROOM = "-"
"""Name in an alias of the letters of what did not fit."""


def encode_endpoint(endpoint: Endpoint) -> bytes:
    """All of it, as JSON."""
    return msgspec.json.encode(endpoint, enc_hook=str)


def decode_endpoint(raw: bytes) -> Endpoint:
    """What ``encode_endpoint`` made, also of an earlier version.

    Raises MsgspecError, ValueError, KeyError, TypeError.
    """
    return _endpoint(msgspec.json.decode(raw, type=dict[str, Any]))


def _endpoint(known: Fields) -> Endpoint:
    return Endpoint(
        **{
            **known,
            "key": EndpointKey(*known["key"]),
            "state": EndpointState(known["state"]),
            "asked": Asked(**known["asked"]),
            "ips": tuple(ip_address(ip) for ip in known["ips"]),
            "labels": tuple(Label(**label) for label in known.get("labels", ())),
            **{name: tuple(known.get(name, ())) for name in ("netgroups", "nameservers", "search", "lost")},
            "port_mappings": tuple(map(_port_mapping, known.get("port_mappings", ()))),
            "bandwidth": msgspec.convert(known.get("bandwidth", {}), Bandwidth),
            "pools": tuple(ip_network(cidr) for cidr in known.get("pools", ())),
        }
    )


def _port_mapping(known: Fields) -> PortMapping:
    host_ip = known.get("host_ip")
    return PortMapping(**{**known, "host_ip": None if host_ip is None else ip_address(host_ip)})


# -- short, for record and alias


def _short(endpoint: Endpoint) -> Fields:
    """What is not found again, without what is so by default, and without names inside.

    Of ``asked`` there is only the time: who finds an interface is in the boot that it was made in.
    """
    default = {
        **_DEFAULTS,
        "driver": "routed",
        "mac": mac_for(endpoint.ips),
        "netgroups": (endpoint.network,),
        "engine_network": endpoint.network,
    }
    told = {
        name: _values(msgspec.to_builtins(value, enc_hook=str))
        for name in _NAMES
        if name not in _FOUND_AGAIN and (value := getattr(endpoint, name)) != default.get(name)
    }
    return {**told, "asked": endpoint.asked.at}


def _values(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value.values())
        while value and value[-1] is None:
            value.pop()
    return [_values(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _long(short: Fields, boot_id: str, network: str) -> Fields:
    """The same with names inside. Raises MsgspecError, ValueError, KeyError, TypeError, IndexError."""
    long = dict(short)
    long["asked"] = {"boot_id": boot_id, "at": msgspec.convert(short.get("asked", 0), int)}
    long["port_mappings"] = [asdict(PortMapping(*one)) for one in short.get("port_mappings", ())]
    limits = [one and asdict(Limit(*one)) for one in short.get("bandwidth", ())]
    long["bandwidth"] = dict(zip(("ingress", "egress"), limits, strict=False))
    if "labels" in short:
        long["labels"] = [{"key": one[0], "value": (*one[1:], None)[0]} for one in short["labels"]]
    return {"engine_network": network, **long}


# -- in its address record


def not_in_record() -> list[str]:
    """Names of what an address record says only in ``Address.endpoint``, and nothing else does."""
    others = {"driver", "mac", "mtu", "asked", "next_hop", "pools"}
    return [name for name in _NAMES if name not in _IN_RECORD | _FOUND_AGAIN | others]


def for_record(endpoint: Endpoint) -> Fields:
    """``Address.endpoint`` of its first address. Not of one that is not wholly known: the record may know more."""
    if endpoint.lost:
        return {}
    return {name: value for name, value in _short(endpoint).items() if name not in _IN_RECORD}


def from_record(record: Address, boot_id: str) -> Fields:
    """What the record of one of its addresses says. ``lost``: names of what it does not, because it is not the first,
    or of an earlier version."""
    known: Fields = {
        "key": [record.container_id, record.ifname],
        "engine": record.engine,
        "network": record.network,
        "netgroups": list(record.netgroups),
        "labels": [msgspec.to_builtins(label) for label in record.labels],
        "since": record.since,
    }
    try:
        if record.endpoint:
            whole = {**known, **_long(record.endpoint, boot_id, record.network)}
            assembled(whole, {})
            return whole
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, IndexError):
        pass  # whoever wrote that
    return {**known, "lost": not_in_record()}


# -- on its interface


def for_alias(endpoint: Endpoint) -> str:
    """What the alias of its node's end says behind its name: JSON, with the letters of what there was no room for.

    "" if there is not even room for whose it is.
    """
    told = {name: value for name, value in _short(endpoint).items() if name not in _NOT_IN_ALIAS}
    kept: Fields = {}
    lost = "".join(_LETTERS[name] for name in endpoint.lost if name in _LETTERS)
    left = len(told)
    for name in sorted(told, key=lambda name: _DEAREST.index(name) if name in _DEAREST else len(_DEAREST)):
        left -= 1
        longer = {**kept, _LETTERS[name]: told[name]}
        if len(_alias(longer, lost + "?" * left)) <= MOST_SAID:
            kept = longer
        else:
            lost += _LETTERS[name]
    return _alias(kept, lost).decode() if _LETTERS["key"] in kept else ""


def _alias(kept: Fields, lost: str) -> bytes:
    return msgspec.json.encode({**kept, _NO_ROOM: lost} if lost else kept)


def from_alias(alias: str, boot_id: str) -> Fields:
    """What an alias says; {} if it is none that was made here."""
    names = {letter: name for name, letter in _LETTERS.items()}
    try:
        told = msgspec.json.decode(alias, type=dict[str, Any])
        lost = [names[letter] for letter in told.pop(_NO_ROOM, "")]
        short = {names[letter]: value for letter, value in told.items()}
        known = {**_long(short, boot_id, short.get("network", "")), "lost": lost}
        assembled(known, {})
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, IndexError):
        return {}
    return known


# -- and together again


def assembled(known: Fields, otherwise: Fields) -> Endpoint:
    """The attached endpoint of which that much is known. otherwise: what holds where ``known`` has nothing; the names
    of an Endpoint's fields that have no default are in one of them.

    Raises what ``decode_endpoint`` raises.
    """
    told = {**otherwise, **{name: value for name, value in known.items() if name in _NAMES}}
    key = EndpointKey(*told["key"])
    endpoint = _endpoint(
        {
            "state": EndpointState.ATTACHED,
            "request_id": "",
            "driver": "routed",
            "netns": "",
            "ips": (),
            "mtu": 0,
            "mac": mac_for([ip_address(ip) for ip in ips]) if (ips := told.get("ips")) else "",
            "engine": "",
            "network": "",
            "netgroups": [told["network"]] if told.get("network") else [],
            **told,
            "host_ifname": host_ifname(key),
        }
    )
    for field in fields(Endpoint):
        value = getattr(endpoint, field.name)
        if not isinstance(value, _SCALARS.get(str(field.type), object)):
            raise TypeError(f"{field.name} is {value!r}")
    return endpoint


_SCALARS: dict[str, type | tuple[type, ...]] = {"int": int, "str": str, "bool": bool, "float": (int, float)}
"""What other programs may have written as something else."""
