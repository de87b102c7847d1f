"""Marathon's REST interface, 1.4 to 1.11: as much of it as is needed, as typed values.

Answers are decoded straight into the few fields that are used; what else is in them costs no memory, and may change.
Blocking, as http.py; the event stream runs in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from urllib.parse import quote

import msgspec

from ipam.errors import TryAgain
from marathon import events
from marathon.events import Event
from marathon.facts import Task, instance_of
from marathon.http import NO_SECRETS, Absent, Access, Http, NotAnswered

T = TypeVar("T")

KEEP_ALIVE = 10.0
"""Seconds between the blank lines that Marathon writes on a stream when it has nothing to say."""

MISSED = 3
"""Keep-alive periods of silence after which a stream is dead."""

LABEL_PREFIX = "MOORAGE_"
"""Of the app labels that are ours."""


class Info(msgspec.Struct, frozen=True, rename="camel"):
    """framework_id: "" while Marathon is not registered with a master. leader: host:port."""

    framework_id: str | None = None
    version: str = ""
    leader: str | None = None


class App(msgspec.Struct, frozen=True, gc=False):
    """An app. labels: its own, not those of its networks. tasks: only where one app is asked for."""

    id: str
    labels: dict[str, str] | None = None
    tasks: list[Task] = []


class _Tasks(msgspec.Struct):
    tasks: list[Task]


class _App(msgspec.Struct):
    app: App


class _Apps(msgspec.Struct):
    apps: list[App]


class _PodInstance(msgspec.Struct, rename="camel"):
    id: str
    status: str = ""
    agent_id: str | None = None


class _Pod(msgspec.Struct):
    id: str
    instances: list[_PodInstance] = []


class Marathon:
    """One Marathon, at one or several URLs. keep_alive: seconds, of its event streams."""

    def __init__(
        self,
        urls: Sequence[str],
        access: Access = NO_SECRETS,
        *,
        keep_alive: float = KEEP_ALIVE,
    ) -> None:
        self._http = Http("Marathon", urls, access)
        self._stream = Http("Marathon", urls, access)
        self._keep_alive = keep_alive

    @property
    def url(self) -> str:
        """The one that answered last."""
        return self._http.url

    def close(self) -> None:
        self._http.close()
        self._stream.close()

    def info(self) -> Info:
        """Raises as Http.get, and TryAgain while Marathon is not registered with a master."""
        info = self._decoded("/v2/info", Info)
        if not info.framework_id:
            raise TryAgain(
                f"Marathon at {self.url} has no framework id yet; it is not registered with a master"
            )
        return info

    def tasks(self) -> dict[str, Task]:
        """All tasks of apps and all pods' instances, by instance. Raises as Http.get."""
        found = self._parsed("/v2/tasks", decode_tasks)
        found.update(self._pods())
        return found

    def app(self, app: str) -> tuple[dict[str, Task], dict[str, str]]:
        """(tasks by instance, labels that are ours) of one app or pod; none if it is not there (any more).

        Raises as Http.get.
        """
        try:
            answer = self._decoded(f"/v2/apps/{quote(app.strip('/'), safe='/')}", _App).app
        except Absent:
            return {instance: task for instance, task in self._pods().items() if task.app_id == app}, {}
        return {instance_of(task.id): task for task in answer.tasks}, _ours(answer.labels)

    def _pods(self) -> dict[str, Task]:
        try:
            pods = self._decoded("/v2/pods/::status", list[_Pod])
        except Absent:  # before 1.4
            return {}
        return {instance: task for pod in pods for instance, task in _instances(pod).items()}

    def labels(self) -> dict[str, dict[str, str]]:
        """The labels that are ours of all apps that have any, by app. Raises as Http.get."""
        apps = self._decoded("/v2/apps", _Apps).apps
        return {app.id: ours for app in apps if (ours := _ours(app.labels))}

    def follow(self, on_open: Callable[[], None]) -> Iterator[Event]:
        """Events as they come, from now on; ``on_open`` is called when the stream is there.

        Raises as Http.get, and NotAnswered when it ends or says nothing for MISSED keep-alive periods.
        """
        path = events.PATH + "?" + "&".join(f"event_type={kind}" for kind in events.KINDS)
        silent = MISSED * self._keep_alive
        with self._stream.stream(path, events.ACCEPT, silent_at_most=silent) as pieces:
            on_open()
            yield from events.parse(pieces)
        raise NotAnswered("Marathon ended the event stream; it is asked for again")

    def _decoded(self, path: str, kind: type[T]) -> T:
        return self._parsed(path, msgspec.json.Decoder(kind).decode)

    def _parsed(self, path: str, parse: Callable[[bytes], T]) -> T:
        body = self._http.get(path)
        try:
            return parse(body)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise NotAnswered(
                f"Marathon at {self.url} answered {path} with something else ({error})"
            ) from error


def decode_tasks(body: bytes) -> dict[str, Task]:
    """What /v2/tasks answers, by instance. Raises MsgspecError."""
    return {instance_of(task.id): task for task in msgspec.json.decode(body, type=_Tasks).tasks}


def _ours(labels: dict[str, str] | None) -> dict[str, str]:
    return {name: value for name, value in (labels or {}).items() if name.startswith(LABEL_PREFIX)}


def _instances(pod: _Pod) -> dict[str, Task]:
    """A pod's instances in the place of tasks: its containers share addresses, and the instance's end is theirs."""
    return {
        instance_of(instance.id): Task(
            id=instance.id,
            app_id=pod.id,
            state="TASK_FINISHED" if instance.status.upper() == "TERMINAL" else "TASK_RUNNING",
            slave_id=instance.agent_id,
        )
        for instance in pod.instances
    }
