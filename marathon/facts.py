"""Facts about tasks, addresses, nodes and Mesos agents, as plain values: what reconcile.py judges by.

They come from four places that do not agree at every moment: the store (addresses, nodes), Marathon (tasks), its
event stream (what ended), the Mesos master (agents). A set of facts says which of them it has.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

ENGINE = "mesos"
"""The engine of endpoints that a Mesos agent asked for (netmodules/cni/spec.py)."""

NODE_BOUND = frozenset({ENGINE, "mesos-netmodules"})
"""Engines whose containers are gone when Mesos says that their node is. Of one that calls by net-modules nobody knows
which task a container is for (isolator/engines.py): its addresses are never judged one by one."""

_TASK_ID = re.compile(
    r"(?P<app>.+?)\.(?:(?:instance|marathon)-)?(?P<uuid>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?P<part>\..*)?",
    re.ASCII | re.DOTALL,
)


class Condition(enum.StrEnum):
    """What a Mesos task state says about the task's container.

    live: it is there, or will be. ended: it is not. unreachable: its agent is cut off, and it may well run.
    unknown: nobody knows. gone: it went with its agent, or that is what the state may mean (TASK_GONE is also said of a
    single task that a living agent does not know: docs/decisions/task-gone.md). expelled: an operator told the master
    that the agent will never be back.
    """

    LIVE = "live"
    ENDED = "ended"
    UNREACHABLE = "unreachable"
    UNKNOWN = "unknown"
    GONE = "gone"
    EXPELLED = "expelled"


CONDITIONS = {
    "TASK_STAGING": Condition.LIVE,
    "TASK_STARTING": Condition.LIVE,
    "TASK_RUNNING": Condition.LIVE,
    "TASK_KILLING": Condition.LIVE,
    "TASK_FINISHED": Condition.ENDED,
    "TASK_FAILED": Condition.ENDED,
    "TASK_KILLED": Condition.ENDED,
    "TASK_ERROR": Condition.ENDED,
    "TASK_DROPPED": Condition.ENDED,
    "TASK_UNREACHABLE": Condition.UNREACHABLE,
    "TASK_UNKNOWN": Condition.UNKNOWN,
    # Old masters say it of what is gone, unreachable or unknown alike.
    "TASK_LOST": Condition.UNKNOWN,
    "TASK_GONE": Condition.GONE,
    "TASK_GONE_BY_OPERATOR": Condition.EXPELLED,
}

OVER = frozenset({Condition.ENDED, Condition.GONE, Condition.EXPELLED})
"""Nothing comes after these."""


def condition_of(state: str) -> Condition:
    """A state that nobody knows yet says nothing; one that is missing is of a task that is listed, so it is there."""
    return CONDITIONS.get(state, Condition.UNKNOWN) if state else Condition.LIVE


def instance_of(task: str) -> str:
    """What a Marathon task id and the instance id of the same container have in common.

    ``web.instance-<uuid>._app.1``, ``web.marathon-<uuid>`` and ``web.<uuid>`` are all ``web.<uuid>``. An id that is
    not Marathon's is returned as it is.
    """
    found = _TASK_ID.fullmatch(task)
    return task if found is None else f"{found['app']}.{found['uuid']}"


def app_of(task: str) -> str:
    """The app or pod that a Marathon task belongs to, ``/group/web``; "" if the id is not Marathon's.

    App ids have no ``_``, so that Marathon's change of ``/`` into it can be turned back.
    """
    found = _TASK_ID.fullmatch(task)
    return "" if found is None else "/" + found["app"].replace("_", "/")


def is_of_pod(task: str) -> bool:
    """Whether a Marathon task is one of a pod's containers: those have their container's name behind the instance."""
    found = _TASK_ID.fullmatch(task)
    part = (found and found["part"]) or ""
    return bool(part) and not part.startswith("._app") and not part[1:].isdecimal()


class Task(msgspec.Struct, frozen=True, gc=False, rename="camel"):
    """A task as Marathon lists it. slave_id: the Mesos agent's; "" where it is not told."""

    id: str
    app_id: str = ""
    state: str = ""
    slave_id: str | None = None

    @property
    def condition(self) -> Condition:
        return condition_of(self.state)


class Assigned(msgspec.Struct, gc=False, omit_defaults=True):
    """An assigned address as the store has it: of ipam/records.py `Address` only what is judged by.

    ip, revision: of its key. instance: of its task, "" without one.
    """

    state: str
    node: str
    id: str = ""
    container_id: str = ""
    network: str = ""
    engine: str = ""
    framework: str = ""
    task: str = ""
    app: str = ""
    netgroups: tuple[str, ...] = ()
    ip: str = ""
    revision: int = 0
    instance: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Names this assignment of this address, and no later one."""
        return self.ip, self.id


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """A node.

    mesos_agent: the id of the Mesos agent there, "" if it was never told. away_since: since when its own agent has
    given no sign of life, by the monotonic clock of who watches; None while it runs. revision: of what it said of
    itself last, 0 if it never did.
    """

    name: str
    mesos_agent: str = ""
    away_since: float | None = None
    revision: int = 0

    @property
    def alive(self) -> bool:
        """Whether its agent runs."""
        return self.away_since is None


@dataclass(frozen=True, slots=True)
class Agents:
    """The Mesos master's word on its agents, by their ids.

    present: registered, or known from before the master's failover and not back yet. unreachable: cut off. gone: an
    operator said that they will not be back.
    """

    present: frozenset[str] = frozenset()
    unreachable: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()

    def knows(self, agent: str) -> bool:
        """Whether the agent may be running, as far as the master can tell."""
        return agent in self.present or agent in self.unreachable


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known now.

    framework: the id that Marathon has with the master. tasks: by instance (``instance_of``), as Marathon listed them,
    None if it did not answer. ended: instances of which the event stream said that they are over, and how.
    reported_gone: Mesos agents of which a task was reported TASK_GONE; expelled: TASK_GONE_BY_OPERATOR.
    agents: None if no master answered.
    """

    framework: str
    tasks: Mapping[str, Task] | None
    nodes: Mapping[str, NodeFacts] = field(default_factory=dict)
    ended: Mapping[str, Condition] = field(default_factory=dict)
    reported_gone: frozenset[str] = frozenset()
    expelled: frozenset[str] = frozenset()
    agents: Agents | None = None
