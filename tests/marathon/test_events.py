"""Marathon's event stream, however it is cut and whatever is in it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from marathon.events import LARGEST, Event, messages, parse
from marathon.facts import Condition, app_of, instance_of

UUID = "3f2504e0-4f89-11d3-9a0c-0305e82c3301"
STREAM = (
    b"event: status_update_event\r\ndata: {}\r\n\r\n"
    b"\r\n\r\n"  # keep-alives
    b": a comment\n\n"
    b"data: one\ndata: two\n\n"
    b"data:three\r\rdata: breaks off"
)
MESSAGES = [("status_update_event", b"{}"), ("", b"one\ntwo"), ("", b"three")]


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\r\ndata: {json.dumps({'eventType': kind, **fields})}\r\n\r\n".encode()


def test_messages_are_those_of_the_specification() -> None:
    assert list(messages([STREAM])) == MESSAGES


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_messages_do_not_depend_on_how_the_stream_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in itertools.pairwise(edges)]
    assert list(messages(pieces)) == MESSAGES


@given(st.lists(st.binary(max_size=80)))
def test_no_bytes_make_it_fail(pieces: list[bytes]) -> None:
    list(parse(pieces))


def test_an_event_that_cannot_be_read_is_logged_with_its_text_and_passed_over() -> None:
    broken = b'event: status_update_event\ndata: {"taskId": "web.1", "taskSt\n\n'
    good = event("status_update_event", taskId="web.1", taskStatus="TASK_KILLED")
    with structlog.testing.capture_logs() as logs:
        assert [e.task for e in parse([broken, good])] == ["web.1"]
    assert [entry["text"] for entry in logs] == ['{"taskId": "web.1", "taskSt']


def test_an_event_that_is_too_large_is_passed_over_in_bounded_memory() -> None:
    huge = [b"event: deployment_success\ndata: ", *[b"x" * 65536] * (2 * LARGEST // 65536), b"\n\n"]
    many = [b"data: " + b"y" * 1000 + b"\n"] * (2 * LARGEST // 1000) + [b"\n"]
    good = event("status_update_event", taskId="web.1", taskStatus="TASK_KILLED")
    assert [e.task for e in parse([*huge, *many, good])] == ["web.1"]


@pytest.mark.parametrize(
    ("task", "instance", "app"),
    [
        (f"group_web.instance-{UUID}._app.1", f"group_web.{UUID}", "/group/web"),
        (f"group_web.{UUID}", f"group_web.{UUID}", "/group/web"),
        (f"web.v2.marathon-{UUID}", f"web.v2.{UUID}", "/web.v2"),
        (f"pod.instance-{UUID}.front", f"pod.{UUID}", "/pod"),
        ("labelled-1", "labelled-1", ""),
        ("", "", ""),
    ],
)
def test_a_task_id_names_its_instance_and_its_app(task: str, instance: str, app: str) -> None:
    assert (instance_of(task), app_of(task)) == (instance, app)


@pytest.mark.parametrize(
    ("kind", "fields", "meaning"),
    [
        (
            "status_update_event",
            {"taskId": f"web.instance-{UUID}._app.1", "taskStatus": "TASK_KILLED", "slaveId": "S1"},
            Event("status_update_event", f"web.{UUID}", "TASK_KILLED", "S1"),
        ),
        (
            "status_update_event",
            {"taskId": f"web.{UUID}", "taskStatus": "TASK_RUNNING", "slaveId": None, "message": 3},
            Event("status_update_event", f"web.{UUID}", "TASK_RUNNING"),
        ),
        (
            # The others of the pod may go on with the address they share.
            "status_update_event",
            {"taskId": f"pod.instance-{UUID}.front", "taskStatus": "TASK_FINISHED"},
            Event("status_update_event", state="TASK_FINISHED", app="/pod"),
        ),
        (
            "instance_changed_event",
            {"instanceId": f"web.instance-{UUID}", "condition": "Gone", "agentId": "S1"},
            Event("instance_changed_event", f"web.{UUID}", "TASK_GONE", "S1"),
        ),
        (
            "instance_changed_event",
            {"instanceId": f"web.marathon-{UUID}", "condition": {"str": "UnreachableInactive"}},
            Event("instance_changed_event", f"web.{UUID}", "TASK_UNREACHABLE"),
        ),
        (
            "instance_changed_event",
            {"instanceId": f"web.instance-{UUID}", "condition": "Scheduled"},
            Event("instance_changed_event", f"web.{UUID}"),
        ),
        (
            "unknown_instance_terminated_event",
            {"instanceId": f"web.instance-{UUID}"},
            Event("unknown_instance_terminated_event", f"web.{UUID}", "TASK_FINISHED"),
        ),
        ("app_terminated_event", {"appId": "/web"}, Event("app_terminated_event", app="/web")),
        ("api_post_event", {"appDefinition": {"id": "/web"}}, Event("api_post_event", app="/web")),
        ("pod_deleted_event", {"uri": "/v2/pods/group/pod"}, Event("pod_deleted_event", app="/group/pod")),
    ],
)
def test_what_events_mean(kind: str, fields: dict[str, Any], meaning: Event) -> None:
    assert list(parse([event(kind, **fields)])) == [meaning]


def test_events_that_are_nothing_to_us_are_not_even_read() -> None:
    assert list(parse([b"event: failed_health_check_event\ndata: {{{\n\n"])) == []


def test_a_state_of_the_future_is_unknown() -> None:
    told = Event("status_update_event", "web.1", "TASK_SLEEPING")
    assert (told.condition, told.is_over) == (Condition.UNKNOWN, False)
