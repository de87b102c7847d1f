"""How a Mesos 1.12 master and agent write what they know, as recorded in tests/data/mesos."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tests.standins.tasks import Status, TaskInfo

VERSION = "1.12.0"
CAPABILITIES = (
    "MULTI_ROLE HIERARCHICAL_ROLE RESERVATION_REFINEMENT RESOURCE_PROVIDER RESIZE_VOLUME AGENT_OPERATION_FEEDBACK "
    "AGENT_DRAINING TASK_RESOURCE_LIMITS"
).split()
_AMOUNTS = (("cpus", 2.0), ("mem", 2048.0), ("disk", 2048.0))


def value(text: str) -> dict[str, str]:
    """An id."""
    return {"value": text}


def resources(*, role: bool) -> list[dict[str, Any]]:
    """What an agent has."""
    more = {"role": "*"} if role else {}
    scalars = [{"name": n, "type": "SCALAR", "scalar": {"value": a}, **more} for n, a in _AMOUNTS]
    ports = {"range": [{"begin": 31000, "end": 32000}]}
    return [*scalars, {"name": "ports", "type": "RANGES", "ranges": ports, **more}]


def flat_resources() -> dict[str, Any]:
    """The same in /state."""
    return {"disk": 2048.0, "mem": 2048.0, "gpus": 0.0, "cpus": 2.0, "ports": "[31000-32000]"}


def used(cpus: float, mem: float) -> dict[str, float]:
    return {"disk": 0.0, "mem": mem, "gpus": 0.0, "cpus": cpus}


def operator_labels(labels: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """In the operator API; /state has the list alone."""
    return {"labels": [{"key": key, "value": text} for key, text in labels]}


def in_state(info: dict[str, Any]) -> dict[str, Any]:
    """A NetworkInfo of a status in /state: its labels are a list of their own there."""
    labels = info.get("labels")
    return {**info, **({"labels": labels["labels"]} if labels else {})}


def container_status(status: Status) -> dict[str, Any]:
    found: dict[str, Any] = {"container_id": value(status.container)}
    if status.network_infos:
        found["network_infos"] = list(status.network_infos)
    if status.pid:
        found["executor_pid"] = status.pid
    return found


def status_row(status: Status) -> dict[str, Any]:
    """A TaskStatus in the operator API."""
    row: dict[str, Any] = {
        "task_id": value(status.task.id),
        "state": status.state,
        "source": status.source,
        "agent_id": value(status.agent),
        "timestamp": status.timestamp,
    }
    if status.source == "SOURCE_EXECUTOR":
        row |= {"executor_id": value(status.task.executor_id), "uuid": status.uuid}
    if status.message:
        row["message"] = status.message
    if status.reason:
        row["reason"] = status.reason
    if status.container:
        row["container_status"] = container_status(status)
    return row


def container_type(task: TaskInfo) -> dict[str, Any]:
    return {"type": "MESOS", "network_infos": list(task.network_infos)}


def task_row(task: TaskInfo, state: str, agent: str, statuses: Sequence[Status]) -> dict[str, Any]:
    """A task in the master's operator API."""
    allocated = {"allocation_info": {"role": "*"}}
    row: dict[str, Any] = {
        "name": task.name,
        "task_id": value(task.id),
        "framework_id": value(task.framework),
        "agent_id": value(agent),
        "state": state,
        "resources": [
            {"name": "cpus", "type": "SCALAR", "scalar": {"value": 0.1}, **allocated},
            {"name": "mem", "type": "SCALAR", "scalar": {"value": 32.0}, **allocated},
        ],
        "statuses": [status_row(status) for status in statuses],
        "container": container_type(task),
    }
    if statuses:
        row |= {"status_update_state": statuses[-1].state, "status_update_uuid": statuses[-1].uuid}
    if task.is_in_pod:
        row["executor_id"] = value(task.executor_id)
    if task.labels:
        row["labels"] = operator_labels(task.labels)
    return row


def agent_row(agent: str, hostname: str, port: int, since: float, *, active: bool) -> dict[str, Any]:
    """An agent in the master's operator API."""
    return {
        "agent_info": agent_info(agent, hostname, port),
        "active": active,
        "deactivated": False,
        "version": VERSION,
        "pid": f"slave(1)@{hostname}:{port}",
        "registered_time": {"nanoseconds": int(since * 1e9)},
        "total_resources": resources(role=True),
        "capabilities": [{"type": name} for name in CAPABILITIES],
    }


def agent_info(agent: str, hostname: str, port: int) -> dict[str, Any]:
    return {
        "hostname": hostname,
        "port": port,
        "resources": resources(role=False),
        "id": value(agent),
        "checkpoint": True,
    }


def framework_row(framework: str, name: str, *, active: bool) -> dict[str, Any]:
    """A framework in the master's operator API."""
    return {
        "framework_info": framework_info(framework, name),
        "active": active,
        "connected": active,
        "recovered": False,
        "registered_time": {"nanoseconds": 1795451170501314048},
        "reregistered_time": {"nanoseconds": 1795451170501314048},
        "allocated_resources": [],
        "offer_constraints": {},
    }


def framework_info(framework: str, name: str) -> dict[str, Any]:
    return {
        "user": "root",
        "name": name,
        "id": value(framework),
        "failover_timeout": 604800.0,
        "checkpoint": True,
        "role": "*",
        "capabilities": [{"type": "PARTITION_AWARE"}, {"type": "TASK_KILLING_STATE"}],
    }
