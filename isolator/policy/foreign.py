"""Other firewalls of the node: what in them would drop containers' traffic, and the command that lets it pass.

An accept in our table does not overrule a drop in another. So whatever hooks into forwarding and drops by policy, or by
a rule that asks nothing, has to let pass what comes from or goes to interfaces ``mrg*``. Pure; others.py reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from isolator.netlink import ENDPOINT_PREFIX
from isolator.policy.others import Chain, Rule, Ruleset

DIRECTIONS = ("iifname", "oifname")
_EXAMPLE = ENDPOINT_PREFIX + "abcdefghijkl"

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


@dataclass(frozen=True, slots=True)
class Blocked:
    """A chain that drops containers' traffic. why: as words. commands: shell commands that let it pass."""

    chain: Chain
    why: str
    commands: tuple[str, ...]


def blocked(ruleset: Ruleset, *, has_iptables: bool) -> list[Blocked]:
    """Every chain of somebody else's that would drop what is forwarded from or to a container.

    has_iptables: whether the machine has the programs ``iptables-nft`` and ``ip6tables-nft``.
    """
    found = []
    for chain in ruleset.bases:
        why = why_blocked(ruleset, chain)
        if why:
            found.append(Blocked(chain, why, tuple(_commands(ruleset, chain, has_iptables))))
    return found


def why_blocked(ruleset: Ruleset, chain: Chain) -> str:
    """Why a packet from or to a container does not get through a base chain; "" if it does, or may."""
    for direction in DIRECTIONS:
        end = end_of(ruleset, chain, direction)
        if end in ("drop", "reject"):
            return f"a rule in it would {end} it"
        if end is None and ruleset.bases[chain] == "drop":
            return f"its policy is drop and no rule in it lets interfaces {ENDPOINT_PREFIX}* pass"
    return ""


def end_of(
    ruleset: Ruleset, chain: Chain, direction: str, known: dict[Chain, str | None] | None = None
) -> str | None:
    """What surely becomes of a packet with a container's interface in that direction: accept, drop, reject; other, if
    nobody here knows; None: it leaves the chain.

    Rules that ask for anything but that interface are for some packets only, and are passed over. known: what became
    of it in other chains, so that each is gone through once.
    """
    known = {} if known is None else known
    if chain not in known:
        known[chain] = None  # what was read while it changed may lead back to where it came from
        known[chain] = _end(ruleset, chain, direction, known)
    return known[chain]


def _end(ruleset: Ruleset, chain: Chain, direction: str, known: dict[Chain, str | None]) -> str | None:
    for rule in ruleset.rules.get(chain, ()):
        if not _is_for_containers(rule, direction):
            continue
        if rule.verdict == "return":
            return None
        if rule.verdict in ("jump", "goto"):
            end = end_of(ruleset, chain._replace(name=rule.target), direction, known)
            if end is not None or rule.verdict == "goto":
                return end
        elif rule.verdict:
            return rule.verdict
    return None


def _is_for_containers(rule: Rule, direction: str) -> bool:
    """Whether a rule is for every packet with a container's interface in that direction."""
    return not rule.asks_more and all(
        asked.direction == direction and asked.holds(_EXAMPLE) for asked in rule.asked
    )


def _commands(ruleset: Ruleset, chain: Chain, has_iptables: bool) -> Iterator[str]:
    if chain.table == "firewalld":
        yield from _FIREWALLD
    elif has_iptables and chain.name == "FORWARD" and chain.table == "filter" and chain.family in _IPTABLES:
        # Docker leaves this one alone when it writes its rules anew.
        leads_there = any(rule.target == "DOCKER-USER" for rule in ruleset.rules[chain])
        name = "DOCKER-USER" if leads_there else chain.name
        for option in ("-i", "-o"):
            yield f"{_IPTABLES[chain.family]} -I {name} {option} {ENDPOINT_PREFIX}+ -j ACCEPT"
    else:
        for direction in DIRECTIONS:
            rule = f'{direction} "{ENDPOINT_PREFIX}*" accept'
            yield f"nft insert rule {chain.family} {chain.table} {chain.name} '{rule}'"
