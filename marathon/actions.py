"""What a leader does: questions to nodes' agents, and the removal of nodes that are gone.

Each compares the leadership in its own transaction. They run beside the listener, a few at a time; whoever asked for
one is told its outcome.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar

import structlog

from ipam import keys
from ipam.errors import MoorageError, NotFound, Overtaken
from ipam.intents import ask
from ipam.nodes import remove_node
from ipam.records import Intent, IntentKind
from ipam.store.base import Compare, Store
from marathon.facts import Assigned
from marathon.labels import Relabel
from marathon.leader import Leadership
from marathon.reconcile import Finding, GoneNode

log = structlog.get_logger(__name__)

AT_ONCE = 16
"""Questions that are open at the same time."""

ANSWER_WITHIN = 10.0
"""Seconds a node's agent has to answer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How something went. kind: one of those below. why: what was answered.

    RELEASED: done. LIVE: the address's container lives. CHANGED: it is not what it was when it was looked at.
    FAILED: it could not be done now.
    """

    kind: str
    why: str = ""

    RELEASED: ClassVar[str] = "released"
    LIVE: ClassVar[str] = "kept"
    CHANGED: ClassVar[str] = "changed"
    FAILED: ClassVar[str] = "failed"


class Actions:
    """See the module's docstring."""

    def __init__(self, store: Store, leadership: Leadership) -> None:
        self._store = store
        self._leadership = leadership
        self._begun: set[tuple[str, str]] = set()
        self._wanted: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()

    async def run(self) -> None:
        """Do what is wanted, until cancelled. Raises Overtaken when another one leads."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(self._work())
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _work(self) -> None:
        while True:
            work = await self._wanted.get()
            try:
                await work()
            finally:
                self._wanted.task_done()

    async def idle(self) -> None:
        """Returns when nothing is wanted any more."""
        await self._wanted.join()

    def verify(self, finding: Finding, told: Callable[[Finding, Outcome], None]) -> None:
        """Have a node's agent release an address if nothing lives on it."""

        async def work() -> None:
            outcome = await self._ask(
                finding.address, IntentKind.VERIFY, {"verdict": "stale", "why": finding.why}
            )
            if outcome.kind == Outcome.RELEASED:
                log.info(
                    "stale address released",
                    ip=finding.address.ip,
                    task=finding.address.task,
                    why=finding.why,
                )
            told(finding, outcome)

        self._want(("verify", finding.address.id), work)

    def remove(self, node: GoneNode, told: Callable[[GoneNode, Outcome], None]) -> None:
        """Free everything of a node that is gone."""

        async def work() -> None:
            told(node, await self._remove(node))

        self._want(("remove", node.name), work)

    def relabel(self, wanted: Relabel, told: Callable[[Outcome], None]) -> None:
        """Have a node's agent give an endpoint other netgroups."""

        async def work() -> None:
            outcome = await self._ask(
                wanted.address, IntentKind.LABELS, {"netgroups": list(wanted.netgroups)}
            )
            say = log.info if outcome.kind == Outcome.RELEASED else log.warning
            say(
                "app labels applied"
                if outcome.kind == Outcome.RELEASED
                else "app labels are not applied yet",
                ip=wanted.address.ip,
                app=wanted.address.app,
                netgroups=list(wanted.netgroups),
                why=outcome.why,
            )
            told(outcome)

        self._want(("relabel", wanted.address.id), work)

    def _want(self, name: tuple[str, str], work: Callable[[], Awaitable[None]]) -> None:
        """Once at a time."""
        if name in self._begun:
            return
        self._begun.add(name)

        async def once() -> None:
            try:
                await work()
            finally:
                self._begun.discard(name)

        self._wanted.put_nowait(once)

    async def _ask(self, address: Assigned, kind: IntentKind, evidence: dict[str, object]) -> Outcome:
        """Raises Overtaken."""
        intent = Intent(
            kind=kind, ip=address.ip, id=address.id, mod_revision=address.revision, evidence=evidence
        )
        try:
            answer = await ask(self._store, address.node, intent, ANSWER_WITHIN, self._leadership.guards)
        except Overtaken:
            raise
        except MoorageError as error:
            return Outcome(Outcome.FAILED, str(error))
        why = str(answer.get("why", ""))
        if answer.get("done"):
            return Outcome(Outcome.RELEASED, why)
        if answer.get("live"):
            return Outcome(Outcome.LIVE, why)
        return Outcome(Outcome.CHANGED if answer.get("changed") else Outcome.FAILED, why)

    async def _remove(self, node: GoneNode) -> Outcome:
        """Raises Overtaken."""
        # An agent that was there since has written what it is anew.
        guards = (*self._leadership.guards, Compare(keys.NODES + node.name, node.revision))
        try:
            freed = await remove_node(self._store, node.name, force=True, guards=guards)
        except NotFound as error:
            return Outcome(Outcome.CHANGED, str(error))
        except MoorageError as error:
            if not self._leadership.held:
                raise Overtaken(f"node {node.name} is not removed: another process leads") from error
            log.warning("node that is gone is not removed yet", node=node.name, why=str(error))
            return Outcome(Outcome.FAILED, str(error))
        log.warning(
            "node is gone: all that it held is freed", node=node.name, why=node.why, addresses=freed.addresses
        )
        return Outcome(Outcome.RELEASED)
