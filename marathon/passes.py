"""Passes: what one leader knows in its term, how it judges, and what follows from that.

    full_pass     addresses, then tasks, labels and Mesos's agents; everything is judged
    event_pass    what events told of and what became due; nothing is asked but what an event points at

Silence is only ever judged by lists that were asked for after the addresses were known.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from ipam.errors import MoorageError, Overtaken
from ipam.networks import list_networks
from ipam.store.base import Store
from marathon import labels as app_labels
from marathon.actions import Actions, Outcome
from marathon.book import Book
from marathon.client import Marathon
from marathon.events import Event
from marathon.facts import Assigned, Condition, Facts, Task
from marathon.mesos import Master
from marathon.reconcile import (
    NODE,
    Finding,
    GoneNode,
    Judgement,
    Sighting,
    Timing,
    Verdict,
    answered_kept,
    answers_for,
    called_gone,
    judge,
    put_off,
)

log = structlog.get_logger(__name__)

T = TypeVar("T")

RETRY = 5.0
"""Seconds until what failed is tried again."""

LOOK_AGAIN = 1.0
"""Seconds between looks at what is due and cannot be done, because the node's agent does not run."""

MOST_APPS = 50
"""Apps that are looked at one by one; if events tell of more, a full pass is quicker."""

MOST_REPORTED = 200
"""Findings of each verdict that the listener's state lists; all are counted."""


class Passes:
    """See the module's docstring. changed: set when there is something new to tell. next_due: monotonic seconds."""

    def __init__(
        self,
        store: Store,
        book: Book,
        marathon: Marathon,
        master: Master | None,
        framework: str,
        actions: Actions,
        timing: Timing,
    ) -> None:
        self._store = store
        self._book = book
        self._marathon = marathon
        self._master = master
        self._actions = actions
        self._timing = timing
        self._facts = Facts(framework, None)
        self._labels: dict[str, dict[str, str]] = {}
        self._ended: dict[str, Condition] = {}
        self._sightings: dict[tuple[str, str], Sighting] = {}
        self._findings: dict[tuple[str, str], Finding] = {}
        self._gone: list[GoneNode] = []
        self._doubted: list[GoneNode] = []
        self._unremarkable: Counter[Verdict] = Counter()
        self._answered = False
        self.next_due: float | None = None
        self.refused: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self.last_pass: dict[str, Any] = {}
        self.done: Counter[str] = Counter()
        self.changed = asyncio.Event()

    # -- passes

    async def full_pass(self, *, act: bool = True) -> Judgement:
        """Judge everything by fresh facts. Addresses first, then tasks: see the module's docstring.

        Raises Overtaken when Marathon is another framework by now, StoreError.
        """
        begun = time.monotonic()
        assigned = self._book.all()
        told_before = dict(self._ended)
        self.problems.clear()
        await self._check_framework()
        tasks = await self._ask("tasks", self._marathon.tasks)
        labels = await self._ask("apps", self._marathon.labels)
        agents = None if self._master is None else await self._ask("master", self._master.agents)
        if labels is not None:
            self._labels = labels
        self._settle_ended(assigned, tasks, told_before)
        # Nodes last: one that is back meanwhile is not away.
        self._facts = replace(
            self._facts, tasks=tasks, nodes=self._book.nodes(), ended=self._ended, agents=agents
        )
        asked_for = time.monotonic() - begun
        judged_from = time.monotonic()
        self._answered = answers_for(assigned, self._facts)
        found = self._judge(assigned)
        self._sightings = found.sightings
        self._gone, self._doubted = found.gone, found.doubted
        self._findings = {finding.address.key: finding for finding in found.findings}
        self._unremarkable = Counter({v: found.counts[v] for v in (Verdict.LIVE, Verdict.OTHER)})
        self._schedule()
        self.last_pass = {
            "at": time.time(),
            "seconds": round(time.monotonic() - judged_from, 3),
            "asking_seconds": round(asked_for, 3),
            "addresses": len(assigned),
            "tasks": None if tasks is None else len(tasks),
        }
        if act:
            self._act(found)
            await self._relabel(assigned)
        return found

    async def _check_framework(self) -> None:
        """A Marathon that was set up anew, or another one at the same address, knows nothing of our tasks."""
        info = await self._ask("info", self._marathon.info)
        if info is not None and info.framework_id != self._facts.framework:
            raise Overtaken(
                f"Marathon at {self._marathon.url} is framework {info.framework_id} now, no longer "
                f"{self._facts.framework}; what the old one had is kept until the Mesos agents call it over"
            )

    def _settle_ended(
        self, assigned: Iterable[Assigned], tasks: dict[str, Task] | None, told_before: dict[str, Condition]
    ) -> None:
        """Forget what the stream told of tasks that nobody has an address of, or that were listed as alive since."""
        known = {address.instance for address in assigned if address.instance}
        for instance in list(self._ended):
            listed = tasks.get(instance) if tasks is not None and instance in told_before else None
            revived = listed is not None and listed.condition is Condition.LIVE
            if revived or (instance in told_before and instance not in known):
                del self._ended[instance]

    async def event_pass(self, events: Iterable[Event]) -> bool:
        """Judge what the events are about, and what is due. Returns whether a full pass has to look instead."""
        touched, apps, look = self._note(events)
        if len(apps) > MOST_APPS:
            return True
        suspects = list(self._book.of_apps(apps)) if apps else []
        for app in apps:
            asked = await self._ask(f"app {app}", functools.partial(self._marathon.app, app))
            if asked is None:
                return True
            self._replace_app(app, [a for a in suspects if a.app == app], *asked)
        if look and self._master is not None:
            agents = await self._ask("master", self._master.agents)
            self._facts = replace(self._facts, agents=agents)
        self._facts = replace(self._facts, nodes=self._book.nodes(), ended=self._ended)
        suspects.extend(self._book.of_instances(touched))
        suspects.extend(self._due())
        assigned = list({address.key: address for address in suspects}.values())
        found = self._judge(assigned)
        self._merge(assigned, found)
        self._act(found)
        if apps:
            await self._relabel(address for address in assigned if address.app in apps)
        return False

    def _judge(self, assigned: list[Assigned]) -> Judgement:
        return judge(
            assigned,
            self._facts,
            self._sightings,
            time.monotonic(),
            self._timing,
            answered=self._answered,
            called_gone=called_gone(self._book.all(), self._facts),
        )

    def _note(self, events: Iterable[Event]) -> tuple[set[str], set[str], bool]:
        """Take in what events tell: (instances, apps) to look at, and whether to ask the master about agents."""
        touched: set[str] = set()
        apps: set[str] = set()
        gone: set[str] = set()
        expelled: set[str] = set()
        tasks = self._facts.tasks
        for event in events:
            if event.app:
                apps.add(event.app)
            condition = event.condition
            if condition is Condition.GONE and event.agent:
                gone.add(event.agent)
            if condition is Condition.EXPELLED and event.agent:
                expelled.add(event.agent)
            if not event.task or condition is None:
                continue
            touched.add(event.task)
            if event.is_over:
                self._ended[event.task] = condition
            elif isinstance(tasks, dict) and event.task not in self._ended:
                tasks[event.task] = Task(event.task, state=event.state, slave_id=event.agent)
        self._facts = replace(
            self._facts,
            reported_gone=self._facts.reported_gone | gone,
            expelled=self._facts.expelled | expelled,
        )
        return touched, apps, bool(gone or expelled)

    def _replace_app(
        self, app: str, assigned: list[Assigned], tasks: dict[str, Task], labels: dict[str, str]
    ) -> None:
        """assigned: the app's addresses, as they stood before its tasks were asked for."""
        known = self._facts.tasks
        if isinstance(known, dict):
            for address in assigned:
                known.pop(address.instance, None)
            known.update(tasks)
        self._labels.pop(app, None)
        if labels:
            self._labels[app] = labels

    def _due(self) -> list[Assigned]:
        now = time.monotonic()
        keys = [key for key, sighting in self._sightings.items() if sighting.due <= now and key[0] != NODE]
        return [address for key in keys if (address := self._book.get(*key)) is not None]

    def _merge(self, assigned: Iterable[Assigned], found: Judgement) -> None:
        """A pass over a part of the addresses: its verdicts in the place of those that stood."""
        for address in assigned:
            self._sightings.pop(address.key, None)
            self._findings.pop(address.key, None)
        self._sightings.update(found.sightings)
        self._findings.update((finding.address.key, finding) for finding in found.findings)
        self._sightings = {
            key: sighting
            for key, sighting in self._sightings.items()
            # Nodes are judged in every pass: one that is not gone any more begins anew.
            if key in found.sightings or (key[0] != NODE and self._book.get(*key) is not None)
        }
        self._gone, self._doubted = found.gone, found.doubted
        self._schedule()

    def _schedule(self) -> None:
        """When to look again. What is due by then waits for its node's agent to run."""
        due = [sighting.due for sighting in self._sightings.values()]
        due += [node.due for node in self._doubted]
        soonest = min(due, default=None)
        now = time.monotonic()
        self.next_due = soonest if soonest is None or soonest > now else now + LOOK_AGAIN

    async def _ask(self, what: str, question: Callable[[], T]) -> T | None:
        """An answer from outside, None if there is none: facts are missing then, and that is shown."""
        try:
            answer = await asyncio.to_thread(question)
        except MoorageError as error:
            log.warning("facts are missing", what=what, why=str(error))
            self.problems[what] = str(error)
            return None
        self.problems.pop(what, None)
        return answer

    # -- what follows

    def _act(self, found: Judgement) -> None:
        now = time.monotonic()
        asked: set[str] = set()
        for finding in found.verify:
            # Not again while it is asked; the answer says when.
            self._put_off(finding.address.key, now)
            if finding.address.id not in asked:
                asked.add(finding.address.id)
                self._actions.verify(finding, self._verified)
        for node in found.remove:
            self._put_off((NODE, node.name), now)
            self._actions.remove(node, self._removed)

    def _put_off(self, key: tuple[str, str], now: float) -> None:
        if (sighting := self._sightings.get(key)) is not None:
            self._sightings[key] = put_off(sighting, now, self._timing.interval)

    def _verified(self, finding: Finding, outcome: Outcome) -> None:
        """A node's agent has looked."""
        key, now = finding.address.key, time.monotonic()
        sighting = self._sightings.get(key)
        self.done[outcome.kind] += 1
        self.changed.set()
        if sighting is None:
            return
        match outcome.kind:
            case Outcome.RELEASED:
                del self._sightings[key]
                self._findings.pop(key, None)
            case Outcome.LIVE:
                self._sightings[key] = answered_kept(sighting, outcome.why, now, self._timing.interval)
                self._findings[key] = replace(
                    finding, verdict=Verdict.ORPHAN, why=f"{finding.why}; {outcome.why}"
                )
                if outcome.why != sighting.orphan:
                    log.warning("orphan kept", ip=key[0], node=finding.address.node, why=outcome.why)
            case _:
                # Also when it changed: the same assignment, looked at as it is by then.
                self._sightings[key] = put_off(sighting, now, RETRY)
                self._schedule()

    def _removed(self, node: GoneNode, outcome: Outcome) -> None:
        key, now = (NODE, node.name), time.monotonic()
        self.done["nodes removed" if outcome.kind == Outcome.RELEASED else outcome.kind] += 1
        self.changed.set()
        sighting = self._sightings.pop(key, None)
        if sighting is not None and outcome.kind not in (Outcome.RELEASED, Outcome.CHANGED):
            self._sightings[key] = put_off(sighting, now, RETRY)
            self._schedule()

    async def _relabel(self, assigned: Iterable[Assigned]) -> None:
        framework = self._facts.framework
        if not self._labels:
            self.refused = {}
            return
        nodes = self._facts.nodes
        mine = [
            a
            for a in assigned
            if a.framework == framework
            and a.key not in self._findings
            # The others are asked when their agents are back.
            and (node := nodes.get(a.node)) is not None
            and node.alive
        ]
        networks = {network.name: network for network, _ in await list_networks(self._store)}
        plan = app_labels.plan(mine, self._labels, networks)
        for app, why in plan.refused.items():
            if self.refused.get(app) != why:
                log.warning("app labels are not applied", app=app, why=why)
        self.refused = plan.refused
        for relabel in plan.relabel:
            self._actions.relabel(relabel, self._relabelled)

    def _relabelled(self, outcome: Outcome) -> None:
        self.done["relabelled" if outcome.kind == Outcome.RELEASED else outcome.kind] += 1
        self.changed.set()

    # -- for others

    @property
    def awaits_nodes(self) -> bool:
        """Whether there are nodes that Mesos calls gone and that are not freed yet."""
        return bool(self._gone or self._doubted)

    def counts(self) -> dict[str, int]:
        """Addresses by verdict."""
        found = Counter(finding.verdict for finding in self._standing())
        found.update(self._unremarkable)
        return {verdict.value: found[verdict] for verdict in Verdict}

    def _standing(self) -> list[Finding]:
        if not self._book.listed.is_set():
            return list(self._findings.values())
        return [f for f in self._findings.values() if self._book.get(*f.address.key) is not None]

    def report(self) -> dict[str, Any]:
        """What stands now, as JSON has it."""
        listed: Counter[Verdict] = Counter()
        rows = []
        for finding in self._standing():
            listed[finding.verdict] += 1
            if listed[finding.verdict] <= MOST_REPORTED:
                rows.append(finding_row(finding))
        return {
            "counts": self.counts(),
            "findings": rows,
            "gone": [_node_row(node, "gone") for node in self._gone]
            + [_node_row(node, "doubted") for node in self._doubted],
            "last_pass": self.last_pass,
            "done": dict(self.done),
            "refused_labels": self.refused,
            "missing": self.problems,
        }


def _node_row(node: GoneNode, state: str) -> dict[str, Any]:
    """A node that Mesos calls gone, as JSON has it. at: wall clock of the listener's machine; when it is freed, or when
    that is believed. left: seconds until then, which other machines can read."""
    left = node.due - time.monotonic()
    at = time.time() + left
    return {"name": node.name, "state": state, "at": round(at, 3), "left": round(left, 3), "why": node.why}


def finding_row(finding: Finding) -> dict[str, Any]:
    """A finding as JSON has it."""
    address = finding.address
    return {
        "address": address.ip,
        "verdict": finding.verdict.value,
        "node": address.node,
        "network": address.network,
        "task": address.task,
        "app": address.app,
        "container_id": address.container_id,
        "why": finding.why,
    }
