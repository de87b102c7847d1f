"""What other tables do to forwarded packets, read over netlink: their chains, and of their rules what can be judged.

libnftables would read all tables to tell of one; here only the chains that hook into forwarding are read, and what
they jump to. So a node with 20,000 rules for NAT costs no more than a list of its chains' names. iptables' rules are in
here where it is the nft kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from isolator.netlink import codec
from isolator.netlink.codec import Message, Request
from isolator.netlink.socket import NetlinkSocket
from isolator.policy.ruleset import TABLE

MOST_RULES = 5_000
"""Rules that are read at one look, some 100 ms of work. What comes after them is passed over."""

_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
"""NFPROTO_*: those that see forwarded packets of IP."""
_NUMBERS = {name: number for number, name in _FAMILIES.items()}

_SUBSYSTEM = 10 << 8
_GETCHAIN, _GETRULE = (_SUBSYSTEM | kind for kind in (4, 7))
_GONE = (2,)  # ENOENT: the chain went between two requests

_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY = 1, 3, 4, 5
_HOOK_NUMBER, _FORWARD = 1, 2
_DROP_POLICY = 0
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS, _RULE_USERDATA = 1, 2, 3, 4, 7
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_META_DREG, _META_KEY = 1, 2
_META_KEYS = {6: "iifname", 7: "oifname"}
_CMP_SREG, _CMP_OP, _CMP_DATA = 1, 2, 3
_EQUAL, _NOT_EQUAL = 0, 1
_IMMEDIATE_DATA, _VALUE, _VERDICT = 2, 1, 2
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_VERDICTS = {0: "drop", 1: "accept", -3: "jump", -4: "goto", -5: "return"}
_GOES_ON = (-1, -2)  # NFT_CONTINUE, NFT_BREAK
_LOOKUP_DREG = 3
_XT_NAME, _MATCH_INFO = 1, 3

_ASKS_NOTHING = frozenset({"counter", "log", "last", "notrack"})
_ASKS = frozenset(
    {"lookup", "range", "limit", "quota", "connlimit", "dynset", "objref", "bitwise", "byteorder"}
)
_HARMLESS_TARGETS = frozenset({"LOG", "NFLOG"})


class Chain(NamedTuple):
    """A chain's name and place."""

    family: str
    table: str
    name: str

    def __str__(self) -> str:
        return f"chain {self.name} of table {self.family} {self.table}"


class Asked(NamedTuple):
    """A condition on the name of a packet's interface.

    direction: iifname or oifname. name: a prefix if it ends in *. equal: whether it has to be that, or anything else.
    """

    direction: str
    name: str
    equal: bool = True

    def holds(self, ifname: str) -> bool:
        prefix = self.name.removesuffix("*")
        return (ifname.startswith(prefix) if prefix != self.name else ifname == self.name) is self.equal


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. verdict: accept, drop, reject, return, jump, goto; other, which nobody here understands; "" for none.

    asks_more: it asks something besides interfaces' names, so it is for some packets only. target: of jump and goto.
    """

    handle: int
    asked: tuple[Asked, ...]
    asks_more: bool
    verdict: str
    target: str = ""
    comment: str = ""

    @property
    def is_for_all(self) -> bool:
        """Whether it asks nothing at all."""
        return not self.asked and not self.asks_more


@dataclass(frozen=True, slots=True)
class Ruleset:
    """bases: the chains that hook into forwarding -> accept or drop, their policy. rules: of those and of all chains
    that they lead to."""

    bases: Mapping[Chain, str] = field(default_factory=dict)
    rules: Mapping[Chain, tuple[Rule, ...]] = field(default_factory=dict)


def read(netfilter: NetlinkSocket, also: Iterable[Chain] = ()) -> Ruleset:
    """What hooks into forwarding now, our own table left out. Raises KernelRefused.

    also: chains to be read even if no rule leads to them. What somebody changes meanwhile may be part old, part new.
    """
    bases = dict(_bases(netfilter))
    rules: dict[Chain, tuple[Rule, ...]] = {}
    waiting = [*also, *bases]
    left = MOST_RULES
    while waiting:
        chain = waiting.pop()
        if chain in rules:
            continue
        rules[chain] = found = tuple(_rules(netfilter, chain, left))
        left -= len(found)
        waiting += [chain._replace(name=rule.target) for rule in found if rule.target]
    return Ruleset(bases, rules)


def _bases(netfilter: NetlinkSocket) -> Iterator[tuple[Chain, str]]:
    for family, name in _FAMILIES.items():
        request = Request(_GETCHAIN, 0, bytes([family, 0, 0, 0]), "list the chains of other tables", _GONE)
        for message in _stream(netfilter, request):
            found = codec.attributes(message.body, 4)
            hook = found.get(_CHAIN_HOOK)
            if hook is None or _number(codec.attributes(hook).get(_HOOK_NUMBER)) != _FORWARD:
                continue
            chain = Chain(name, codec.as_text(found.get(_CHAIN_TABLE)), codec.as_text(found.get(_CHAIN_NAME)))
            if (chain.family, chain.table) != ("inet", TABLE):
                policy = found.get(_CHAIN_POLICY)
                yield chain, "drop" if policy is not None and _number(policy) == _DROP_POLICY else "accept"


def _rules(netfilter: NetlinkSocket, chain: Chain, most: int) -> Iterator[Rule]:
    body = (
        bytes([_NUMBERS[chain.family], 0, 0, 0])
        + codec.text(_RULE_TABLE, chain.table)
        + codec.text(_RULE_CHAIN, chain.name)
    )
    for message in _stream(netfilter, Request(_GETRULE, 0, body, f"list the rules of {chain}", _GONE)):
        found = codec.attributes(message.body, 4)
        # An older kernel gives those of other chains, too.
        if (
            most > 0
            and codec.as_text(found.get(_RULE_CHAIN)) == chain.name
            and codec.as_text(found.get(_RULE_TABLE)) == chain.table
        ):
            most -= 1
            yield _rule(found)


def _stream(netfilter: NetlinkSocket, request: Request) -> Iterator[Message]:
    """Without reading again what changes meanwhile: the generation is another then, and so there is a next look."""
    for datagram in netfilter.stream(request):
        for message in codec.messages(datagram):
            if message.kind & 0xFF00 == _SUBSYSTEM:
                yield message


def _rule(found: codec.Attributes) -> Rule:
    asked: list[Asked] = []
    loaded: dict[bytes, str] = {}
    asks_more, verdict, target = False, "", ""
    comment = _comment(found.get(_RULE_USERDATA))
    for name, data in _expressions(found.get(_RULE_EXPRESSIONS)):
        match name:
            case "meta":
                register = bytes(data.get(_META_DREG, b""))
                loaded[register] = _META_KEYS.get(_number(data.get(_META_KEY)), "")
            case "cmp":
                direction = loaded.get(bytes(data.get(_CMP_SREG, b"")), "")
                operator = _number(data.get(_CMP_OP))
                if direction and operator in (_EQUAL, _NOT_EQUAL):
                    asked.append(Asked(direction, _interface(data[_CMP_DATA]), operator == _EQUAL))
                else:
                    asks_more = True
            case "immediate":
                values = codec.attributes(data[_IMMEDIATE_DATA])
                if _VERDICT in values:
                    verdict, target = _verdict(values[_VERDICT])
            case "lookup" if _LOOKUP_DREG in data:
                asks_more, verdict = True, "other"  # a verdict by map
                loaded.clear()
            case "reject":
                verdict = "reject"
            case "target":
                kind = codec.as_text(data.get(_XT_NAME))
                if kind not in _HARMLESS_TARGETS:
                    verdict = "reject" if kind == "REJECT" else "other"
            case "match":
                if codec.as_text(data.get(_XT_NAME)) == "comment":
                    text = bytes(data.get(_MATCH_INFO, b""))
                    comment = text.partition(b"\0")[0].decode(errors="replace")
                else:
                    asks_more = True
            case _ if name in _ASKS_NOTHING:
                pass
            case _ if name in _ASKS:
                asks_more = True
                loaded.clear()
            case _:
                # It loads something into a register, or is a verdict that nobody here knows (queue).
                loaded.clear()
                verdict = verdict or ("other" if name in ("queue", "synproxy", "tproxy") else "")
    handle = _number(found.get(_RULE_HANDLE))
    return Rule(handle, tuple(asked), asks_more, verdict, target, comment)


def _expressions(raw: memoryview | None) -> Iterable[tuple[str, codec.Attributes]]:
    for element in codec.each(raw) if raw is not None else ():
        parts = codec.attributes(element)
        data = parts.get(_EXPRESSION_DATA)
        yield codec.as_text(parts.get(_EXPRESSION_NAME)), codec.attributes(data) if data is not None else {}


def _interface(data: memoryview) -> str:
    """A whole name ends in a zero, or fills all 16 bytes; what does not is a prefix."""
    raw = bytes(codec.attributes(data).get(_VALUE, b""))
    name, zero, _ = raw.partition(b"\0")
    return name.decode(errors="replace") + ("" if zero else "*")


def _verdict(raw: memoryview) -> tuple[str, str]:
    found = codec.attributes(raw)
    code = int.from_bytes(found.get(_VERDICT_CODE, b""), "big", signed=True)
    if code in _GOES_ON:
        return "", ""
    return _VERDICTS.get(code, "other"), codec.as_text(found.get(_VERDICT_CHAIN))


def _comment(userdata: memoryview | None) -> str:
    """nft's own comment: type 0, a length, and a text that ends in a zero."""
    raw = bytes(userdata or b"")
    while len(raw) >= 2:
        kind, length, raw = raw[0], raw[1], raw[2:]
        if kind == 0:
            return raw[:length].rstrip(b"\0").decode(errors="replace")
        raw = raw[length:]
    return ""


def _number(value: memoryview | None) -> int:
    return int.from_bytes(value or b"", "big")
