"""What Marathon, master and agent tell each other: tasks to launch, and how they are."""

from __future__ import annotations

import base64
import os
import time
from dataclasses import dataclass, field
from typing import Any

TERMINAL = frozenset(
    "TASK_FINISHED TASK_FAILED TASK_KILLED TASK_ERROR TASK_DROPPED TASK_GONE TASK_GONE_BY_OPERATOR".split()
)
"""Nothing comes after these. TASK_LOST is one too for frameworks that know nothing of partitions."""


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task to launch. network_infos: NetworkInfo protobufs as JSON; labels: the task's own, (key, value).

    executor: the id of its executor, which is the task's own unless it is part of a pod.
    """

    id: str
    name: str
    framework: str
    command: tuple[str, ...] = ("sleep", "infinity")
    network_infos: tuple[dict[str, Any], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    executor: str = ""

    @property
    def executor_id(self) -> str:
        return self.executor or self.id

    @property
    def is_in_pod(self) -> bool:
        return self.executor_id != self.id


@dataclass(frozen=True, slots=True)
class Status:
    """How a task is. container: the id of its container, "" where nobody knows. network_infos: with addresses."""

    task: TaskInfo
    state: str
    agent: str
    container: str = ""
    network_infos: tuple[dict[str, Any], ...] = ()
    message: str = ""
    source: str = "SOURCE_EXECUTOR"
    reason: str = ""
    pid: int = 0
    timestamp: float = field(default_factory=time.time)
    uuid: str = field(default_factory=lambda: base64.b64encode(os.urandom(16)).decode())

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def addresses(self) -> list[dict[str, str]]:
        """protocol and ip_address of each."""
        return [address for info in self.network_infos for address in info.get("ip_addresses", ())]
