"""A Mesos agent: containers, what it says of them, and (HookAgent) how it really runs them.

HookAgent starts real processes in real network namespaces, and calls the hook exactly as a Mesos agent does
(docs/facts/mesos.md): for several networks at once, DEL with the configuration that was kept since ADD, a failed DEL
not again before the agent restarts, and none at all for what was on tmpfs when the machine rebooted.

    with HookAgent(master, node) as agent:      it registers; from now on frameworks launch tasks here
        agent.lose_dels = 1                     the next DEL never happens; the namespace's handle stays
        agent.crash(); agent.restart()
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from moorage.lab import Answer, Container, LabNode, Namespace, unique
from tests.standins import mesos_shapes as shapes
from tests.standins.mesos_master import Master
from tests.standins.service import Asked, Reply, Service, reply
from tests.standins.tasks import Status, TaskInfo

PORT = 5051

HOOK_WITHIN = 60.0
"""Seconds a hook may take here; Mesos itself has no limit."""

STATISTICS = {
    "cpus_user_time_secs": 0.02,
    "cpus_system_time_secs": 0.01,
    "cpus_soft_limit": 0.2,
    "mem_total_bytes": 3403776,
    "mem_kmem_usage_bytes": 565248,
    "mem_kmem_tcp_usage_bytes": 0,
    "mem_limit_bytes": 100663296,
    "mem_soft_limit_bytes": 100663296,
    "mem_file_bytes": 57344,
    "mem_anon_bytes": 2727936,
    "mem_cache_bytes": 57344,
    "mem_rss_bytes": 2727936,
    "mem_mapped_file_bytes": 8192,
    "mem_swap_bytes": 0,
    "mem_unevictable_bytes": 0,
    "mem_low_pressure_counter": 0,
    "mem_medium_pressure_counter": 0,
    "mem_critical_pressure_counter": 0,
}


@dataclass(slots=True)
class Contained:
    """A container as its agent knows it. network_infos: with addresses, once every network has given its own.

    nested: task id -> id of the nested container, for pods.
    """

    id: str
    tasks: list[TaskInfo]
    pid: int = 0
    network_infos: tuple[dict[str, Any], ...] = ()
    nested: dict[str, str] = field(default_factory=dict)
    statuses: list[Status] = field(default_factory=list)
    is_destroyed: bool = False
    killed: bool = False

    @property
    def framework(self) -> str:
        return self.tasks[0].framework

    @property
    def executor(self) -> str:
        return self.tasks[0].executor_id

    @property
    def addresses(self) -> list[str]:
        """Without prefix lengths."""
        found = [a["ip_address"] for info in self.network_infos for a in info.get("ip_addresses", ())]
        return [ip.split("/")[0] for ip in found]


class Agent(Service):
    """What every agent is: registered with a master, asked by HTTP. How containers run is for subclasses.

    omitted: ids of containers that its answers leave out, as they do for what a caller may not see. omits_all: all.
    """

    def __init__(self, master: Master, hostname: str, **place: Any) -> None:
        super().__init__(**place)
        self.master = master
        self.hostname = hostname
        self.id = ""
        self.containers: dict[str, Contained] = {}
        self.ended: list[Contained] = []
        self.omitted: set[str] = set()
        self.omits_all = False
        self._reaches_master = True
        self._unsent: list[Status] = []
        self._lock = threading.RLock()
        self._since = time.time()

    def start(self) -> None:
        """Serve, and register: as the agent it was before, unless it forgot."""
        super().start()
        if self._reaches_master:
            self._connect()

    def _connect(self) -> None:
        self.id = self.master.register(self, self.id)
        with self._lock:
            unsent, self._unsent = self._unsent, []
        for status in unsent:
            self.master.update(status)

    # -- what a master tells it

    def launch(self, tasks: list[TaskInfo]) -> None:
        """Start one container for these tasks; returns at once."""
        if self.is_running and self._reaches_master:
            container = Contained(str(uuid.uuid4()), tasks)
            if tasks[0].is_in_pod:
                container.nested = {task.id: str(uuid.uuid4()) for task in tasks}
            with self._lock:
                self.containers[container.id] = container
            self._begin(container)

    def kill(self, task: str) -> None:
        if self.is_running and self._reaches_master:
            container = self.of_task(task)
            if container is not None:
                container.killed = True
                self._end(container)

    def has(self, task: str) -> bool:
        return self.of_task(task) is not None

    def shut_down(self) -> None:
        """Everything ends here, and the agent's id with it."""
        for container in list(self.containers.values()):
            container.killed = True
            self._end(container)
        self.id = ""

    @abstractmethod
    def _begin(self, container: Contained) -> None:
        """Start what runs in it."""

    @abstractmethod
    def _end(self, container: Contained) -> None:
        """End it, whatever runs in it."""

    def of_task(self, task: str) -> Contained | None:
        with self._lock:
            for container in self.containers.values():
                if any(one.id == task for one in container.tasks):
                    return container
        return None

    # -- what it tells a master

    @property
    def reaches_master(self) -> bool:
        """Cut it off by setting this; statuses wait, and arrive when it is back."""
        return self._reaches_master

    @reaches_master.setter
    def reaches_master(self, reaches: bool) -> None:
        self._reaches_master = reaches
        if reaches and self.is_running:
            self._connect()

    def report(self, container: Contained, state: str, message: str = "", reason: str = "") -> None:
        """Tell how every task of a container is."""
        for task in container.tasks:
            status = Status(
                task,
                state,
                self.id,
                container.id,
                container.network_infos,
                message,
                reason=reason,
                pid=container.pid,
                source="SOURCE_SLAVE" if reason else "SOURCE_EXECUTOR",
            )
            with self._lock:
                container.statuses.append(status)
                waits = not (self._reaches_master and self.is_running)
                if waits:
                    self._unsent.append(status)
            if not waits:
                self.master.update(status)

    def forget(self, container: Contained) -> None:
        """It is destroyed: listed no more, but among what was completed."""
        container.is_destroyed = True
        with self._lock:
            if self.containers.pop(container.id, None) is not None:
                self.ended = [*self.ended[-99:], container]

    # -- its HTTP

    def answer(self, asked: Asked) -> Reply:
        match asked.method, asked.path:
            case "POST", "/api/v1":
                return self._operate(asked.json)
            case "GET", "/state" | "/slave(1)/state":
                return reply(self.state())
            case "GET", "/health":
                return Reply(200, b"", "text/plain")
            case _:
                return Reply(404, b"", "text/plain")

    def _operate(self, call: dict[str, Any]) -> Reply:
        if call.get("type") != "GET_CONTAINERS":
            return Reply(400, f"Failed to validate agent::Call: {call.get('type')}".encode(), "text/plain")
        nested = bool(call.get("get_containers", {}).get("show_nested"))
        rows = [row for container in self._visible() for row in self._container_rows(container, nested)]
        return reply({"type": "GET_CONTAINERS", "get_containers": {"containers": rows}})

    def _visible(self) -> list[Contained]:
        with self._lock:
            if self.omits_all:
                return []
            return [container for container in self.containers.values() if container.id not in self.omitted]

    def _container_rows(self, container: Contained, nested: bool) -> list[dict[str, Any]]:
        status: dict[str, Any] = {"container_id": shapes.value(container.id)}
        if container.network_infos:
            status["network_infos"] = list(container.network_infos)
        if container.pid:
            status["executor_pid"] = container.pid
        row = {
            "framework_id": shapes.value(container.framework),
            "executor_id": shapes.value(container.executor),
            "executor_name": _executor_name(container),
            "container_id": shapes.value(container.id),
            "container_status": status,
            "resource_statistics": {"timestamp": time.time(), **STATISTICS},
        }
        ids = [
            {**shapes.value(child), "parent": shapes.value(container.id)}
            for child in container.nested.values()
        ]
        children = [{**row, "container_id": id_, "container_status": {"container_id": id_}} for id_ in ids]
        return [row, *children] if nested else [row]

    def state(self) -> dict[str, Any]:
        """/state."""
        now, then = self._visible(), list(self.ended)
        running = {container.framework for container in now}
        return {
            "version": shapes.VERSION,
            "git_sha": "c1b42f79d157aa900be5cbb0c1023f1479962aa7",
            "git_branch": "refs/heads/master",
            "build_date": "2026-11-23 16:06:02 UTC",
            "build_time": 1795449962.0,
            "build_user": "",
            "start_time": self._since,
            "id": self.id,
            "pid": f"slave(1)@{self.host}:{self.port}",
            "hostname": self.hostname,
            "capabilities": shapes.CAPABILITIES,
            "resources": shapes.flat_resources(),
            "reserved_resources": {},
            "unreserved_resources": shapes.flat_resources(),
            "reserved_resources_full": {},
            "unreserved_resources_full": shapes.resources(role=True),
            "reserved_resources_allocated": {},
            "unreserved_resources_allocated": {**shapes.used(0.2 * len(now), 96.0 * len(now)), "gpus": 0.0},
            "resource_providers": [],
            "attributes": {},
            "master_hostname": "localhost",
            "frameworks": [self._framework(f, now, then) for f in sorted(running)],
            "completed_frameworks": [
                self._framework(f, [], then) for f in sorted({c.framework for c in then} - running)
            ],
        }

    def _framework(self, id_: str, now: Iterable[Contained], then: Iterable[Contained]) -> dict[str, Any]:
        known = self.master.frameworks.get(id_)
        return {
            "id": id_,
            "name": known.name if known else "",
            "user": "root",
            "failover_timeout": 604800.0,
            "checkpoint": True,
            "hostname": "",
            "role": "*",
            "executors": [self._executor(c) for c in now if c.framework == id_],
            "completed_executors": [self._executor(c) for c in then if c.framework == id_],
        }

    def _executor(self, container: Contained) -> dict[str, Any]:
        latest = {status.task.id: status for status in container.statuses}
        queued = [task for task in container.tasks if task.id not in latest]
        known = [self._task(task, container) for task in container.tasks if task.id in latest]
        done = [row for row in known if latest[row["id"]].is_terminal]
        directory = (
            f"/var/lib/mesos/slaves/{self.id}/frameworks/{container.framework}/executors/{container.executor}"
        )
        row: dict[str, Any] = {
            "id": container.executor,
            "name": _executor_name(container),
            "source": container.executor,
            "container": container.id,
            "directory": f"{directory}/runs/{container.id}",
            "resources": shapes.used(0.2, 96.0),
            "role": "*",
            "tasks": [row for row in known if row not in done],
            "queued_tasks": [self._queued(task) for task in queued],
            "completed_tasks": done,
        }
        if container.tasks[0].labels:
            row["labels"] = shapes.operator_labels(container.tasks[0].labels)["labels"]
        return row

    def _queued(self, task: TaskInfo) -> dict[str, Any]:
        row: dict[str, Any] = {
            "id": task.id,
            "name": task.name,
            "slave_id": self.id,
            "resources": shapes.used(0.1, 64.0),
            "role": "*",
            "command": {"shell": False, "value": task.command[0], "argv": list(task.command), "uris": []},
        }
        if task.labels:
            row["labels"] = shapes.operator_labels(task.labels)["labels"]
        return row

    def _task(self, task: TaskInfo, container: Contained) -> dict[str, Any]:
        statuses = [status for status in container.statuses if status.task is task]
        row: dict[str, Any] = {
            "id": task.id,
            "name": task.name,
            "framework_id": task.framework,
            "executor_id": task.executor,
            "slave_id": self.id,
            "state": statuses[-1].state,
            "resources": shapes.used(0.1, 32.0),
            "role": "*",
            "statuses": [_status_in_state(status) for status in statuses],
            "container": shapes.container_type(task),
        }
        if task.labels:
            row["labels"] = shapes.operator_labels(task.labels)["labels"]
        return row


def _executor_name(container: Contained) -> str:
    task = container.tasks[0]
    if task.is_in_pod:
        return ""
    return f"Command Executor (Task: {task.id}) (Command: {' '.join(task.command)[:60]})"


def _status_in_state(status: Status) -> dict[str, Any]:
    found: dict[str, Any] = {"container_id": shapes.value(status.container)}
    if status.network_infos:
        found["network_infos"] = [shapes.in_state(info) for info in status.network_infos]
    return {"state": status.state, "timestamp": status.timestamp, "container_status": found}


# -- containers for real


class Hooked(Container):
    """A container's calls of the hook. has_namespace: whether there is one to tell the hook about."""

    has_namespace = True

    def environment(self, command: str, ifname: str) -> dict[str, str]:
        """Six variables; five without a namespace."""
        variables = super().environment(command, ifname)
        if not self.has_namespace:
            del variables["CNI_NETNS"]
        return variables


@dataclass(slots=True)
class Running:
    """What really is there of a container.

    launched: all networks were joined, so that its command runs. destroyed: nothing is to be started any more. kept:
    ifname -> the configuration of its ADD, byte for byte. starting: held by who starts or destroys it.
    """

    container: Contained
    hooked: Hooked
    process: subprocess.Popen[bytes] | None = None
    launched: bool = False
    destroyed: bool = False
    starting: threading.Lock = field(default_factory=threading.Lock)
    kept: dict[str, bytes] = field(default_factory=dict)


class HookAgent(Agent):
    """See the module's docstring. Everything it made is gone when its context ends.

    lose_dels: so many containers end from now on without any DEL, and their namespaces' handles stay.
    hook_fails: DELs fail from now on, as when the hook cannot be executed. calls: (command, container, ifname, exit) of
    every call of the hook. It listens inside its node, unless ``place`` and ``host`` say otherwise.
    """

    def __init__(self, master: Master, node: LabNode, port: int = PORT, **place: Any) -> None:
        super().__init__(
            master, node.name, port=port, **{"place": node.namespace.path, "host": node.ip, **place}
        )
        self.node = node
        self.lose_dels = 0
        self.hook_fails = False
        self.lost: list[Running] = []
        self.calls: list[tuple[str, str, str, int]] = []
        self._running: dict[str, Running] = {}
        self._undeleted: list[Running] = []
        self._threads: list[threading.Thread] = []
        self._down = False

    def __exit__(self, *_: object) -> None:
        self._down = True
        self.stop()
        for running in [*self._running.values(), *self.lost, *self._undeleted]:
            self._cut_off(running)
        for thread in self._threads:
            thread.join()

    def _begin(self, container: Contained) -> None:
        hooked = Hooked(self.node.socket, id=container.id, namespace=Namespace(unique("task")))
        self._running[container.id] = running = Running(container, hooked)
        self._start_thread(self._live, running)

    def _start_thread(self, work: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _live(self, running: Running) -> None:
        """A container's whole life."""
        container = running.container
        with running.starting:
            if running.destroyed:
                return
            running.hooked.namespace.create()
            running.process = _start(running.hooked.namespace, container.tasks[0].command)
            container.pid = running.process.pid
            if container.killed:
                _kill(running)
        failed = self._add(running)
        if failed is not None:
            message = f"Failed to launch container: {failed.stdout}{failed.stderr}"
            self.report(container, "TASK_FAILED", message, "REASON_CONTAINER_LAUNCH_FAILED")
        elif not self._down and not running.destroyed:
            _go(running.process)
            running.launched = True
            self.report(container, "TASK_STARTING")
            self.report(container, "TASK_RUNNING")
            running.process.wait()
        if not self._down:
            self._destroy(running)

    def _add(self, running: Running) -> Answer | None:
        """Join every network at once; the answer of one that failed."""
        hooked, container = running.hooked, running.container
        infos = container.tasks[0].network_infos
        calls = []
        for number, info in enumerate(infos):
            ifname = f"eth{number}"
            config = {**hooked.config(info["name"]), "args": {"org.apache.mesos": {"network_info": info}}}
            running.kept[ifname] = msgspec.json.encode(config, order="deterministic")
            calls.append((ifname, hooked.start_call("ADD", running.kept[ifname], ifname)))
        answers = [(ifname, hooked.finish_call(call, HOOK_WITHIN)) for ifname, call in calls]
        self.calls += [("ADD", container.id, ifname, answer.exit) for ifname, answer in answers]
        for _, answer in answers:
            if answer.exit != 0:
                return answer
        container.network_infos = tuple(
            _with_addresses(info, answer) for info, (_, answer) in zip(infos, answers, strict=True)
        )
        return None

    def _end(self, container: Contained) -> None:
        running = self._running.get(container.id)
        if running is not None:
            with running.starting:
                if running.process is not None:
                    _kill(running)

    def _destroy(self, running: Running) -> None:
        """Its process has ended: DEL, the handle away, and the task's end reported. Nothing the second time."""
        container = running.container
        if self._running.pop(container.id, None) is None:
            return
        with running.starting:
            running.destroyed = True
        if running.process is not None:
            _kill(running)
            running.hooked.namespace.end_processes()
        with self._lock:
            loses = self.lose_dels > 0
            self.lose_dels -= loses
        if loses:
            self.lost.append(running)
        elif self._delete(running):
            running.hooked.namespace.delete()
        else:
            self._undeleted.append(running)
        self.forget(container)
        if running.launched and running.process is not None:
            killed = container.killed or running.process.returncode < 0
            state = (
                "TASK_KILLED" if killed else "TASK_FAILED" if running.process.returncode else "TASK_FINISHED"
            )
            self.report(container, state)
        elif not container.statuses:
            # Its agent crashed while it was launched.
            self.report(container, "TASK_FAILED", "Executor terminated", "REASON_EXECUTOR_TERMINATED")

    def _delete(self, running: Running) -> bool:
        """DEL from every network at once; whether all succeeded."""
        if self.hook_fails:
            self.calls += [("DEL", running.container.id, ifname, 1) for ifname in running.kept]
            return False
        calls = [
            (ifname, running.hooked.start_call("DEL", kept, ifname)) for ifname, kept in running.kept.items()
        ]
        answers = [(ifname, running.hooked.finish_call(call, HOOK_WITHIN)) for ifname, call in calls]
        self.calls += [("DEL", running.container.id, ifname, answer.exit) for ifname, answer in answers]
        return all(answer.exit == 0 for _, answer in answers)

    # -- what befalls it

    def crash(self) -> None:
        """kill -9 of the agent: containers go on, and nobody sees them end."""
        self._down = True
        self.stop()

    def restart(self) -> None:
        """It is back and recovers: what ended meanwhile is destroyed now, and failed DELs are repeated."""
        self._down = False
        self.start()
        again, self._undeleted = self._undeleted, []
        for running in again:
            if self._delete(running):
                running.hooked.namespace.delete()
            else:
                self._undeleted.append(running)
        for running in list(self._running.values()):
            self._start_thread(self._recover, running)

    def _recover(self, running: Running) -> None:
        if running.process is not None and running.launched:
            running.process.wait()
        if not self._down:
            self._destroy(running)

    def power_off(self) -> None:
        """The machine is dead, and all containers with it; nobody is told. The node is switched off by the caller."""
        self.crash()
        for running in [*self._running.values(), *self.lost, *self._undeleted]:
            self._cut_off(running)
            running.hooked.has_namespace = False
        for thread in self._threads:
            thread.join()

    def power_on(self, *, keeps_state: bool) -> None:
        """The machine has booted. With its state the agent is the same and calls DEL, without a namespace, for what
        was there; without it is a new agent that knows of nothing.
        """
        self._down = False
        dead, self._running = list(self._running.values()), {}
        dead += self._undeleted
        self._undeleted, self.lost = [], []
        if not keeps_state:
            self.id = ""
            self.containers.clear()
            self._unsent.clear()
        self.start()
        if keeps_state:
            for running in dead:
                if not self._delete(running):
                    self._undeleted.append(running)
                if running.container.id in self.containers:
                    self.forget(running.container)
                    reason = "REASON_EXECUTOR_TERMINATED"
                    self.report(running.container, "TASK_GONE", "Executor terminated", reason)

    def end_process(self, container: Contained) -> None:
        """A container's process dies by itself; what is seen of that depends on who looks."""
        _kill(self._running[container.id])

    def _cut_off(self, running: Running) -> None:
        """Its processes and its namespace are gone."""
        with running.starting:
            running.destroyed = True
        if running.process is not None:
            _kill(running)
        running.hooked.namespace.end_processes()
        running.hooked.namespace.delete()

    def live_addresses(self) -> dict[str, str]:
        """address -> container, of every namespace that has a process: looked at, not remembered."""
        found = {}
        for running in list(self._running.values()):
            namespace = running.hooked.namespace
            if namespace.exists and namespace.processes():
                shown = namespace.run("ip", "-j", "address", "show", "scope", "global", check=False).stdout
                for link in msgspec.json.decode(shown or "[]"):
                    found |= {a["local"]: running.container.id for a in link.get("addr_info", ())}
        return found

    def whereabouts(self, container: str) -> str:
        """What is left of a container, for people who ask why its address is kept: "" if it never was one here."""
        kept = {"running": list(self._running.values()), "DEL lost": self.lost, "DEL failed": self._undeleted}
        for how, some in kept.items():
            for running in some:
                if running.container.id == container:
                    return f"{how}, launched: {running.launched}; {_occupants(running.hooked.namespace)}"
        calls = [(command, exit_) for command, id_, _, exit_ in self.calls if id_ == container]
        return f"ended; its hook's calls: {calls}" if calls else ""


def _occupants(namespace: Namespace) -> str:
    """Who is in a namespace, and who started them."""
    if not namespace.exists:
        return f"{namespace.name} has no handle any more"
    rows = []
    for pid in namespace.processes():
        with contextlib.suppress(OSError):
            process = Path(f"/proc/{pid}")
            command = process.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = re.search(r"^PPid:\s*(\d+)", process.joinpath("status").read_text(), re.MULTILINE)
            rows.append(f"{pid} ({command.strip()}) of parent {parent and parent[1]}")
    return f"in {namespace.name}: {', '.join(rows) or 'no process'}"


def _start(namespace: Namespace, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """A container's process, which waits for ``_go`` before it becomes the command: while networks are joined there is
    somebody inside already, as with Mesos.
    """
    return namespace.start(
        "sh", "-c", 'read -r _ && exec "$@"', "sh", *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def _go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # killed meanwhile
        process.stdin.write(b"\n")
        process.stdin.close()


def _kill(running: Running) -> None:
    assert running.process is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()


def _with_addresses(info: dict[str, Any], answer: Answer) -> dict[str, Any]:
    """A NetworkInfo with what the hook gave; IPv6 keeps its prefix length, as Mesos keeps it."""
    given = []
    if "ip4" in answer.json:
        given.append({"protocol": "IPv4", "ip_address": answer.json["ip4"]["ip"].split("/")[0]})
    if "ip6" in answer.json:
        given.append({"protocol": "IPv6", "ip_address": answer.json["ip6"]["ip"]})
    return {**info, "ip_addresses": given}
