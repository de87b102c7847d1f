"""A Marathon: apps and pods become tasks on a master's agents, and it says so by REST and by events.

    marathon = Marathon(master)
    with marathon.instance() as one, marathon.instance() as other:      they elect a leader
        marathon.deploy({"id": "/web", "instances": 2, ...})
        marathon.fail_over()

What it is faithful to, and what not: README.md. Times are its own: what Marathon decides after minutes (to replace
an unreachable task, to forget one) it decides here when a test says so.
"""

from __future__ import annotations

import random
import re
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec

from tests.standins.events import Streams
from tests.standins.service import Asked, Replica, Reply, reply
from tests.standins.tasks import Status, TaskInfo

CONDITIONS = {
    "TASK_STAGING": "Staging",
    "TASK_STARTING": "Starting",
    "TASK_RUNNING": "Running",
    "TASK_KILLING": "Killing",
    "TASK_KILLED": "Killed",
    "TASK_FAILED": "Failed",
    "TASK_FINISHED": "Finished",
    "TASK_ERROR": "Error",
    "TASK_DROPPED": "Dropped",
    "TASK_LOST": "Unreachable",
    "TASK_UNREACHABLE": "Unreachable",
    "TASK_UNKNOWN": "Unknown",
    "TASK_GONE": "Gone",
    "TASK_GONE_BY_OPERATOR": "Gone",
}
"""What an instance of an app is, by the state of its task."""


class Scheduled(Protocol):
    """The part of a Mesos master that a framework needs."""

    def subscribe(self, framework: Marathon) -> None: ...

    def usable(self) -> list[str]:
        """Ids of agents that offer resources."""

    def hostname(self, agent: str) -> str: ...

    def launch(self, agent: str, tasks: list[TaskInfo]) -> None: ...

    def kill(self, agent: str, task: str) -> None: ...


@dataclass(slots=True)
class Task:
    """One task as Marathon knows it."""

    info: TaskInfo
    app: str
    agent: str
    host: str
    version: str
    state: str = "TASK_STAGING"
    staged: float = field(default_factory=time.time)
    started: float | None = None
    addresses: list[dict[str, str]] = field(default_factory=list)
    message: str = ""

    @property
    def instance(self) -> str:
        """The instance's id: some_app.instance-UUID, or without ``instance-`` before Marathon 1.9."""
        return self.info.id.partition("._app")[0]


class Marathon:
    """See the module's docstring. What all its instances share; ZooKeeper's part of it.

    legacy: shapes of Marathon 1.4: ``ipAddress`` in apps, no ``ipAddresses`` in events, TASK_LOST for unreachable ones.
    keepalive: seconds between blank lines on a silent stream. chance: draws faults and places.
    """

    def __init__(
        self,
        master: Scheduled | None = None,
        *,
        name: str = "marathon",
        framework: str = "",
        legacy: bool = False,
        keepalive: float = 5.0,
        chance: random.Random | None = None,
    ) -> None:
        self.name = name
        self.framework = framework or f"{uuid.uuid4()}-0000"
        self.legacy = legacy
        self.version = "1.4.3" if legacy else "1.11.24"
        self.apps: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.tasks: dict[str, Task] = {}
        self.instances: list[Instance] = []
        self.chance = chance or random.Random(0)
        self.streams = Streams(self.chance, keepalive)
        self.elected: Instance | None = None
        self._master = master
        self._lock = threading.RLock()
        self._listed: bytes | None = None
        if master is not None:
            master.subscribe(self)

    def instance(self, **place: Any) -> Instance:
        """One more process of it; ``place`` goes to Service. The first that runs is elected."""
        return Instance(self, **place)

    # -- leadership

    def elect(self) -> None:
        """If nobody leads who runs, the first that does is elected. Every stream ends when the leader changes."""
        with self._lock:
            if self.elected is not None and self.elected.is_running:
                return
            self.streams.close()
            self.elected = next((one for one in self.instances if one.is_running), None)

    def fail_over(self) -> None:
        """The leader abdicates and the next instance is elected."""
        with self._lock:
            self.streams.close()
            running = [one for one in self.instances if one.is_running]
            others = [one for one in running if one is not self.elected]
            self.elected = next(iter(others or running), None)

    # -- what users want

    def deploy(self, app: dict[str, Any]) -> None:
        """Create or change an app, as in POST and PUT /v2/apps."""
        with self._lock:
            known = self.apps.get(app["id"], {})
            now = _stamp(time.time())
            self.apps[app["id"]] = {"instances": 1, "labels": {}, **known, **app, "version": now}
            self._changed()
            self._publish(
                "api_post_event", clientIp="127.0.0.1", uri="/v2/apps", appDefinition=self.apps[app["id"]]
            )
        self.converge(app["id"])
        self._publish("deployment_success", id=str(uuid.uuid4()))

    def scale(self, app: str, instances: int) -> None:
        with self._lock:
            self.apps[app]["instances"] = instances
        self.converge(app)

    def destroy(self, app: str) -> None:
        """Delete an app or pod; its tasks are killed."""
        with self._lock:
            known = self.apps.pop(app, None) or self.pods.pop(app, None)
            self._changed()
        if known is not None:
            self.converge(app)
            self._publish("app_terminated_event", appId=app)

    def run_pod(self, pod: dict[str, Any]) -> None:
        """Create a pod: its containers share one address."""
        with self._lock:
            self.pods[pod["id"]] = {"version": _stamp(time.time()), **pod}
        self.converge(pod["id"])
        self._publish("pod_created_event", clientIp="127.0.0.1", uri="/v2/pods")

    def kill(self, task: str) -> None:
        """Kill one task; another takes its place if its app wants that."""
        with self._lock:
            known = self.tasks.get(task)
            if known is None:
                return
            known.state = "TASK_KILLING"
            self._changed()
            self._tell(known)
        if self._master is not None:
            self._master.kill(known.agent, task)

    def converge(self, app: str) -> None:
        """Start and kill tasks until there are as many as its definition says."""
        with self._lock:
            wanted = self._wanted(app)
            mine = [t for t in self.tasks.values() if t.app == app and t.state != "TASK_KILLING"]
            alive = [t for t in mine if t.state not in ("TASK_UNREACHABLE", "TASK_LOST")]
            instances = sorted({t.instance for t in alive}, key=str)
            spare = set(instances[wanted:])
            kills = [t.info.id for t in alive if t.instance in spare]
            if app not in self.apps and app not in self.pods:
                kills += [t.info.id for t in mine if t not in alive]
            launches = [self._launch(app) for _ in range(wanted - len(instances))]
        for launch in launches:
            if launch and self._master is not None:
                self._master.launch(launch[0], launch[1])
        for task in kills:
            self.kill(task)

    def _wanted(self, app: str) -> int:
        if app in self.pods:
            return int(self.pods[app].get("scaling", {}).get("instances", 1))
        return int(self.apps.get(app, {}).get("instances", 0))

    def _launch(self, app: str) -> tuple[str, list[TaskInfo]] | None:
        """Note the tasks of one more instance; agent and tasks, None if nobody offers anything."""
        assert self._master is not None, "a Marathon without a master launches nothing"
        usable = self._master.usable()
        if not usable:
            return None
        agent = self.chance.choice(usable)
        definition = self.pods.get(app) or self.apps[app]
        instance = f"{app.strip('/').replace('/', '_')}.{'' if self.legacy else 'instance-'}{uuid.uuid4()}"
        infos = _network_infos(definition)
        labels = tuple(definition.get("labels", {}).items())
        tasks = []
        for name, command in _commands(definition):
            id_ = f"{instance}.{name}" if name else instance if self.legacy else f"{instance}._app.1"
            executor = instance if name else ""
            info = TaskInfo(id_, name or app.strip("/"), self.framework, command, infos, labels, executor)
            self.tasks[id_] = Task(info, app, agent, self._master.hostname(agent), definition["version"])
            tasks.append(info)
        self._changed()
        return agent, tasks

    def fill(self, app: dict[str, Any], tasks: Iterable[Task]) -> None:
        """Tasks that nobody launched: a big Marathon without its agents."""
        with self._lock:
            self.apps[app["id"]] = {"labels": {}, **app, "version": _stamp(time.time())}
            self.tasks.update((task.info.id, task) for task in tasks)
            self._changed()

    # -- what the master says

    def update(self, status: Status) -> None:
        """A task's status has arrived."""
        state = status.state
        if self.legacy and state in (
            "TASK_UNREACHABLE",
            "TASK_GONE",
            "TASK_GONE_BY_OPERATOR",
            "TASK_DROPPED",
        ):
            state = "TASK_LOST"
        with self._lock:
            task = self.tasks.get(status.task.id)
            if task is None:
                # Forgotten meanwhile, or never known: if it still runs, it has to go.
                self._publish(
                    "unknown_instance_terminated_event",
                    instanceId=status.task.id,
                    runSpecId="",
                    condition="Killed",
                )
            else:
                task.state, task.message = state, status.message
                task.addresses = status.addresses or task.addresses
                if state == "TASK_RUNNING" and task.started is None:
                    task.started = status.timestamp
                if status.is_terminal:
                    del self.tasks[status.task.id]
                self._changed()
                self._tell(task)
        if task is None and not status.is_terminal and self._master is not None:
            self._master.kill(status.agent, status.task.id)
        elif task is not None and status.is_terminal:
            self.converge(task.app)

    def replace(self, task: str) -> None:
        """An unreachable task is inactive now: its app gets another one beside it."""
        with self._lock:
            known = self.tasks.get(task)
        if known is not None:
            self.converge(known.app)

    def expunge(self, task: str) -> None:
        """An unreachable task has been so for too long and is forgotten; its container may go on."""
        with self._lock:
            known = self.tasks.get(task)
            if known is None or known.state not in ("TASK_UNREACHABLE", "TASK_LOST"):
                return
            del self.tasks[task]
            self._changed()
            self._instance_changed(known, "Killed")
        self.converge(known.app)

    def forget(self, task: str) -> None:
        """A task is not known any more and nobody is told, as when an old state was restored."""
        with self._lock:
            if self.tasks.pop(task, None) is not None:
                self._changed()

    # -- what it tells

    def _changed(self) -> None:
        self._listed = None

    def _tell(self, task: Task) -> None:
        event: dict[str, Any] = {
            "slaveId": task.agent,
            "taskId": task.info.id,
            "taskStatus": task.state,
            "message": task.message,
            "appId": task.app,
            "host": task.host,
            "ports": [],
            "version": task.version,
        }
        if not self.legacy:
            event["ipAddresses"] = _marathons(task.addresses)
        self._publish("status_update_event", **event)
        self._instance_changed(task, CONDITIONS[task.state])

    def _instance_changed(self, task: Task, condition: str) -> None:
        self._publish(
            "instance_changed_event",
            instanceId=task.instance,
            condition=condition,
            runSpecId=task.app,
            agentId=task.agent,
            host=task.host,
            runSpecVersion=task.version,
        )

    def attached(self, client: str) -> None:
        """Somebody new listens."""
        self._publish("event_stream_attached", remoteAddress=client)

    def _publish(self, kind: str, **fields: Any) -> None:
        self.streams.publish({**fields, "eventType": kind, "timestamp": _stamp(time.time())})

    def listed(self) -> bytes:
        """The body of /v2/tasks."""
        with self._lock:
            if self._listed is None:
                self._listed = msgspec.json.encode({"tasks": [self.task_row(t) for t in self.tasks.values()]})
            return self._listed

    def task_row(self, task: Task) -> dict[str, Any]:
        """One task in /v2/tasks. What is not known yet is absent."""
        row: dict[str, Any] = {
            "id": task.info.id,
            "appId": task.app,
            "host": task.host,
            "slaveId": task.agent,
            "state": task.state,
            "stagedAt": _stamp(task.staged),
            "version": task.version,
            "ports": [],
            "servicePorts": [],
        }
        if task.started is not None:
            row["startedAt"] = _stamp(task.started)
        if task.addresses:
            row["ipAddresses"] = _marathons(task.addresses)
        if not self.legacy:
            row |= {"role": "*", "healthCheckResults": []}
        return row

    def app_row(self, app: str, *, with_tasks: bool) -> dict[str, Any]:
        """One app in /v2/apps."""
        with self._lock:
            mine = [task for task in self.tasks.values() if task.app == app]
            row = {
                **self.apps[app],
                "tasksRunning": sum(task.state == "TASK_RUNNING" for task in mine),
                "tasksStaged": sum(task.state in ("TASK_STAGING", "TASK_STARTING") for task in mine),
                "deployments": [],
            }
            if with_tasks:
                row["tasks"] = [self.task_row(task) for task in mine]
            return row

    def pod_rows(self) -> list[dict[str, Any]]:
        """/v2/pods/::status."""
        with self._lock:
            return [self.pod_row(pod) for pod in self.pods]

    def pod_row(self, pod: str) -> dict[str, Any]:
        """/v2/pods/POD::status."""
        by_instance: dict[str, list[Task]] = {}
        for task in self.tasks.values():
            if task.app == pod:
                by_instance.setdefault(task.info.executor_id, []).append(task)
        return {
            "id": pod,
            "spec": self.pods[pod],
            "status": "STABLE",
            "statusSince": self.pods[pod]["version"],
            "instances": [_pod_instance(name, tasks) for name, tasks in by_instance.items()],
        }


def _pod_instance(name: str, tasks: list[Task]) -> dict[str, Any]:
    first = tasks[0]
    networks = [
        {"name": info["name"], "addresses": [a["ip_address"] for a in first.addresses]}
        for info in first.info.network_infos[:1]
    ]
    return {
        "id": name,
        "status": "STABLE" if all(task.state == "TASK_RUNNING" for task in tasks) else "PENDING",
        "statusSince": _stamp(first.staged),
        "agentId": first.agent,
        "agentHostname": first.host,
        "networks": networks,
        "containers": [
            {"name": task.info.name, "status": task.state, "containerId": task.info.id} for task in tasks
        ],
        "specReference": f"/v2/pods{first.app}::versions/{first.version}",
    }


class Instance(Replica):
    """One process of a Marathon. redirect: send callers to the leader, instead of asking it for them."""

    def __init__(self, marathon: Marathon, *, redirect: bool = False, **place: Any) -> None:
        super().__init__(marathon, **place)
        self.marathon = marathon
        self.redirect = redirect
        marathon.instances.append(self)

    def answer(self, asked: Asked) -> Reply:
        leader = self.marathon.elected
        if asked.path == "/ping":
            return Reply(200, b"pong", "text/plain")
        if leader is None:
            return reply({"message": "Could not determine the current leader"}, 503)
        if leader is not self:
            return self._pass_on(asked, leader)
        return self._answer(asked)

    def _pass_on(self, asked: Asked, leader: Instance) -> Reply:
        if self.redirect:
            query = "&".join(f"{key}={value}" for key, values in asked.query.items() for value in values)
            where = f"{leader.url}{asked.path}{'?' + query if query else ''}"
            return Reply(302, headers={"location": where})
        if not leader.is_running:
            return reply({"message": "Proxying failed: connection refused"}, 502)
        said = leader.respond(asked)
        headers = {**said.headers, "x-marathon-leader": leader.url, "x-marathon-via": f"1.1 {self.address}"}
        return Reply(said.status, said.body, said.kind, headers, said.stream)

    def _answer(self, asked: Asked) -> Reply:
        marathon = self.marathon
        match asked.method, asked.path.rstrip("/"):
            case "GET", "/v2/tasks":
                return Reply(body=self._tasks(asked))
            case "GET", "/v2/events":
                return self._events(asked)
            case "GET", "/v2/apps":
                with_tasks = "apps.tasks" in asked.query.get("embed", [])
                return reply(
                    {"apps": [marathon.app_row(a, with_tasks=with_tasks) for a in list(marathon.apps)]}
                )
            case "POST", "/v2/apps":
                return self._post_app(asked)
            case "GET", "/v2/info":
                return reply(self._info())
            case "GET", "/v2/leader":
                return reply({"leader": self.address})
            case "DELETE", "/v2/leader":
                marathon.fail_over()
                return reply({"message": "Leadership abdicated"})
            case "GET", "/v2/pods/::status":
                return reply(marathon.pod_rows())
            case "GET", path if path.startswith("/v2/pods/") and path.endswith("::status"):
                return self._pod("/" + path[len("/v2/pods/") : -len("::status")].lstrip("/"))
            case "GET", path if path.startswith("/v2/apps/") and path.endswith("/tasks"):
                return self._tasks_of("/" + path[len("/v2/apps/") : -len("/tasks")].lstrip("/"))
            case method, path if path.startswith("/v2/apps/"):
                return self._app(method, "/" + path.removeprefix("/v2/apps/").lstrip("/"), asked)
            case _:
                return reply({"message": f"{asked.path} is not known"}, 404)

    def _tasks(self, asked: Asked) -> bytes:
        wanted = {f"TASK_{status.upper()}" for status in asked.query.get("status", [])}
        if not wanted:
            return self.marathon.listed()
        rows = msgspec.json.decode(self.marathon.listed())["tasks"]
        return msgspec.json.encode({"tasks": [row for row in rows if row["state"] in wanted]})

    def _tasks_of(self, app: str) -> Reply:
        if app not in self.marathon.apps:
            return reply({"message": f"App '{app}' does not exist"}, 404)
        return reply({"tasks": self.marathon.app_row(app, with_tasks=True)["tasks"]})

    def _pod(self, pod: str) -> Reply:
        if pod not in self.marathon.pods:
            return reply({"message": f"Pod '{pod}' does not exist"}, 404)
        return reply(self.marathon.pod_row(pod))

    def _events(self, asked: Asked) -> Reply:
        if "text/event-stream" not in asked.headers.get("accept", ""):
            return Reply(405, b"", "text/plain")
        kinds = frozenset(asked.query.get("event_type", []))
        stream = self.marathon.streams.subscribe(kinds)
        self.marathon.attached(asked.client)
        return Reply(200, kind="text/event-stream", stream=stream)

    def _post_app(self, asked: Asked) -> Reply:
        app = asked.json
        if not re.fullmatch(r"/?[a-z0-9-]+(/[a-z0-9-]+)*", app.get("id", "")):
            return reply({"message": "Object is not valid", "details": [{"path": "/id"}]}, 422)
        app["id"] = "/" + app["id"].lstrip("/")
        if app["id"] in self.marathon.apps:
            return reply({"message": f"An app with id [{app['id']}] already exists."}, 409)
        self.marathon.deploy(app)
        return reply(self.marathon.app_row(app["id"], with_tasks=False), 201)

    def _app(self, method: str, app: str, asked: Asked) -> Reply:
        marathon = self.marathon
        if app not in marathon.apps:
            return reply({"message": f"App '{app}' does not exist"}, 404)
        if method == "GET":
            return reply({"app": marathon.app_row(app, with_tasks=True)})
        if method == "PUT":
            marathon.deploy({**asked.json, "id": app})
        elif method == "DELETE":
            marathon.destroy(app)
        else:
            return reply({"message": "Method not allowed"}, 405)
        return reply({"version": _stamp(time.time()), "deploymentId": str(uuid.uuid4())})

    def _info(self) -> dict[str, Any]:
        return {
            "name": self.marathon.name,
            "version": self.marathon.version,
            "buildref": "unknown",
            "elected": True,
            "leader": self.address,
            "frameworkId": self.marathon.framework,
            "marathon_config": {"checkpoint": True, "failover_timeout": 604800, "hostname": self.host},
            "zookeeper_config": {"zk": "zk://127.0.0.1:2181/marathon"},
            "http_config": {"http_port": self.port},
        }


def _stamp(seconds: float) -> str:
    """Wall clock as Marathon writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _marathons(addresses: list[dict[str, str]]) -> list[dict[str, str]]:
    """Addresses as Marathon writes them; Mesos passes an IPv6 one on with its prefix length."""
    return [{"ipAddress": a["ip_address"], "protocol": a.get("protocol", "IPv4")} for a in addresses]


def _network_infos(definition: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The NetworkInfos that an app's definition becomes, current and legacy."""
    wanted = [n for n in definition.get("networks", []) if n.get("mode", "container") == "container"]
    if "ipAddress" in definition:
        old = definition["ipAddress"]
        wanted.append(
            {"name": old.get("networkName"), "labels": old.get("labels", {}), "groups": old.get("groups")}
        )
    infos = []
    for network in wanted:
        info: dict[str, Any] = {"name": network["name"], "ip_addresses": [{"protocol": "IPv4"}]}
        if network.get("groups"):
            info["groups"] = network["groups"]
        if network.get("labels"):
            info["labels"] = {"labels": [{"key": k, "value": v} for k, v in network["labels"].items()]}
        infos.append(info)
    mappings = [
        {
            "host_port": mapping["hostPort"],
            "container_port": mapping["containerPort"],
            "protocol": mapping.get("protocol", "tcp"),
        }
        for mapping in (definition.get("container") or {}).get("portMappings", [])
        if mapping.get("hostPort")
    ]
    if infos and mappings:
        infos[0]["port_mappings"] = mappings
    return tuple(infos)


def _commands(definition: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """(name, command) of each task of one instance; an app's has no name."""
    if "containers" in definition:
        return [
            (c["name"], ("sh", "-c", c["exec"]["command"]["shell"]) if "exec" in c else ("sleep", "infinity"))
            for c in definition["containers"]
        ]
    if definition.get("args"):
        return [("", tuple(definition["args"]))]
    command = definition.get("cmd")
    return [("", ("sh", "-c", command) if command else ("sleep", "infinity"))]
