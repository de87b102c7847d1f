"""A Mesos master: which agents there are, which are unreachable or gone, and what becomes of tasks.

    master = Master()
    with master.instance() as one, master.instance() as other:      one leads, the other sends callers to it
        ...
        master.lose(agent)          its health checks failed for long enough
        master.mark_gone(agent)     an operator says that it never comes back

What a master does after 75 s it does here when a test says so.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from tests.standins import mesos_shapes as shapes
from tests.standins.service import Asked, Replica, Reply, reply
from tests.standins.tasks import Status, TaskInfo

HEARTBEAT = 15.0
"""Seconds between heartbeats on a stream of the operator API."""

COMPLETED = 1000
"""Tasks that have ended and are still listed, the newest; a master forgets older ones too."""


class Framework(Protocol):
    """What a master needs of a scheduler."""

    framework: str
    name: str

    def update(self, status: Status) -> None: ...


class Workers(Protocol):
    """What a master needs of an agent. hostname, port: where its own API is."""

    hostname: str
    port: int

    def launch(self, tasks: list[TaskInfo]) -> None: ...

    def kill(self, task: str) -> None: ...

    def has(self, task: str) -> bool: ...

    def shut_down(self) -> None:
        """Told to an agent that was marked gone and is back: its tasks end, and so does it."""


@dataclass(slots=True)
class Registered:
    """An agent in the registry. state: "registered", "unreachable", "gone" or "recovered"."""

    id: str
    workers: Workers
    since: float
    state: str = "registered"
    changed: float = 0.0


@dataclass(slots=True)
class Known:
    """A task and its statuses."""

    task: TaskInfo
    agent: str
    state: str = "TASK_STAGING"
    statuses: list[Status] = field(default_factory=list)


class Master:
    """See the module's docstring. What all its instances share."""

    def __init__(self, *, heartbeat: float = HEARTBEAT) -> None:
        self.heartbeat = heartbeat
        self.id = str(uuid.uuid4())
        self.agents: dict[str, Registered] = {}
        self.tasks: dict[str, Known] = {}
        self.completed: deque[Known] = deque(maxlen=COMPLETED)
        self.frameworks: dict[str, Framework] = {}
        self.disconnected: set[str] = set()
        self.instances: list[Instance] = []
        self.elected: Instance | None = None
        self._numbers = itertools.count()
        self._followers: list[queue.SimpleQueue[dict[str, Any] | None]] = []
        self._lock = threading.RLock()

    def instance(self, **place: Any) -> Instance:
        """One more process of it; ``place`` goes to Service. The first that runs leads."""
        return Instance(self, **place)

    def elect(self) -> None:
        """If nobody leads who runs, the first that does. A new leader first knows of agents from the registry only."""
        with self._lock:
            if self.elected is not None and self.elected.is_running:
                return
            self._change_leader(next((one for one in self.instances if one.is_running), None))

    def fail_over(self) -> None:
        """Another instance leads; agents have to register with it again (``recover``)."""
        with self._lock:
            running = [one for one in self.instances if one.is_running]
            others = [one for one in running if one is not self.elected]
            self._change_leader(next(iter(others or running), None))

    def _change_leader(self, leader: Instance | None) -> None:
        led, self.elected = self.elected, leader
        for follower in self._followers:
            follower.put(None)
        if led is not None:
            for agent in self.agents.values():
                if agent.state == "registered":
                    agent.state = "recovered"

    def recover(self) -> None:
        """Agents that a new leader only knew from the registry have registered with it again."""
        with self._lock:
            for agent in self.agents.values():
                if agent.state == "recovered":
                    agent.state = "registered"

    # -- agents

    def register(self, workers: Workers, agent: str = "") -> str:
        """An agent is there, or there again under its id; returns its id. One that was marked gone is shut down."""
        with self._lock:
            agent = agent or f"{self.id}-S{next(self._numbers)}"
            known = self.agents.get(agent)
            if known is not None and known.state == "gone":
                back = None
            else:
                back = self._on(agent)
                self.agents[agent] = Registered(agent, workers, known.since if known else time.time())
        if back is None:
            workers.shut_down()
            return ""
        self._say({"type": "AGENT_ADDED", "agent_added": {"agent": self._row(self.agents[agent])}})
        for task in back:
            self._reconcile(task, workers)
        return agent

    def _reconcile(self, known: Known, workers: Workers) -> None:
        """A task of an agent that is back is what it was before, or was never there."""
        if not workers.has(known.task.id):
            self.update(
                Status(
                    known.task,
                    "TASK_DROPPED",
                    known.agent,
                    message="Reconciliation: task unknown to the agent",
                    source="SOURCE_SLAVE",
                    reason="REASON_RECONCILIATION",
                )
            )
        elif known.state == "TASK_UNREACHABLE":
            last = next((s for s in reversed(known.statuses) if s.state != "TASK_UNREACHABLE"), None)
            if last is not None:
                self.update(last)

    def lose(self, agent: str) -> None:
        """It did not answer for too long: unreachable, and so are its tasks."""
        self._leave(agent, "unreachable", "TASK_UNREACHABLE", "REASON_SLAVE_REMOVED")

    def mark_gone(self, agent: str) -> None:
        """MARK_AGENT_GONE: it never comes back, and its tasks are gone."""
        self._leave(agent, "gone", "TASK_GONE_BY_OPERATOR", "REASON_SLAVE_REMOVED_BY_OPERATOR")

    def _leave(self, agent: str, registry: str, state: str, reason: str) -> None:
        with self._lock:
            known = self.agents[agent]
            known.state, known.changed = registry, time.time()
            why = f"Agent {agent} is {registry}"
            statuses = [
                Status(
                    task.task,
                    state,
                    agent,
                    message=why,
                    source="SOURCE_MASTER",
                    reason=reason,
                )
                for task in self._on(agent)
            ]
        for status in statuses:
            self.update(status)
        self._say({"type": "AGENT_REMOVED", "agent_removed": {"agent_id": shapes.value(agent)}})

    def usable(self) -> list[str]:
        with self._lock:
            return sorted(agent.id for agent in self.agents.values() if agent.state == "registered")

    def hostname(self, agent: str) -> str:
        return self.agents[agent].workers.hostname

    def _on(self, agent: str) -> list[Known]:
        return [task for task in self.tasks.values() if task.agent == agent]

    # -- tasks

    def subscribe(self, framework: Framework) -> None:
        self.frameworks[framework.framework] = framework

    def launch(self, agent: str, tasks: list[TaskInfo]) -> None:
        with self._lock:
            for task in tasks:
                self.tasks[task.id] = Known(task, agent)
            workers = self.agents[agent].workers
        workers.launch(tasks)

    def kill(self, agent: str, task: str) -> None:
        """Pass it on to an agent that can be reached; to one that cannot be nothing is said."""
        with self._lock:
            known = self.agents.get(agent)
        if known is not None and known.state == "registered":
            known.workers.kill(task)

    def update(self, status: Status) -> None:
        """Note a status and tell its framework, if that is connected."""
        with self._lock:
            known = self.tasks.get(status.task.id)
            if known is not None:
                known.state = status.state
                known.statuses.append(status)
                if status.is_terminal:
                    self.completed.append(self.tasks.pop(status.task.id))
            framework = self.frameworks.get(status.task.framework)
        self._say(
            {
                "type": "TASK_UPDATED",
                "task_updated": {
                    "framework_id": shapes.value(status.task.framework),
                    "status": shapes.status_row(status),
                    "state": status.state,
                },
            }
        )
        if framework is not None and framework.framework not in self.disconnected:
            framework.update(status)

    # -- the operator API

    def _say(self, event: dict[str, Any]) -> None:
        for follower in list(self._followers):
            follower.put(event)

    def follow(self) -> Iterator[bytes]:
        """A stream of the operator API: SUBSCRIBED, then events and heartbeats, in RecordIO."""
        events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        with self._lock:
            self._followers.append(events)
            state = {
                "get_tasks": self.tasks_view(),
                "get_executors": {"executors": []},
                "get_frameworks": self.frameworks_view(),
                "get_agents": self.agents_view(),
            }
        subscribed = {"get_state": state, "heartbeat_interval_seconds": self.heartbeat}
        try:
            yield _record({"type": "SUBSCRIBED", "subscribed": subscribed})
            yield _record({"type": "HEARTBEAT"})
            while True:
                try:
                    event = events.get(timeout=self.heartbeat)
                except queue.Empty:
                    event = {"type": "HEARTBEAT"}
                if event is None:
                    return
                yield _record(event)
        finally:
            with self._lock:
                self._followers.remove(events)

    def _row(self, agent: Registered) -> dict[str, Any]:
        where = agent.workers
        return shapes.agent_row(
            agent.id, where.hostname, where.port, agent.since, active=agent.state == "registered"
        )

    def agents_view(self) -> dict[str, Any]:
        with self._lock:
            recovered = [a for a in self.agents.values() if a.state == "recovered"]
            return {
                "agents": [self._row(a) for a in self.agents.values() if a.state == "registered"],
                "recovered_agents": [
                    shapes.agent_info(a.id, a.workers.hostname, a.workers.port) for a in recovered
                ],
            }

    def tasks_view(self) -> dict[str, Any]:
        def rows(tasks: list[Known]) -> list[dict[str, Any]]:
            return [shapes.task_row(t.task, t.state, t.agent, t.statuses) for t in tasks]

        with self._lock:
            live = list(self.tasks.values())
            return {
                "tasks": rows([t for t in live if t.state != "TASK_UNREACHABLE"]),
                "unreachable_tasks": rows([t for t in live if t.state == "TASK_UNREACHABLE"]),
                "completed_tasks": rows(list(self.completed)),
            }

    def frameworks_view(self) -> dict[str, Any]:
        frameworks = [
            shapes.framework_row(f.framework, f.name, active=f.framework not in self.disconnected)
            for f in self.frameworks.values()
        ]
        return {"frameworks": frameworks, "completed_frameworks": []}

    def registry(self) -> dict[str, Any]:
        """/registrar(1)/registry: what a new leader begins with."""
        with self._lock:
            agents = list(self.agents.values())

        def left(state: str) -> list[dict[str, Any]]:
            return [
                {"id": shapes.value(a.id), "timestamp": {"nanoseconds": int(a.changed * 1e9)}}
                for a in agents
                if a.state == state
            ]

        return {
            "master": {"info": {"id": self.id, "ip": 16777343, "port": 5050, "pid": "master@127.0.0.1:5050"}},
            "slaves": {
                "slaves": [
                    {"info": shapes.agent_info(a.id, a.workers.hostname, a.workers.port)}
                    for a in agents
                    if a.state in ("registered", "recovered")
                ]
            },
            "unreachable": {"slaves": left("unreachable")},
            "gone": {"slaves": left("gone")},
        }


class Instance(Replica):
    """One process of a master."""

    def __init__(self, master: Master, **place: Any) -> None:
        super().__init__(master, **place)
        self.master = master
        master.instances.append(self)

    def answer(self, asked: Asked) -> Reply:
        leader = self.master.elected
        if leader is None:
            return Reply(503, b"No leader elected", "text/plain")
        if leader is not self:
            # Without a scheme, as a master writes it.
            return Reply(307, headers={"location": f"//{leader.address}{asked.path}"})
        match asked.method, asked.path:
            case "POST", "/api/v1":
                return self._operate(asked)
            case "GET", "/registrar(1)/registry" | "/registrar%281%29/registry":
                return reply(self.master.registry())
            case "GET", "/health" | "/master/health":
                return Reply(200, b"", "text/plain")
            case _:
                return Reply(404, b"", "text/plain")

    def _operate(self, asked: Asked) -> Reply:
        call = asked.json
        match call.get("type"):
            case "GET_AGENTS":
                return reply({"type": "GET_AGENTS", "get_agents": self.master.agents_view()})
            case "GET_TASKS":
                return reply({"type": "GET_TASKS", "get_tasks": self.master.tasks_view()})
            case "GET_FRAMEWORKS":
                return reply({"type": "GET_FRAMEWORKS", "get_frameworks": self.master.frameworks_view()})
            case "MARK_AGENT_GONE":
                self.master.mark_gone(call["mark_agent_gone"]["agent_id"]["value"])
                return Reply(200, b"", "text/plain")
            case "SUBSCRIBE":
                return Reply(200, kind="application/json", stream=self.master.follow())
            case other:
                return Reply(400, f"Failed to validate master::Call: {other}".encode(), "text/plain")


def _record(event: dict[str, Any]) -> bytes:
    """RecordIO: the length in digits, a newline, and so many bytes."""
    body = msgspec.json.encode(event)
    return b"%d\n%s" % (len(body), body)
