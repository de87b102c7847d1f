"""How a standing lab is, as rows: what ``moorage lab status`` shows.

What can be seen from outside is looked at, so that a lab with dead agents or a dead store has a status too.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from ipam.errors import MoorageError
from moorage import admin
from moorage.lab.etcd import Member
from moorage.lab.node import MOORAGE, LabNode, with_source
from moorage.lab.standing import NETWORKS, StandingLab
from moorage.lab.task import Task

Row = dict[str, Any]


def survey(lab: StandingLab) -> Row:
    """Everything of it. A node's ``blocks`` are null when the store cannot be asked."""
    record, blocks = lab.record, _blocks_by_node(lab)
    return {
        "lab": lab.name,
        "complete": record.complete,
        "fabric": record.fabric,
        "networks": list(NETWORKS),
        "since": record.since,
        "store": lab.cluster.etcd.url,
        "nodes": [_node(node, blocks) for node in lab.cluster.everyone],
        "etcd": [_member(member) for member in lab.cluster.etcd.members],
        "containers": [task_row(task) for task in lab.tasks()],
        "partitions": [{"between": one, "and": other} for one, other in _partitions(lab)],
    }


def _node(node: LabNode, blocks: dict[str, list[str]] | None) -> Row:
    return {
        "node": node.name,
        "agent": _state(node),
        "pid": node.pid if node.is_running else None,
        "underlay": node.ip,
        "blocks": None if blocks is None else blocks.get(node.name, []),
        **_asked(node),
    }


def _state(node: LabNode) -> str:
    if not node.is_on:
        return "switched off"
    return "running" if node.is_running else "killed"


def _asked(node: LabNode) -> Row:
    """What only its agent knows."""
    if not node.is_running:
        return {"endpoints": None, "problem": None}
    try:
        status = admin.call(str(node.socket), "status")
    except MoorageError as error:
        return {"endpoints": None, "problem": str(error)}
    problems = [*filter(None, [status["problem"]]), *status["fabric"]["problems"]]
    return {"endpoints": sum(status["endpoints"].values()), "problem": "; ".join(problems) or None}


def _member(member: Member) -> Row:
    running = member.is_running
    return {
        "member": member.name,
        "state": "running" if running else "killed",
        "pid": member.etcd.pid if running else None,
        "underlay": member.ip,
    }


def task_row(task: Task) -> Row:
    """One container."""
    record = task.record
    return {
        "container": task.name,
        "id": record.id,
        "node": record.node,
        "addresses": record.addresses,
        "labels": record.labels,
        "command": list(record.command),
        "pid": task.pid,
        "log": str(task.log),
    }


def _partitions(lab: StandingLab) -> list[tuple[str, str]]:
    return lab.partitions() if lab.cluster.switch.namespace.exists else []


def _blocks_by_node(lab: StandingLab) -> dict[str, list[str]] | None:
    """node -> CIDRs, asked where no partition between nodes matters: beside a member of etcd."""
    beside = next((member for member in lab.cluster.etcd.members if member.is_running), None)
    if beside is None:
        return None
    environment = with_source(lab.cluster.nodes[0].environment)
    try:
        listed = beside.namespace.run(*MOORAGE, "block", "list", "-o", "json", environment=environment)
    except subprocess.CalledProcessError:
        return None
    found: dict[str, list[str]] = {}
    for row in json.loads(listed.stdout or "[]"):
        found.setdefault(row["node"], []).append(row["block"])
    return found
