"""The reconciler's judgement: from facts to verdicts. Pure; who asks and acts is listener.py.

    addresses, facts, sightings, now  ->  judge()  ->  verdicts with evidence, what is due, new sightings

An address is *suspected* when what should have it is over: its task ended, or Marathon does not know it. From the
first sighting of that, on the clock of who judges, it has a grace; then its node's agent is asked to verify, and
releases it only if no process is left there. So nothing here frees an address of a node that lives: the worst that a
wrong suspicion can do is a question.

A node is *gone* when Mesos's master says so and no agent of ours has been there for a while, without a break. Only
then, and after a grace of its own, others free what it held (docs/decisions/a-node-is-gone-for-a-while.md).

Everything else is kept, and counted by why: what cannot be told is never guessed (docs/design.md, section 10).
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from marathon.facts import ENGINE, NODE_BOUND, OVER, Assigned, Condition, Facts, NodeFacts


class Verdict(enum.StrEnum):
    """What an assigned address is, as far as the facts go."""

    LIVE = "live"
    """Its task is there."""
    STALE = "stale"
    """What should have it is over; its node's agent is asked when the grace is over."""
    ORPHAN = "orphan"
    """Stale, but its node's agent found processes that live on it: reported and kept."""
    UNREACHABLE = "unreachable"
    """Its Mesos agent or its node's agent is cut off: it may well be used."""
    UNKNOWN = "unknown"
    """Mesos itself does not know what became of its task."""
    GONE = "gone"
    """It went with its node, and is freed with all that the node held."""
    OTHER = "other framework"
    """Another framework's, or no Mesos task's: Marathon's silence says nothing about it."""
    MISSING = "facts missing"
    """Nobody told whose it is, or Marathon's answer is none that could be judged by."""


@dataclass(frozen=True, slots=True)
class Timing:
    """All in seconds.

    grace: between the first sighting of a suspicion and what follows from it. interval: between full passes.
    gone_after: for which a node's agent has to be away, without a break, for the node to be gone.
    """

    grace: float = 30.0
    interval: float = 5.0
    gone_after: float = 60.0


UNREMARKABLE = frozenset({Verdict.LIVE, Verdict.OTHER})
"""Verdicts that are only counted."""

NODE = "node"
"""The first part of a node's key among sightings, where an address has its IP."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """Since when something is suspected, and when to act on it next; monotonic seconds.

    orphan: what the node's agent answered when it kept the address, "" if it was not asked or did not answer so.
    """

    first: float
    due: float
    orphan: str = ""


Sightings = Mapping[tuple[str, str], Sighting]
"""By (ip, id of the assignment), and for nodes by (``node``, its name)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one address, and what it rests on, in one sentence."""

    address: Assigned
    verdict: Verdict
    why: str


@dataclass(frozen=True, slots=True)
class GoneNode:
    """A node that is to be freed. why: one sentence. due: monotonic seconds. revision: see NodeFacts."""

    name: str
    why: str
    due: float
    revision: int


@dataclass(slots=True)
class Judgement:
    """What ``judge`` found.

    counts: addresses by verdict. findings: all verdicts but LIVE and OTHER. gone: all nodes that are. doubted: nodes
    that would be, were their agents away for long enough; ``due`` says when they are. verify, remove: what is due now.
    sightings: to be given to the next call. next_due: when something becomes due that is not yet, None if nothing does.
    """

    counts: Counter[Verdict] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    gone: list[GoneNode] = field(default_factory=list)
    doubted: list[GoneNode] = field(default_factory=list)
    verify: list[Finding] = field(default_factory=list)
    remove: list[GoneNode] = field(default_factory=list)
    sightings: dict[tuple[str, str], Sighting] = field(default_factory=dict)
    next_due: float | None = None

    def waits_until(self, due: float) -> None:
        """Something becomes due then."""
        if self.next_due is None or due < self.next_due:
            self.next_due = due


def answers_for(assigned: Iterable[Assigned], facts: Facts) -> bool:
    """Whether Marathon's list names at least one of the tasks whose addresses it is to judge.

    One that names none may be of somebody who is not allowed to see them.
    """
    if facts.tasks is None:
        return False
    tasks, framework = facts.tasks, facts.framework
    return any(a.instance in tasks for a in assigned if a.framework == framework and a.instance)


def judge(
    assigned: Iterable[Assigned],
    facts: Facts,
    sightings: Sightings,
    now: float,
    timing: Timing,
    *,
    answered: bool,
    called_gone: Mapping[str, str],
) -> Judgement:
    """Verdicts on ``assigned``, which may be a part of all addresses.

    answered: of ``answers_for`` all addresses. called_gone: of ``called_gone``. now: monotonic seconds.
    """
    found = Judgement()
    _judge_nodes(found, called_gone, facts, sightings, now, timing)
    gone = {node.name: node.why for node in found.gone}
    for address in assigned:
        verdict, why = verdict_on(address, facts, answered=answered, gone=gone)
        alive = _is_alive(facts, address.node)
        if verdict is Verdict.STALE:
            sighting = sightings.get(address.key) or Sighting(now, now + timing.grace)
            found.sightings[address.key] = sighting
            finding = Finding(address, verdict, why)
            if sighting.orphan:
                verdict, why = Verdict.ORPHAN, f"{why}; {sighting.orphan}"
            if not alive:
                verdict = Verdict.UNREACHABLE
                why = f"{why}, but the agent of node {address.node}, which alone could tell, is not running"
            elif sighting.due <= now:
                found.verify.append(finding)
            else:
                found.waits_until(sighting.due)
        found.counts[verdict] += 1
        if verdict not in UNREMARKABLE:
            found.findings.append(Finding(address, verdict, why))
    return found


def _judge_nodes(
    found: Judgement,
    called_gone: Mapping[str, str],
    facts: Facts,
    sightings: Sightings,
    now: float,
    timing: Timing,
) -> None:
    """Which of the nodes that Mesos calls gone are gone, and which of those are due."""
    for name, why in called_gone.items():
        node = facts.nodes[name]
        assert node.away_since is not None, "one whose agent runs is not gone"
        enough = node.away_since + timing.gone_after
        if enough > now:
            found.doubted.append(GoneNode(name, why, enough, node.revision))
            found.waits_until(enough)
            continue
        sighting = sightings.get((NODE, name))
        if sighting is None or sighting.first < enough:
            # The second is of a time when it was away before.
            sighting = Sighting(now, now + timing.grace)
        found.sightings[NODE, name] = sighting
        gone = GoneNode(name, why, sighting.due, node.revision)
        found.gone.append(gone)
        if sighting.due <= now:
            found.remove.append(gone)
        else:
            found.waits_until(sighting.due)


def verdict_on(
    address: Assigned, facts: Facts, *, answered: bool, gone: Mapping[str, str]
) -> tuple[Verdict, str]:
    """The verdict on one address, and why; STALE is a suspicion. The order of the questions is the rule."""
    if address.node in gone:
        return Verdict.GONE, gone[address.node]
    if address.engine != ENGINE:
        return Verdict.OTHER, f"engine {address.engine} has it"
    if not address.framework:
        return Verdict.MISSING, "its node's agent has not told which task it is for"
    if address.framework != facts.framework:
        return Verdict.OTHER, f"framework {address.framework} has it"
    if (over := facts.ended.get(address.instance)) is not None:
        return Verdict.STALE, f"Marathon told that its task {address.task} is {over.value}"
    task = facts.tasks.get(address.instance) if facts.tasks is not None else None
    if task is None:
        if not answered:
            return (
                Verdict.MISSING,
                "Marathon's list of tasks is missing, or names none that has an address here",
            )
        return Verdict.STALE, f"Marathon does not know its task {address.task}"
    condition = task.condition
    if condition in OVER:
        return Verdict.STALE, f"its task {address.task} is {condition.value} ({task.state})"
    if condition is Condition.LIVE:
        return Verdict.LIVE, ""
    if condition is Condition.UNREACHABLE:
        return Verdict.UNREACHABLE, f"Mesos cannot reach the agent of its task {address.task}"
    return Verdict.UNKNOWN, f"Mesos does not know what became of its task {address.task} ({task.state})"


def called_gone(assigned: Iterable[Assigned], facts: Facts) -> dict[str, str]:
    """The nodes that are gone by what Mesos says, by name, and why. assigned: all addresses.

    Not those of which an agent of ours lives, which can be asked; and not those with addresses of other engines,
    of which Mesos knows nothing. ``judge`` believes it when that has been so for long enough.
    """
    found: dict[str, str] = {}
    for node in facts.nodes.values():
        if not node.alive and (why := _why_gone(node, facts)):
            found[node.name] = why
    if found:
        for address in assigned:
            if address.engine not in NODE_BOUND:
                found.pop(address.node, None)
    return found


def _why_gone(node: NodeFacts, facts: Facts) -> str:
    agent = node.mesos_agent
    if not agent:
        return ""
    if facts.agents is not None and agent in facts.agents.gone:
        return f"the Mesos master's registry says that its agent {agent} is gone"
    if agent in facts.expelled:
        return f"an operator told Mesos that its agent {agent} is gone (TASK_GONE_BY_OPERATOR)"
    # TASK_GONE alone may be about one task of an agent that lives.
    if agent in facts.reported_gone and facts.agents is not None and not facts.agents.knows(agent):
        return f"a task of its agent {agent} was reported TASK_GONE, and the Mesos master does not know that agent"
    return ""


def _is_alive(facts: Facts, node: str) -> bool:
    known = facts.nodes.get(node)
    return known is not None and known.alive


def answered_kept(sighting: Sighting, why: str, now: float, retry: float) -> Sighting:
    """A sighting whose address was kept when its node's agent looked. ``why``: its answer. retry: seconds."""
    return Sighting(sighting.first, now + retry, why)


def put_off(sighting: Sighting, now: float, retry: float) -> Sighting:
    """A sighting that could not be acted on now. retry: seconds."""
    return Sighting(sighting.first, now + retry, sighting.orphan)
