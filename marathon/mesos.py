"""Mesos as a source of facts: the master about its agents, an agent about its containers.

The master's list of agents does not say which are gone, and an agent that is in no list may be anything; what an
operator declared gone stands in the master's registry. Both are asked of the leading master.
Recordings of the answers: tests/data/mesos. Blocking, as http.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from marathon.facts import Agents, app_of
from marathon.http import NO_SECRETS, Access, Http, NotAnswered

T = TypeVar("T")

REGISTRY = "/registrar(1)/registry"
"""The master's registry as JSON; its process is the first of that name."""

LARGEST_OF_AN_AGENT = 64 * 1024 * 1024
"""Bytes; an agent's state has all tasks that it remembers, some KiB each."""


class _Value(msgspec.Struct, frozen=True):
    value: str = ""


class _AgentInfo(msgspec.Struct, frozen=True):
    id: _Value = _Value()


class _Registered(msgspec.Struct, frozen=True):
    agent_info: _AgentInfo


class _GetAgents(msgspec.Struct, frozen=True):
    agents: list[_Registered] = []
    # A master that has just taken over names here those that it waits for, without anything around them.
    recovered_agents: list[_AgentInfo] = []


class _GetAgentsAnswer(msgspec.Struct, frozen=True):
    get_agents: _GetAgents


class _Marked(msgspec.Struct, frozen=True):
    id: _Value


class _MarkedList(msgspec.Struct, frozen=True):
    slaves: list[_Marked] = []


class _Admitted(msgspec.Struct, frozen=True):
    info: _AgentInfo


class _AdmittedList(msgspec.Struct, frozen=True):
    slaves: list[_Admitted] = []


class _Registry(msgspec.Struct, frozen=True):
    slaves: _AdmittedList = _AdmittedList()
    unreachable: _MarkedList = _MarkedList()
    gone: _MarkedList = _MarkedList()


class Master:
    """The Mesos master, at one or several URLs."""

    def __init__(self, urls: Sequence[str], access: Access = NO_SECRETS) -> None:
        self._http = Http("the Mesos master", urls, access)

    def close(self) -> None:
        self._http.close()

    def agents(self) -> Agents:
        """What the leading master knows of its agents. Raises as Http.get."""
        asked = msgspec.json.encode({"type": "GET_AGENTS"})
        body = self._http.post("/api/v1", asked)
        listed = _decoded("the Mesos master", body, _GetAgentsAnswer).get_agents
        registry = _decoded("the Mesos master", self._http.get(REGISTRY), _Registry)
        present = {entry.agent_info.id.value for entry in listed.agents}
        present.update(info.id.value for info in listed.recovered_agents)
        present.update(entry.info.id.value for entry in registry.slaves.slaves)
        gone = {entry.id.value for entry in registry.gone.slaves}
        return Agents(
            # One that was declared gone a moment ago may still be in the list before.
            present=frozenset(present - gone),
            unreachable=frozenset(entry.id.value for entry in registry.unreachable.slaves) - gone,
            gone=frozenset(gone),
        )


@dataclass(frozen=True, slots=True)
class Work:
    """What a container is for. app: "" where the task is not Marathon's."""

    framework: str
    task: str
    app: str


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """What an agent says of itself and of its containers.

    work: by container id, as CNI has it (``parent.child`` for nested ones), of all that it runs or has not forgotten.
    running: those that run, or end at this moment. over: those of which it says that they ended.
    """

    id: str
    hostname: str
    work: dict[str, Work]
    running: frozenset[str]
    over: frozenset[str]


class _Task(msgspec.Struct, frozen=True):
    id: str = ""
    statuses: list[dict[str, Any]] = []


class _Executor(msgspec.Struct, frozen=True):
    id: str = ""
    container: str = ""
    tasks: list[_Task] = []
    queued_tasks: list[_Task] = []
    completed_tasks: list[_Task] = []


class _Framework(msgspec.Struct, frozen=True):
    id: str = ""
    executors: list[_Executor] = []
    completed_executors: list[_Executor] = []


class _State(msgspec.Struct, frozen=True):
    id: str = ""
    hostname: str = ""
    frameworks: list[_Framework] = []
    completed_frameworks: list[_Framework] = []


class _ContainerId(msgspec.Struct, frozen=True):
    value: str
    parent: _ContainerId | None = None

    def __str__(self) -> str:
        return self.value if self.parent is None else f"{self.parent}.{self.value}"


class _Container(msgspec.Struct, frozen=True):
    container_id: _ContainerId
    executor_id: _Value = _Value()
    framework_id: _Value = _Value()


class _GetContainers(msgspec.Struct, frozen=True):
    containers: list[_Container] = []


class _GetContainersAnswer(msgspec.Struct, frozen=True):
    get_containers: _GetContainers


class Agent:
    """A Mesos agent: the one of this node."""

    def __init__(self, url: str, access: Access = NO_SECRETS) -> None:
        self._http = Http("the Mesos agent", [url], access, patience=20.0)

    def close(self) -> None:
        self._http.close()

    def facts(self) -> AgentFacts:
        """Containers first, then the state: a task that is in neither was in none of them. Raises as Http.get."""
        asked = msgspec.json.encode({"type": "GET_CONTAINERS", "get_containers": {"show_nested": True}})
        body = self._http.post("/api/v1", asked, largest=LARGEST_OF_AN_AGENT)
        listed = _decoded("the Mesos agent", body, _GetContainersAnswer).get_containers.containers
        state = _decoded("the Mesos agent", self._http.get("/state", largest=LARGEST_OF_AN_AGENT), _State)
        return _join(listed, state)


def _join(listed: Sequence[_Container], state: _State) -> AgentFacts:
    work: dict[str, Work] = {}
    over: set[str] = set()
    running: set[str] = set()
    for framework in (*state.completed_frameworks, *state.frameworks):
        for executor in (*framework.completed_executors, *framework.executors):
            tasks = [*executor.tasks, *executor.queued_tasks, *executor.completed_tasks]
            work[executor.container] = _work(framework.id, executor.id, tasks)
            for task in tasks:
                for nested in _containers_of(task):
                    work.setdefault(nested, Work(framework.id, task.id, app_of(task.id)))
    for framework in state.frameworks:
        running.update(executor.container for executor in framework.executors)
        over.update(executor.container for executor in framework.completed_executors)
    for framework in state.completed_frameworks:
        over.update(e.container for e in (*framework.executors, *framework.completed_executors))
    for container in listed:
        name = str(container.container_id)
        running.add(name)
        if container.framework_id.value:
            known = _work(container.framework_id.value, container.executor_id.value, ())
            work.setdefault(name, known)
    return AgentFacts(state.id, state.hostname, work, frozenset(running), frozenset(over - running))


def _work(framework: str, executor: str, tasks: Iterable[_Task]) -> Work:
    """A container's task: its executor's only one, which often is the executor itself, or the first of a pod's."""
    named = sorted(task.id for task in tasks if task.id)
    task = executor if executor in named or not named else named[0]
    return Work(framework, task, app_of(task))


def _containers_of(task: _Task) -> Iterable[str]:
    """The ids of the containers in which a task was seen, nested ones with their parents' before them."""
    for status in task.statuses:
        told = status.get("container_status")
        named = told.get("container_id") if isinstance(told, dict) else None
        try:
            yield str(msgspec.convert(named, _ContainerId))
        except msgspec.ValidationError:
            continue


def _decoded(name: str, body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise NotAnswered(f"{name} answered with something else than expected ({error})") from error
