"""Marathon and Mesos, asked as they are and as they misbehave: the stand-ins of tests/standins."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipam.errors import InvalidInput
from marathon import http
from marathon.client import Marathon
from marathon.events import Event
from marathon.facts import Agents, Task
from marathon.http import Absent, Access, Denied, Http, NotAnswered
from marathon.mesos import Agent, Master, Work
from tests.standins import marathon as stand_in
from tests.standins.mesos_agent import Agent as AgentStandIn
from tests.standins.mesos_master import Master as MasterStandIn
from tests.standins.service import Asked, Reply, Service, reply
from tests.standins.tasks import TaskInfo

DATA = Path(__file__).parents[1] / "data/mesos"
UUID = "3f2504e0-4f89-11d3-9a0c-0305e82c330{}"


def task(number: int, app: str = "/web", state: str = "TASK_RUNNING") -> stand_in.Task:
    id_ = f"{app.strip('/')}.instance-{UUID.format(number)}._app.1"
    return stand_in.Task(TaskInfo(id_, app.strip("/"), "F"), app, "S1", "h1", "v1", state)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECT_WITHIN", 1.0)
    monkeypatch.setattr(http, "SILENT_AT_MOST", 1.0)


@pytest.fixture
def cluster() -> stand_in.Marathon:
    cluster = stand_in.Marathon(framework="F", keepalive=0.1)
    cluster.fill(
        {"id": "/web", "labels": {"MOORAGE_NETGROUPS": "a", "HAPROXY_GROUP": "x"}}, [task(1), task(2)]
    )
    cluster.fill({"id": "/group/db"}, [task(3, "/group/db", "TASK_UNREACHABLE")])
    return cluster


def secret(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_tasks_and_labels_as_marathon_has_them(cluster: stand_in.Marathon) -> None:
    with cluster.instance() as one:
        marathon = Marathon([one.url])
        assert marathon.info().framework_id == "F"
        found = marathon.tasks()
        assert {(t.app_id, t.state, t.slave_id) for t in found.values()} == {
            ("/web", "TASK_RUNNING", "S1"),
            ("/group/db", "TASK_UNREACHABLE", "S1"),
        }
        assert marathon.labels() == {"/web": {"MOORAGE_NETGROUPS": "a"}}
        mine, labels = marathon.app("/web")
        assert (set(mine), labels) == (
            {f"web.{UUID.format(1)}", f"web.{UUID.format(2)}"},
            {"MOORAGE_NETGROUPS": "a"},
        )
        assert marathon.app("/not/there") == ({}, {})


def test_a_pods_instance_stands_for_its_containers() -> None:
    pod = {
        "id": "/pod",
        "instances": [
            {"id": f"pod.instance-{UUID.format(1)}", "status": "STABLE", "agentId": "S1"},
            {"id": f"pod.instance-{UUID.format(2)}", "status": "TERMINAL"},
        ],
    }
    answers = {"/v2/tasks": {"tasks": []}, "/v2/pods/::status": [pod]}
    with Saying(answers) as service:
        found = Marathon([service.url]).tasks()
    assert {name: t.state for name, t in found.items()} == {
        f"pod.{UUID.format(1)}": "TASK_RUNNING",
        f"pod.{UUID.format(2)}": "TASK_FINISHED",
    }


def test_a_marathon_without_pods_is_as_good() -> None:
    with Saying({"/v2/tasks": {"tasks": [{"id": "a", "unheardOf": {}}]}}) as service:
        assert Marathon([service.url]).tasks() == {"a": Task("a")}


class Saying(Service):
    """Answers paths with values, or with what a function says."""

    def __init__(self, answers: dict[str, Any], **place: Any) -> None:
        super().__init__(**place)
        self.answers = answers

    def answer(self, asked: Asked) -> Reply:
        if asked.path not in self.answers:
            return reply({"message": "not known"}, 404)
        said = self.answers[asked.path]
        return said if isinstance(said, Reply) else reply(said)


def test_the_next_url_is_asked_when_one_does_not_answer_and_is_first_from_then_on(
    cluster: stand_in.Marathon,
) -> None:
    with cluster.instance() as gone, cluster.instance() as there:
        url = gone.url
        gone.stop()
        marathon = Marathon([url, there.url])
        assert marathon.info().framework_id == "F"
        assert marathon.url == there.url
    with pytest.raises(NotAnswered, match="Marathon does not answer: http"):
        marathon.info()


@pytest.mark.parametrize("redirect", [True, False])
def test_the_leader_is_found_through_any_other(
    cluster: stand_in.Marathon, redirect: bool, tmp_path: Path
) -> None:
    with cluster.instance(user="u:p"), cluster.instance(redirect=redirect, user="u:p") as other:
        access = Access(user_file=secret(tmp_path, "u:p\n"))
        assert len(Marathon([other.url], access).tasks()) == 3


def test_services_that_redirect_to_each_other_are_an_answer_of_nobody() -> None:
    with Saying({}) as one, Saying({}) as other:
        one.answers["/v2/info"] = Reply(302, headers={"location": f"{other.url}/v2/info"})
        other.answers["/v2/info"] = Reply(302, headers={"location": f"{one.url}/v2/info"})
        with pytest.raises(NotAnswered, match="do not agree who leads"):
            Marathon([one.url]).info()


@pytest.mark.parametrize("location", ["", "file:///etc/passwd", "gopher://127.0.0.1/"])
def test_a_redirect_to_nowhere_is_refused(location: str) -> None:
    with Saying({"/v2/info": Reply(302, headers={"location": location})}) as one:
        with pytest.raises(NotAnswered, match="redirects to nowhere"):
            Marathon([one.url]).info()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("user_file", "u:p"),
        ("token_file", "t0ken"),
        ("token_file", "token=t0ken"),
        ("token_file", "Bearer t0ken"),
    ],
)
def test_who_has_the_secret_is_let_in(
    cluster: stand_in.Marathon, tmp_path: Path, file: str, text: str
) -> None:
    with cluster.instance(user="u:p", token="t0ken") as one:
        assert Marathon([one.url], Access(**{file: secret(tmp_path, text)})).info().framework_id == "F"
        with pytest.raises(Denied, match="HTTP 401") as refused:
            Marathon([one.url], Access(**{file: secret(tmp_path, text + "x")})).info()
        assert text not in str(refused.value)


def test_a_new_secret_counts_at_once(cluster: stand_in.Marathon, tmp_path: Path) -> None:
    with cluster.instance(user="u:new") as one:
        marathon = Marathon([one.url], Access(user_file=secret(tmp_path, "u:old")))
        with pytest.raises(Denied):
            marathon.info()
        secret(tmp_path, "u:new")
        assert marathon.info().framework_id == "F"


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="chmod 0600"):
        Access(token_file=secret(tmp_path, "t", 0o644)).headers("Marathon")


@pytest.mark.parametrize(
    "url",
    [
        "http://u:hunter2@h:1",
        "ftp://h",
        "h:8080",
        "http://",
        "http://h:1?a=b",
        "http://[::1",
        "http://h:99999",
    ],
)
def test_a_url_that_is_none_is_refused_and_its_password_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInput, match="Marathon") as refused:
        Marathon([url])
    assert "hunter2" not in str(refused.value)


def test_trouble_is_told_apart(cluster: stand_in.Marathon) -> None:
    with cluster.instance() as one:
        link = Http("Marathon", [one.url])
        with pytest.raises(Absent):
            link.get("/nowhere")
        one.faults.status = 503
        with pytest.raises(NotAnswered, match="HTTP 503"):
            link.get("/v2/info")
        one.faults.none()
        one.faults.truncate = True
        with pytest.raises(NotAnswered, match="broke off"):
            link.get("/v2/tasks")
        one.faults.none()
        one.faults.hang = True
        with pytest.raises(NotAnswered, match=r"timed out|Read timed out"):
            link.get("/v2/info")
        one.break_connections()


def test_what_cannot_be_now_is_tried_again(cluster: stand_in.Marathon) -> None:
    with cluster.instance() as one:
        one.faults.status, one.faults.refusals = 503, 2
        assert Marathon([one.url]).info().framework_id == "F"
        assert one.asked == ["GET /v2/info"] * 3


def test_an_answer_has_an_end() -> None:
    def trickle() -> Iterator[bytes]:
        while True:
            yield b" "
            time.sleep(0.05)

    with Saying({}) as service:
        service.answers["/v2/tasks"] = Reply(stream=trickle())
        with pytest.raises(NotAnswered, match="not complete within"):
            Http("Marathon", [service.url], patience=0.3)._from_any("GET", "/v2/tasks", None, 1 << 20)
        service.answers["/v2/tasks"] = Reply(body=b"x" * 3000)
        with pytest.raises(NotAnswered, match="larger than 1000 bytes"):
            Http("Marathon", [service.url]).get("/v2/tasks", largest=1000)


def test_an_answer_that_is_something_else_is_no_answer() -> None:
    for said in (Reply(body=b"<html>"), reply({"tasks": 7}), reply([]), Reply(body=b"[" * 100_000)):
        with Saying({"/v2/tasks": said}) as service:
            with pytest.raises(NotAnswered, match="something else"):
                Marathon([service.url]).tasks()


# -- the event stream


def followed(marathon: Marathon, count: int, on_open: Any = lambda: None) -> list[Event]:
    found = []
    for event in marathon.follow(on_open):
        found.append(event)
        if len(found) == count:
            break
    return found


def test_events_come_as_they_happen(cluster: stand_in.Marathon) -> None:
    with cluster.instance() as one:

        def publish() -> None:
            time.sleep(0.3)  # keep-alives come first
            cluster._publish("app_terminated_event", appId="/web")

        assert followed(
            Marathon([one.url]), 1, lambda: threading.Thread(target=publish, daemon=True).start()
        ) == [Event("app_terminated_event", app="/web")]


def test_a_stream_that_keeps_alive_is_not_dead_and_a_silent_one_is(cluster: stand_in.Marathon) -> None:
    with cluster.instance() as one:
        marathon = Marathon([one.url], keep_alive=0.7)  # dead after three
        begun = time.monotonic()
        threading.Timer(2.5, lambda: setattr(cluster.streams.silence, "on", True)).start()
        with pytest.raises(NotAnswered, match="broke off"):
            followed(marathon, 1)
        assert time.monotonic() - begun >= 2.5
        cluster.streams.silence.on = False


def test_a_stream_that_ends_is_said_to(cluster: stand_in.Marathon) -> None:
    with cluster.instance() as one:
        threading.Timer(0.2, cluster.streams.close).start()
        with pytest.raises(NotAnswered, match="ended the event stream"):
            followed(Marathon([one.url]), 1)


# -- Mesos


def test_an_agents_containers_as_recorded() -> None:
    answers = {
        "/api/v1": json.loads((DATA / "agent-get-containers.running.json").read_text()),
        "/state": json.loads((DATA / "agent-state.running.json").read_text()),
    }
    with Saying(answers) as service:
        facts = Agent(service.url).facts()
    container = "955f2949-946b-4e14-956d-5b89518e9417"
    framework = "0b12ab81-a07f-4439-83ed-c4a785a2cf2d-0000"
    assert facts.id == "0b12ab81-a07f-4439-83ed-c4a785a2cf2d-S0"
    assert facts.work == {container: Work(framework, "labelled-1", "")}
    assert (facts.running, facts.over) == ({container}, frozenset())


def test_a_task_is_known_while_its_add_still_runs() -> None:
    answers = {
        "/api/v1": json.loads((DATA / "agent-get-containers.during-add.json").read_text()),
        "/state": json.loads((DATA / "agent-state.during-add.json").read_text()),
    }
    with Saying(answers) as service:
        facts = Agent(service.url).facts()
    assert facts.work["abc31f5e-2b5d-4545-8d1b-8faf0d703cf8"].task == "probe"
    assert "abc31f5e-2b5d-4545-8d1b-8faf0d703cf8" in facts.running
    assert "955f2949-946b-4e14-956d-5b89518e9417" in facts.over


def test_nested_containers_have_their_parents_before_their_own_id() -> None:
    nested = {"value": "child", "parent": {"value": "parent"}}
    containers = [
        {"container_id": {"value": "parent"}, "executor_id": {"value": "e"}, "framework_id": {"value": "F"}},
        {"container_id": nested, "executor_id": {"value": "e"}, "framework_id": {"value": "F"}},
    ]
    task_row = {
        "id": f"pod.instance-{UUID.format(1)}.front",
        "statuses": [{"container_status": {"container_id": nested}}],
    }
    executor = {"id": "e", "container": "parent", "tasks": [task_row]}
    answers = {
        "/api/v1": {"type": "GET_CONTAINERS", "get_containers": {"containers": containers}},
        "/state": {"id": "S1", "hostname": "h", "frameworks": [{"id": "F", "executors": [executor]}]},
    }
    with Saying(answers) as service:
        facts = Agent(service.url).facts()
    assert facts.work["parent.child"] == facts.work["parent"] == Work("F", task_row["id"], "/pod")


class Resting(AgentStandIn):
    """Answers, and runs nothing: there is nothing to begin or to end."""

    def _begin(self, container: Any) -> None: ...

    def _end(self, container: Any) -> None: ...


def test_the_master_says_which_agents_are_there_cut_off_and_gone() -> None:
    master = MasterStandIn()
    with master.instance() as follower, master.instance() as leader:
        master.elected = leader
        with Resting(master, "h1") as one, Resting(master, "h2") as two, Resting(master, "h3") as three:
            client = Master([follower.url])
            assert client.agents() == Agents(present=frozenset({one.id, two.id, three.id}))
            master.mark_gone(two.id)
            master.lose(three.id)
            assert client.agents() == Agents(frozenset({one.id}), frozenset({three.id}), frozenset({two.id}))
