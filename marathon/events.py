"""Marathon's event stream: server-sent events, and what of them is of use.

    for event in parse(pieces): ...

Nothing on it is relied upon: events come late, twice, in another order or not at all. They say that something ended,
or where to look again. One that makes no sense is logged with its text and passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import structlog

from marathon.facts import OVER, Condition, app_of, condition_of, instance_of, is_of_pod

log = structlog.get_logger(__name__)

PATH = "/v2/events"
ACCEPT = "text/event-stream"

KINDS = (
    "status_update_event",
    "instance_changed_event",
    "unknown_instance_terminated_event",
    "app_terminated_event",
    "api_post_event",
    "pod_created_event",
    "pod_updated_event",
    "pod_deleted_event",
)
"""What is asked for; the rest of the stream, health checks above all, is not worth its way."""

LARGEST = 1024 * 1024
"""Bytes of an event. A deployment of a large group may be more, and is not needed."""

LOGGED = 500
"""Characters of a malformed event that are logged."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """What an event says.

    task: the instance it is about (facts.instance_of), "" if none. state: its Mesos task state, "" if it is not told.
    agent: the Mesos agent's id. app: the app whose tasks or definition are to be looked at anew, "" if none.
    """

    kind: str
    task: str = ""
    state: str = ""
    agent: str = ""
    app: str = ""

    @property
    def condition(self) -> Condition | None:
        """Of the task, None if it is not told."""
        return condition_of(self.state) if self.state else None

    @property
    def is_over(self) -> bool:
        return self.condition in OVER


class _Wire(msgspec.Struct, rename="camel", gc=False):
    """The fields of all kinds of events together."""

    task_id: str = ""
    task_status: str = ""
    slave_id: str | None = None
    app_id: str | None = None
    instance_id: str = ""
    condition: str | dict[str, Any] | None = None
    agent_id: str | None = None
    run_spec_id: str | None = None
    app_definition: dict[str, Any] | None = None
    uri: str = ""


_decoder = msgspec.json.Decoder(_Wire)

_INSTANCE_STATES = {
    "Staging": "TASK_STAGING",
    "Starting": "TASK_STARTING",
    "Running": "TASK_RUNNING",
    "Killing": "TASK_KILLING",
    "Killed": "TASK_KILLED",
    "Failed": "TASK_FAILED",
    "Finished": "TASK_FINISHED",
    "Error": "TASK_ERROR",
    "Dropped": "TASK_DROPPED",
    "Gone": "TASK_GONE",
    "Unknown": "TASK_UNKNOWN",
    "Unreachable": "TASK_UNREACHABLE",
    "UnreachableInactive": "TASK_UNREACHABLE",
}


def parse(pieces: Iterable[bytes]) -> Iterator[Event]:
    """The events in a stream of bytes, however those are cut."""
    for kind, data in messages(pieces):
        event = read(kind, data)
        if event is not None:
            yield event


def messages(pieces: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """(event type, data) of each complete message of a server-sent event stream.

    https://html.spec.whatwg.org/multipage/server-sent-events.html: fields a line, a blank line ends a message, a line
    that starts with a colon is a comment. What the stream breaks off in is dropped, and so is what is too large.
    """
    kind, size = "", 0
    data: list[bytes] = []
    for line in _lines(pieces):
        if line is None or size > LARGEST:
            # Everything up to the next blank line belongs to something too large.
            size = LARGEST + 1
        if line == b"":
            if data and size <= LARGEST:
                yield kind, b"\n".join(data)
            elif size > LARGEST:
                log.warning("event passed over", why=f"it is larger than {LARGEST} bytes", type=kind)
            kind, data, size = "", [], 0
        elif line is not None:
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data":
                data.append(value)
                size += len(value)
            elif name == b"event":
                kind = value.decode("utf-8", "replace")


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends, which are \\n, \\r\\n or \\r; None in the place of one that is too long."""
    rest = b""
    skipping = False
    for piece in pieces:
        *whole, rest = _split(rest + piece)
        for line in whole:
            yield None if skipping else line
            skipping = False
        if len(rest) > LARGEST:
            rest, skipping = b"", True


def _split(text: bytes) -> list[bytes]:
    """The lines of a text, and last what follows the end of the last one. A final \\r may be half of an end."""
    held = b""
    if text.endswith(b"\r"):
        text, held = text[:-1], b"\r"
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = text.split(b"\n")
    lines[-1] += held
    return lines


def read(kind: str, data: bytes) -> Event | None:
    """What an event says; None if that is nothing to us, or it cannot be read."""
    if kind and kind not in KINDS:
        return None
    try:
        wire = _decoder.decode(data)
        if not kind:
            kind = str(msgspec.json.decode(data, type=dict[str, Any]).get("eventType", ""))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        text = data[:LOGGED].decode("utf-8", "replace")
        log.warning("event passed over: it cannot be read", type=kind, why=str(error), text=text)
        return None
    return _meaning(kind, wire)


def _meaning(kind: str, wire: _Wire) -> Event | None:
    match kind:
        case "status_update_event":
            return _task_event(kind, wire)
        case "instance_changed_event":
            said = wire.condition.get("str", "") if isinstance(wire.condition, dict) else wire.condition
            return Event(
                kind, instance_of(wire.instance_id), _INSTANCE_STATES.get(str(said), ""), wire.agent_id or ""
            )
        case "unknown_instance_terminated_event":
            return Event(kind, instance_of(wire.instance_id), "TASK_FINISHED")
        case "app_terminated_event":
            return Event(kind, app=wire.app_id or "")
        case "api_post_event":
            named = (wire.app_definition or {}).get("id")
            return Event(kind, app=named if isinstance(named, str) else "")
        case _ if kind in KINDS:
            return Event(kind, app=_pod(wire.uri))
        case _:
            return None


def _task_event(kind: str, wire: _Wire) -> Event:
    """A task's status. That a container of a pod ended is no end of the pod's addresses: the pod is looked at."""
    state, agent = wire.task_status, wire.slave_id or ""
    if condition_of(state) in OVER and is_of_pod(wire.task_id):
        return Event(kind, state=state, agent=agent, app=app_of(wire.task_id))
    return Event(kind, instance_of(wire.task_id), state, agent)


def _pod(uri: str) -> str:
    """The pod that a pod_*_event's uri names: ``/v2/pods/group/pod``."""
    return uri.removeprefix("/v2/pods") if uri.startswith("/v2/pods/") else ""
