"""What the kernel holds of table ``inet moorage``, read over netlink.

libnftables writes, because it checks what it is told; but it fetches every element to answer any question
about a table (70 ms with 10,000), so what is asked often is asked here.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address

from ipam.keys import IPNetwork
from ipam.ranges import Range, Ranges
from isolator.model import IPAddress
from isolator.netlink import codec
from isolator.netlink.codec import Request
from isolator.netlink.socket import NetlinkSocket
from isolator.policy.ruleset import TABLE

_SUBSYSTEM = 10 << 8
_GETTABLE, _GETCHAIN, _GETRULE, _GETSETELEM, _GETGEN = (_SUBSYSTEM | kind for kind in (1, 4, 7, 13, 16))
_INET = bytes([1, 0, 0, 0])  # nfgenmsg: NFPROTO_INET, version, resource
_NAME_OF_TABLE = 1  # in tables, chains, rules and elements alike
_GEN_ID = 1
_NAME_OF_CHAIN, _CHAIN_OF_RULE = 3, 2
_USE_OF_TABLE, _USE_OF_CHAIN = 3, 6
_ELEMENTS_OF_SET, _ELEMENTS, _ELEMENT = 2, 3, 1
_KEY, _DATA, _FLAGS, _EXPRESSION = 1, 2, 3, 7  # of an element
_EXPRESSION_DATA, _COUNT = 2, 1  # of an expression, and of "ct count over"
_VALUE, _VERDICT = 1, 2  # of data
_VERDICT_CHAIN = 2
_INTERVAL_END = 1

_SIZE = {"ifname": 16, "mac": 8, "proto": 4, "port": 4, "4": 4, "6": 16}
"""Bytes that a part of a key takes in the kernel, padded."""

_SHAPES = {
    "senders": (("ifname", "mac", "ip"), ()),
    "endpoints": (("ifname", "ip"), ()),
    "receivers": (("ifname", "ip"), ()),
    "hairpin": (("ip", "ip"), ()),
    "quoted": (("ip", "number"), ()),
    "tunnel": (("port",), ()),
    "tunnels": (("port",), ()),
    "guarded": (("proto", "port"), ()),
    "connections": (("ifname",), ()),
    "halted": (("ifname",), ()),
    "ports": (("proto", "port"), ("ip", "port")),
    "portsat": (("ip", "proto", "port"), ("ip", "port")),
}
"""Sets and maps, less their family -> what keys and data are made of; all others hold plain addresses."""


def generation(netfilter: NetlinkSocket) -> int:
    """A number that grows with every change to any table of the namespace."""
    message = netfilter.get(Request(_GETGEN, 0, bytes(4), "read the ruleset's generation"))
    found = codec.attributes(message.body, 4).get(_GEN_ID) if message is not None else None
    return int.from_bytes(found or b"", "big")


def fingerprints(netfilter: NetlinkSocket) -> dict[str, bytes] | None:
    """Chain -> a digest of it and its rules, but not of the table's elements; None if the table is gone.

    The table's own identity stands under "": the kernel numbers tables as they are made, so one that was deleted and
    made again differs.
    """
    ours = _INET + codec.text(_NAME_OF_TABLE, TABLE)
    table = netfilter.get(Request(_GETTABLE, 0, ours, "read table inet moorage", (errno.ENOENT,)))
    if table is None:
        return None
    chains = netfilter.dump(Request(_GETCHAIN, 0, ours, "list the chains of table inet moorage"))
    rules = netfilter.dump(Request(_GETRULE, 0, ours, "list the rules of table inet moorage"))
    digests = {"": hashlib.blake2s(_without(_USE_OF_TABLE, table.body))}
    for messages, name_of_chain, use in (
        (chains, _NAME_OF_CHAIN, _USE_OF_CHAIN),
        (rules, _CHAIN_OF_RULE, None),
    ):
        for message in messages:
            found = codec.attributes(message.body, 4)
            if codec.as_text(found.get(_NAME_OF_TABLE)) == TABLE:
                digest = digests.setdefault(codec.as_text(found.get(name_of_chain)), hashlib.blake2s())
                digest.update(message.body[4:] if use is None else _without(use, message.body))
    return {name: digest.digest() for name, digest in digests.items()}


def _without(use: int, body: memoryview) -> bytes:
    """A table or chain less the count of what refers to it, which elements do, too."""
    return b"".join(bytes(v) for kind, v in codec.attributes(body, 4).items() if kind != use)


def pairs(netfilter: NetlinkSocket) -> Iterator[tuple[str, IPAddress]]:
    """(interface, ip) of every element in endpoints4 and endpoints6; none if the table is gone."""
    for family in (4, 6):
        for key, _ in _raw(netfilter, f"endpoints{family}"):
            yield codec.as_text(key[:16]), ip_address(bytes(key[16:]))


def macs(netfilter: NetlinkSocket) -> dict[str, str]:
    """Interface -> MAC of every element in senders4 and senders6."""
    return {
        codec.as_text(key[:16]): bytes(key[16:22]).hex(":")
        for family in (4, 6)
        for key, _ in _raw(netfilter, f"senders{family}")
    }


def addresses(netfilter: NetlinkSocket, name: str) -> list[IPAddress]:
    """The elements of a set of plain addresses; none if there is no such set."""
    return [ip_address(bytes(key)) for key, _ in _raw(netfilter, name)]


def elements(netfilter: NetlinkSocket, name: str) -> set[str]:
    """What a set or map of ours holds, as ruleset.py would write it; nothing if there is no such set."""
    family = name[-1] if name[-1] in "46" else ""
    shape, target = _SHAPES.get(name.rstrip("46"), (("ip",), ()))
    if name.startswith("netgroup"):
        family = name[len("netgroup")]
    found = set()
    for key, element in _raw(netfilter, name):
        text = _words(key, shape, family)
        if _DATA in element:
            text += f" : {_data(element[_DATA], target, family)}"
        if _EXPRESSION in element:
            text += f" ct count over {_limit(element[_EXPRESSION])}"
        found.add(text)
    return found


def has(netfilter: NetlinkSocket, name: str, element: str) -> bool:
    """Whether a set or map of ours holds the key of an element that is written as ruleset.py does; of an interval set,
    whether the address lies in it."""
    family = name[-1] if name[-1] in "46" else ""
    shape, _ = _SHAPES.get(name.rstrip("46"), (("ip",), ()))
    if name.startswith("netgroup"):
        family = name[len("netgroup")]
    words = re.split(" ct count | : ", element)[0].split(" . ")
    key = b"".join(_packed(word, part, family) for word, part in zip(words, shape, strict=True))
    value = codec.nested(_KEY, codec.attribute(_VALUE, key))
    body = (
        _INET
        + codec.text(_NAME_OF_TABLE, TABLE)
        + codec.text(_ELEMENTS_OF_SET, name)
        + codec.nested(_ELEMENTS, codec.nested(_ELEMENT, value))
    )
    request = Request(_GETSETELEM, 0, body, f"look into the set {name}", (errno.ENOENT,))
    return netfilter.get(request) is not None


def covers(netfilter: NetlinkSocket, name: str, networks: Iterable[IPNetwork]) -> bool:
    """Whether an interval set holds just these disjoint networks."""
    wanted = {(int(n.network_address), False) for n in networks}
    wanted |= {(int(n.broadcast_address) + 1, True) for n in networks}
    there = set()
    for key, element in _raw(netfilter, name):
        end = int.from_bytes(element.get(_FLAGS, b"\0"), "big") & _INTERVAL_END
        there.add((int.from_bytes(key, "big"), bool(end)))
    # The kernel's first element may be the end of what lies before everything.
    return wanted == there - {(0, True)}


def intervals(netfilter: NetlinkSocket, name: str) -> Ranges:
    """What an interval set holds; nothing if there is no such set."""
    ends = []
    for key, element in _raw(netfilter, name):
        is_end = int.from_bytes(element.get(_FLAGS, b"\0"), "big") & _INTERVAL_END
        # Where one ends and another begins, the end comes first.
        ends.append((int.from_bytes(key, "big"), not is_end, 8 * len(key)))
    found, first = [], None
    for value, begins, _ in sorted(ends):
        if first is not None:
            found.append(Range(first, value - 1))
        first = value if begins else None
    if first is not None:
        found.append(Range(first, (1 << ends[0][2]) - 1))
    return Ranges(found)


def _raw(netfilter: NetlinkSocket, name: str) -> Iterator[tuple[memoryview, codec.Attributes]]:
    """Key and attributes of every element."""
    body = _INET + codec.text(_NAME_OF_TABLE, TABLE) + codec.text(_ELEMENTS_OF_SET, name)
    request = Request(_GETSETELEM, 0, body, f"list the set {name}", (errno.ENOENT,))
    for message in netfilter.dump(request):
        found = codec.attributes(message.body, 4).get(_ELEMENTS)
        for element in codec.each(found) if found is not None else ():
            parts = codec.attributes(element)
            if _KEY in parts:
                yield codec.attributes(parts[_KEY])[_VALUE], parts


def _words(raw: memoryview, shape: Sequence[str], family: str) -> str:
    words = []
    for part in shape:
        kind = family if part in ("ip", "number") else part
        value, raw = bytes(raw[: _SIZE[kind]]), raw[_SIZE[kind] :]
        match part:
            case "ifname":
                words.append(f'"{codec.as_text(memoryview(value))}"')
            case "mac":
                words.append(value[:6].hex(":"))
            case "number":
                words.append(f"{int.from_bytes(value, 'big'):#x}")
            case "ip":
                words.append(str(ip_address(value)))
            case "proto":
                words.append(str(value[0]))
            case _:
                words.append(str(int.from_bytes(value[:2], "big")))
    return " . ".join(words)


def _packed(word: str, part: str, family: str) -> bytes:
    """A part of a key as the kernel has it, padded."""
    match part:
        case "ifname":
            packed = word.strip('"').encode()
        case "mac":
            packed = bytes.fromhex(word.replace(":", ""))
        case "ip":
            packed = ip_address(word).packed
        case "number":
            packed = int(word, 0).to_bytes(_SIZE[family], "big")
        case "proto":
            packed = bytes([int(word)])
        case _:
            packed = int(word).to_bytes(2, "big")
    return packed.ljust(_SIZE[family if part in ("ip", "number") else part], b"\0")


def _limit(expression: memoryview) -> int:
    data = codec.attributes(codec.attributes(expression)[_EXPRESSION_DATA])
    return int.from_bytes(data[_COUNT], "big")


def _data(data: memoryview, shape: Sequence[str], family: str) -> str:
    found = codec.attributes(data)
    if _VERDICT not in found:
        return _words(found[_VALUE], shape, family)
    chain = codec.attributes(found[_VERDICT]).get(_VERDICT_CHAIN)
    return f"jump {codec.as_text(chain)}" if chain is not None else "accept"
