"""Accepts of ours in Docker's chain DOCKER-USER, where Docker's own policy is all that drops containers' traffic.

    FORWARD, policy drop
      -j DOCKER-USER
           whatever the administrator has put there           judges first, so a drop in there stands
           -i docker0 -j RETURN, -o docker0 -j RETURN          \\  one pair for each of Docker's bridges: what has
           -i br-… -j RETURN, -o br-… -j RETURN                 > to do with Docker's containers is left to Docker
           -i mrg+ -j ACCEPT, -o mrg+ -j ACCEPT                /
           -j RETURN                                           Docker's, up to version 27
      -j DOCKER-…                                              Docker's own rules

Docker keeps what is in DOCKER-USER when it starts again. Whether the policy is Docker's own is read from what else is
in FORWARD: if that is nothing but what Docker writes, nobody else has a say in it. Why, and what was rejected:
docs/decisions/accepts-in-dockers-chain.md. Pure; others.py reads, nft.py writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from isolator.netlink import ENDPOINT_PREFIX
from isolator.policy.foreign import DIRECTIONS, end_of, why_blocked
from isolator.policy.others import Asked, Chain, Rule, Ruleset

CHAINS = (Chain("ip", "filter", "DOCKER-USER"), Chain("ip6", "filter", "DOCKER-USER"))
"""To be read also where nothing leads to them (any more)."""
COMMENT = "moorage: containers pass the policy of FORWARD"
"""Ours are told from others' by it. iptables shows it, and keeps it when it saves and restores."""

_FORWARD = tuple(chain._replace(name="FORWARD") for chain in CHAINS)
_DOCKERS = frozenset(
    {
        "DOCKER", "DOCKER-USER", "DOCKER-FORWARD", "DOCKER-INGRESS",
        "DOCKER-ISOLATION", "DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2",
    }
)  # fmt: skip
"""Chains that Docker jumps to from FORWARD, versions 17 to 28. An administrator's may have a name like these."""
_PLAIN = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")
"""Names of bridges that may be rule text. Users choose them."""


class Line(NamedTuple):
    """What a rule of ours says."""

    direction: str
    name: str
    verdict: str

    def __str__(self) -> str:
        return f'{self.direction} "{self.name}" counter {self.verdict} comment "{COMMENT}"'


@dataclass(frozen=True, slots=True)
class Edit:
    """Take rules of ours out of a chain, and put lines into it, in one transaction.

    doomed: handles. before: the handle of the rule that they go before; None for the chain's end.
    """

    chain: Chain
    doomed: tuple[int, ...]
    lines: tuple[Line, ...]
    before: int | None

    @property
    def commands(self) -> str:
        """For nft."""
        place = " ".join(self.chain)
        adding = f"add rule {place}" if self.before is None else f"insert rule {place} position {self.before}"
        return "\n".join(
            [
                *(f"delete rule {place} handle {handle}" for handle in self.doomed),
                *(f"{adding} {line}" for line in self.lines),
            ]
        )


def edits(ruleset: Ruleset, *, wanted: bool) -> list[Edit]:
    """What is to be done so that ours are in DOCKER-USER where they have to be, and nowhere else.

    wanted: whether the node has containers, and the administrator leaves it to us.
    """
    return [edit for chain in CHAINS if (edit := _edit(ruleset, chain, wanted=wanted)) is not None]


def has_ours(ruleset: Ruleset) -> list[Chain]:
    """The chains that hold rules of ours."""
    return [chain for chain in CHAINS if any(map(_is_ours, ruleset.rules.get(chain, ())))]


def is_dockers_alone(ruleset: Ruleset, forward: Chain) -> bool:
    """Whether Docker's own policy for a base chain, and nothing else of that family, would drop containers' traffic but
    for ours."""
    if forward not in _FORWARD:
        return False
    theirs = _without_ours(ruleset)
    if theirs.bases.get(forward) != "drop" or not _is_dockers(theirs, forward):
        return False
    others = [
        chain for chain in theirs.bases if chain.family in (forward.family, "inet") and chain != forward
    ]
    if any(why_blocked(theirs, chain) for chain in others):
        return False
    ends = [end_of(theirs, forward, direction) for direction in DIRECTIONS]
    # An administrator's drop stands, and where both ways are let pass already there is nothing to do.
    return all(end in (None, "accept") for end in ends) and None in ends


def _edit(ruleset: Ruleset, chain: Chain, *, wanted: bool) -> Edit | None:
    rules, forward = ruleset.rules.get(chain, ()), chain._replace(name="FORWARD")
    lines: tuple[Line, ...] = ()
    if wanted and is_dockers_alone(ruleset, forward):
        lines = tuple(_lines(_bridges(ruleset, forward)))
    theirs = [rule for rule in rules if not _is_ours(rule)]
    end = next((n for n, rule in enumerate(theirs) if rule.is_for_all and rule.verdict == "return"), None)
    before = None if end is None else theirs[end]
    ours = tuple(rule for rule in rules if _is_ours(rule))
    place = len(rules) if before is None else rules.index(before)
    if tuple(map(_line, ours)) == lines and ours == rules[place - len(ours) : place]:
        return None
    return Edit(chain, tuple(rule.handle for rule in ours), lines, None if before is None else before.handle)


def _lines(bridges: list[str]) -> Iterator[Line]:
    for bridge in bridges:
        for direction in DIRECTIONS:
            yield Line(direction, bridge, "return")
    for direction in DIRECTIONS:
        yield Line(direction, f"{ENDPOINT_PREFIX}*", "accept")


def _is_ours(rule: Rule) -> bool:
    return rule.comment == COMMENT


def _line(rule: Rule) -> Line | None:
    if rule.asks_more or len(rule.asked) != 1 or not rule.asked[0].equal:
        return None
    return Line(rule.asked[0].direction, rule.asked[0].name, rule.verdict)


def _without_ours(ruleset: Ruleset) -> Ruleset:
    rules: Mapping[Chain, tuple[Rule, ...]] = {
        chain: tuple(rule for rule in found if not (chain.name == "DOCKER-USER" and _is_ours(rule)))
        for chain, found in ruleset.rules.items()
    }
    return replace(ruleset, rules=rules)


def _is_dockers(ruleset: Ruleset, forward: Chain) -> bool:
    """Whether FORWARD holds what Docker writes, and nothing else: then its policy is Docker's, too.

    Docker writes jumps to its own chains; and up to version 27, of each bridge, what may leave and enter it, and that
    its containers may not talk to each other (icc=false).
    """
    bridges = _bridges(ruleset, forward)
    if not all(map(_PLAIN.fullmatch, bridges)):
        return False
    rules = ruleset.rules.get(forward, ())
    jumps = [rule for rule in rules if rule.verdict == "jump" and rule.target == "DOCKER-USER"]
    return any(rule.is_for_all for rule in jumps) and all(_is_dockers_rule(rule, bridges) for rule in rules)


def _is_dockers_rule(rule: Rule, bridges: list[str]) -> bool:
    if rule.verdict in ("jump", "goto"):
        return rule.target in _DOCKERS
    on = {asked.direction for asked in rule.asked if asked.equal and asked.name in bridges}
    if rule.verdict == "accept":
        return bool(on)
    # Anything but a drop between containers of one bridge would be passed by where ours accept.
    return not rule.verdict or (rule.verdict == "drop" and on == set(DIRECTIONS))


def _bridges(ruleset: Ruleset, forward: Chain) -> list[str]:
    """Docker's bridges, as its rules name them: what leaves by a bridge is sent to a chain of Docker's."""
    chains = [forward, *(c for c in ruleset.rules if c[:2] == forward[:2] and c.name.startswith("DOCKER-"))]
    return sorted(
        {
            asked.name
            for chain in chains
            if chain.name != "DOCKER-USER"
            for rule in ruleset.rules.get(chain, ())
            if rule.verdict in ("jump", "goto") and rule.target.startswith("DOCKER")
            for asked in rule.asked
            if asked == Asked("oifname", asked.name)
        }
    )
