"""What the node's Mesos agent knows, told to the isolator: which task each endpoint is for, and which are over.

Off the path of every ADD: the agent is asked soon after an endpoint came, and then regularly.

    endpoint without task  --asked-->  task, app and framework stand in its addresses' records
    container that is over, or that the agent does not know  --grace-->  the isolator looks whether a process is left

The agent not knowing a container proves nothing (it leaves out what the asker may not see, and what it is just
destroying), so it only starts that look; and an answer that knows none of our containers is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from ipam.errors import MoorageError
from isolator.model import Endpoint, EndpointKey, EndpointState, Work
from marathon.facts import ENGINE
from marathon.mesos import Agent, AgentFacts

log = structlog.get_logger(__name__)

LOOK = 0.5
"""Seconds between looks for endpoints that nobody has told about."""

ASK_EVERY = 10.0
"""Seconds between questions to the Mesos agent when nothing is new."""

LONGEST_PAUSE = 10.0
"""Seconds between questions about endpoints that it does not know yet; the first ones come sooner."""

GRACE = 20.0
"""Seconds that a container has to be over, or unknown, before the isolator looks."""


class Isolation(Protocol):
    """The part of an isolator that is told."""

    def endpoints(self) -> list[Endpoint]: ...

    def work_of(self, endpoint: Endpoint) -> Work | None: ...

    def tell_work(self, endpoint: Endpoint, work: Work) -> None: ...

    def tell_mesos_agent(self, agent: str) -> None: ...

    async def end_if_gone(self, key: EndpointKey) -> bool: ...


@dataclass(slots=True)
class Suspicion:
    """Endpoints whose container is not there, as far as the Mesos agent says. first: monotonic, by endpoint."""

    first: dict[EndpointKey, float] = field(default_factory=dict)

    def note(self, endpoints: Iterable[Endpoint], facts: AgentFacts, now: float) -> list[Endpoint]:
        """Take in an answer that was asked for after ``endpoints`` were known; returns those that are due now."""
        mine = [e for e in endpoints if e.engine == ENGINE and e.state is EndpointState.ATTACHED]
        known = any(container_of(e) in facts.running or container_of(e) in facts.over for e in mine)
        absent = {e.key: e for e in mine if container_of(e) not in facts.running} if known else {}
        self.first = {key: self.first.get(key, now) for key in absent}
        return [absent[key] for key, first in self.first.items() if now - first >= GRACE]


def container_of(endpoint: Endpoint) -> str:
    """The Mesos container that has an endpoint."""
    return endpoint.key.container_id


def explained(endpoints: Iterable[Endpoint], work: Mapping[str, Work]) -> list[tuple[Endpoint, Work]]:
    """Endpoints of which the Mesos agent says what they are for."""
    return [(e, work[container_of(e)]) for e in endpoints if container_of(e) in work]


class MesosFacts:
    """See the module's docstring."""

    def __init__(self, isolation: Isolation, agent: Agent) -> None:
        self._isolation = isolation
        self._agent = agent
        self._suspicion = Suspicion()
        self._trouble = ""

    async def run(self) -> None:
        """Ask and tell, until cancelled."""
        now = asyncio.get_running_loop().time
        pause, asked, news = LOOK, 0.0, frozenset[EndpointKey]()
        while True:
            untold = frozenset(e.key for e in self._untold())
            if untold - news:
                pause = LOOK  # somebody came since
            wait = pause if untold else ASK_EVERY
            if now() - asked >= wait:
                await self._ask()
                asked, news = now(), untold
                pause = min(pause * 2, LONGEST_PAUSE)
            await asyncio.sleep(LOOK)

    def _untold(self) -> list[Endpoint]:
        return [
            e
            for e in self._isolation.endpoints()
            if e.engine == ENGINE and self._isolation.work_of(e) is None
        ]

    async def _ask(self) -> None:
        endpoints = self._isolation.endpoints()
        try:
            facts = await asyncio.to_thread(self._agent.facts)
        except MoorageError as error:
            if str(error) != self._trouble:
                log.warning("the Mesos agent tells nothing about containers", why=str(error))
                self._trouble = str(error)
            return
        if self._trouble:
            log.info("the Mesos agent answers again")
            self._trouble = ""
        self._isolation.tell_mesos_agent(facts.id)
        self._tell(facts)
        for endpoint in self._suspicion.note(endpoints, facts, asyncio.get_running_loop().time()):
            await self._look(endpoint)

    def _tell(self, facts: AgentFacts) -> None:
        work = {name: Work(w.framework, w.task, w.app) for name, w in facts.work.items()}
        for endpoint, what in explained(self._untold(), work):
            try:
                self._isolation.tell_work(endpoint, what)
            except MoorageError as error:
                log.warning(
                    "task of an endpoint is not recorded yet", endpoint=str(endpoint.key), why=str(error)
                )

    async def _look(self, endpoint: Endpoint) -> None:
        self._suspicion.first.pop(endpoint.key, None)  # looked at anew after another grace
        try:
            gone = await self._isolation.end_if_gone(endpoint.key)
        except TimeoutError:
            return
        if gone:
            log.info(
                "endpoint ended: its Mesos container is over and no process is left",
                endpoint=str(endpoint.key),
            )
        else:
            log.warning(
                "the Mesos agent does not know a container that lives; it is kept", endpoint=str(endpoint.key)
            )
