"""Other firewalls of the node: what in them would drop containers' traffic, and the command that lets it pass.

An accept in our table does not overrule a drop in another. So whatever hooks into forwarding and drops by policy, or by
a rule that asks nothing, has to let pass what comes from or goes to interfaces ``mrg*``. Pure: reads the ruleset as
``nft -j list ruleset`` gives it (libnftables-json(5)); iptables' rules are in there where it is the nft kind.
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from isolator.netlink import ENDPOINT_PREFIX
from isolator.policy.ruleset import TABLE

_FAMILIES = ("ip", "ip6", "inet")
_EXAMPLE = ENDPOINT_PREFIX + "abcdefghijkl"
_DEEPEST = 16

_IPTABLES = {"ip": "iptables-nft", "ip6": "ip6tables-nft"}
"""By these names: plain ``iptables`` may be the old kind, whose rules are elsewhere and would help nobody."""

_FIREWALLD = (
    "firewall-cmd --permanent --new-zone=moorage",
    f"firewall-cmd --permanent --zone=moorage --add-interface={ENDPOINT_PREFIX}+",
    *(
        f"firewall-cmd --permanent {words}"
        for policy, one, other in (("moorage-out", "moorage", "ANY"), ("moorage-in", "ANY", "moorage"))
        for words in (
            f"--new-policy={policy}",
            f"--policy={policy} --add-ingress-zone={one}",
            f"--policy={policy} --add-egress-zone={other}",
            f"--policy={policy} --set-target=ACCEPT",
        )
    ),
    "firewall-cmd --reload",
)
"""A zone for containers, and all that is forwarded from or to it let pass: our table judges that. Not the zone
``trusted``, which would open every port of the node itself to containers. Policies need firewalld 0.9."""


class Chain(NamedTuple):
    """A chain's name and place."""

    family: str
    table: str
    name: str

    def __str__(self) -> str:
        return f"chain {self.name} of table {self.family} {self.table}"


@dataclass(frozen=True, slots=True)
class Blocked:
    """A chain that drops containers' traffic. why: as words. commands: shell commands that let it pass."""

    chain: Chain
    why: str
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Ruleset:
    """bases: the chains that forwarding passes, with their policies."""

    chains: frozenset[Chain]
    bases: Mapping[Chain, str]
    rules: Mapping[Chain, Sequence[Sequence[Mapping[str, Any]]]]


def blocked(listing: Mapping[str, Any], *, has_iptables: bool) -> list[Blocked]:
    """Every chain of somebody else's that would drop what is forwarded from or to a container.

    has_iptables: whether the machine has the programs ``iptables-nft`` and ``ip6tables-nft``.
    """
    ruleset = _read(listing)
    found = []
    for chain, policy in ruleset.bases.items():
        why = _why(ruleset, chain, policy)
        if why:
            found.append(Blocked(chain, why, tuple(_commands(ruleset, chain, has_iptables))))
    return found


def _read(listing: Mapping[str, Any]) -> _Ruleset:
    chains: set[Chain] = set()
    bases: dict[Chain, str] = {}
    rules: defaultdict[Chain, list[Sequence[Mapping[str, Any]]]] = defaultdict(list)
    for entry in listing.get("nftables", ()):
        for kind, what in entry.items():
            if kind not in ("chain", "rule") or what["family"] not in _FAMILIES:
                continue
            if (what["family"], what["table"]) == ("inet", TABLE):
                continue
            if kind == "rule":
                rules[Chain(what["family"], what["table"], what["chain"])].append(what["expr"])
                continue
            chain = Chain(what["family"], what["table"], what["name"])
            chains.add(chain)
            if what.get("hook") == "forward":
                bases[chain] = what.get("policy", "accept")
    return _Ruleset(frozenset(chains), bases, rules)


def _why(ruleset: _Ruleset, chain: Chain, policy: str) -> str:
    """Why a packet from or to a container does not get through; "" if it does, or may."""
    for direction in ("iifname", "oifname"):
        end = _end(ruleset, chain, direction, 0)
        if end in ("drop", "reject"):
            return f"a rule in it would {end} it"
        if end is None and policy == "drop":
            return "its policy is drop and no rule in it lets interfaces mrg* pass"
    return ""


def _end(ruleset: _Ruleset, chain: Chain, direction: str, depth: int) -> str | None:
    """What surely becomes of a packet with a container's interface: accept, drop, reject; None: it leaves the chain.

    Rules that ask for anything but the interface are for some packets only, and are passed over.
    """
    for expressions in ruleset.rules.get(chain, ()) if depth < _DEEPEST else ():
        if not all(_holds(expression, direction) for expression in expressions):
            continue
        for expression in expressions:
            for verdict in ("accept", "drop", "reject", "return"):
                if verdict in expression:
                    return None if verdict == "return" else verdict
            for verdict in ("jump", "goto"):
                if verdict in expression:
                    target = Chain(chain.family, chain.table, expression[verdict]["target"])
                    end = _end(ruleset, target, direction, depth + 1)
                    if end is not None or verdict == "goto":
                        return end
    return None


def _holds(expression: Mapping[str, Any], direction: str) -> bool:
    """Whether an expression holds for every packet with a container's interface in that direction."""
    if "match" in expression:
        match = expression["match"]
        name = match["right"]
        left = match["left"].get("meta", {}).get("key") if isinstance(match["left"], dict) else None
        return (
            match["op"] == "=="
            and left == direction
            and isinstance(name, str)
            and fnmatch.fnmatchcase(_EXAMPLE, name)
        )
    # What iptables knows and nft does not is told as xt, and nobody knows here what it asks.
    return not expression.keys() & {"xt", "limit", "lookup", "vmap"}


def _commands(ruleset: _Ruleset, chain: Chain, has_iptables: bool) -> Iterator[str]:
    if chain.table == "firewalld":
        yield from _FIREWALLD
    elif has_iptables and chain.name == "FORWARD" and chain.table == "filter" and chain.family in _IPTABLES:
        # Docker leaves this one alone when it writes its rules anew.
        kept = Chain(chain.family, chain.table, "DOCKER-USER")
        name = kept.name if kept in ruleset.chains else chain.name
        for option in ("-i", "-o"):
            yield f"{_IPTABLES[chain.family]} -I {name} {option} {ENDPOINT_PREFIX}+ -j ACCEPT"
    else:
        for direction in ("iifname", "oifname"):
            rule = f'{direction} "{ENDPOINT_PREFIX}*" accept'
            yield f"nft insert rule {chain.family} {chain.table} {chain.name} '{rule}'"
