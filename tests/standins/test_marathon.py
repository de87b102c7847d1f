"""The stand-in Marathon is what docs/facts/marathon.md says Marathon is."""

from __future__ import annotations

import base64
import json
import random
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from tests.standins.conftest import ask, listen
from tests.standins.marathon import Instance, Marathon, Task
from tests.standins.mesos_agent import Agent, Contained
from tests.standins.mesos_master import Master
from tests.standins.tasks import TaskInfo

APP = {
    "id": "/group/web",
    "cmd": "sleep 1000",
    "instances": 2,
    "labels": {"MOORAGE_NETGROUPS": "a,b"},
    "networks": [{"mode": "container", "name": "web", "labels": {"moorage.netgroups": "a"}}],
}


class Instant(Agent):
    """Its containers run at once, and end at once."""

    def _begin(self, container: Contained) -> None:
        given = {"protocol": "IPv4", "ip_address": f"10.64.0.{len(self.containers)}"}
        container.network_infos = tuple(
            {**info, "ip_addresses": [given]} for info in container.tasks[0].network_infos
        )
        self.report(container, "TASK_RUNNING")

    def _end(self, container: Contained) -> None:
        self.forget(container)
        self.report(container, "TASK_KILLED")


@pytest.fixture
def master() -> Master:
    return Master()


@pytest.fixture
def agent(master: Master) -> Iterator[Instant]:
    with Instant(master, "host1") as agent:
        yield agent


@pytest.fixture
def marathon(agent: Instant) -> Iterator[Instance]:
    with Marathon(agent.master, keepalive=0.1).instance() as instance:
        yield instance


def tasks(marathon: Instance) -> list[dict[str, Any]]:
    return ask(marathon, "GET", "/v2/tasks", accept="application/json").json["tasks"]


def test_a_deployed_app_has_tasks_with_addresses(marathon: Instance, agent: Instant) -> None:
    assert ask(marathon, "POST", "/v2/apps", APP).status == 201
    found = tasks(marathon)
    assert [task["state"] for task in found] == ["TASK_RUNNING"] * 2
    assert {task["ipAddresses"][0]["ipAddress"] for task in found} == {"10.64.0.1", "10.64.0.2"}
    assert {(task["slaveId"], task["host"], task["appId"]) for task in found} == {
        (agent.id, "host1", "/group/web")
    }
    assert all(
        task["id"].startswith("group_web.instance-") and task["id"].endswith("._app.1") for task in found
    )
    wanted = agent.of_task(found[0]["id"]).tasks[0].network_infos[0]
    assert wanted["labels"] == {"labels": [{"key": "moorage.netgroups", "value": "a"}]}
    app = ask(marathon, "GET", "/v2/apps//group/web").json["app"]
    assert (app["labels"], len(app["tasks"])) == (APP["labels"], 2)
    assert len(ask(marathon, "GET", "/v2/apps?embed=apps.tasks").json["apps"][0]["tasks"]) == 2
    assert len(ask(marathon, "GET", "/v2/apps/group/web/tasks").json["tasks"]) == 2


def test_an_app_is_changed_and_deleted(marathon: Instance) -> None:
    ask(marathon, "POST", "/v2/apps", APP)
    assert ask(marathon, "POST", "/v2/apps", APP).status == 409
    assert ask(marathon, "PUT", "/v2/apps/group/web", {"instances": 1}).status == 200
    assert len(tasks(marathon)) == 1
    assert ask(marathon, "DELETE", "/v2/apps/group/web").status == 200
    assert tasks(marathon) == []
    assert ask(marathon, "GET", "/v2/apps/group/web").status == 404


def test_what_marathon_says_of_itself(marathon: Instance) -> None:
    info = ask(marathon, "GET", "/v2/info").json
    assert info["frameworkId"] == marathon.marathon.framework
    assert info["leader"] == ask(marathon, "GET", "/v2/leader").json["leader"] == marathon.address
    assert ask(marathon, "GET", "/ping").body == b"pong"


def test_a_pod_shares_one_address_among_its_containers(marathon: Instance) -> None:
    marathon.marathon.run_pod(
        {
            "id": "/pod",
            "networks": [{"mode": "container", "name": "web"}],
            "containers": [{"name": "one"}, {"name": "two"}],
        }
    )
    (pod,) = ask(marathon, "GET", "/v2/pods/::status").json
    (instance,) = pod["instances"]
    assert instance["networks"] == [{"name": "web", "addresses": ["10.64.0.1"]}]
    assert [container["name"] for container in instance["containers"]] == ["one", "two"]
    assert {task["id"].rpartition(".")[0] for task in tasks(marathon)} == {instance["id"]}
    assert ask(marathon, "GET", "/v2/pods/pod::status").json == pod


def test_events_say_what_happens_and_blank_lines_that_nothing_does(marathon: Instance) -> None:
    with listen(marathon, "/v2/events?event_type=status_update_event") as stream:
        assert next(stream.lines()) == b"\r\n"
        marathon.marathon.deploy(APP)
        kind, text = next(stream.events())
    event = json.loads(text)
    assert (kind, event["taskStatus"], event["appId"]) == (
        "status_update_event",
        "TASK_RUNNING",
        "/group/web",
    )
    assert event["ipAddresses"] == [{"ipAddress": "10.64.0.1", "protocol": "IPv4"}]


def test_events_are_no_json(marathon: Instance) -> None:
    assert ask(marathon, "GET", "/v2/events", accept="application/json").status == 405


def test_a_stream_ends_when_its_marathon_does(marathon: Instance) -> None:
    with listen(marathon) as stream:
        marathon.stop()
        with pytest.raises((HTTPException, OSError, StopIteration)):
            while True:
                next(stream.lines())


def test_marathon_1_4_asks_and_tells_otherwise(agent: Instant) -> None:
    with (
        Marathon(agent.master, legacy=True, keepalive=0.1).instance() as marathon,
        listen(marathon) as stream,
    ):
        marathon.marathon.deploy(
            {
                "id": "/old",
                "ipAddress": {"networkName": "web", "groups": ["a"], "labels": {"moorage.mac": "x"}},
            }
        )
        events = stream.events()
        event = next(json.loads(text) for kind, text in events if kind == "status_update_event")
        assert "ipAddresses" not in event
        (container,) = agent.containers.values()
        assert container.tasks[0].network_infos[0]["groups"] == ["a"]
        assert tasks(marathon)[0]["id"].startswith("old.")
        agent.master.lose(agent.id)
        assert [task["state"] for task in tasks(marathon)] == ["TASK_LOST"]


@pytest.mark.parametrize("redirect", [False, True])
def test_an_instance_that_does_not_lead_asks_or_names_the_leader(marathon: Instance, redirect: bool) -> None:
    with marathon.marathon.instance(redirect=redirect) as other:
        said = ask(other, "GET", "/v2/leader")
        if redirect:
            assert (said.status, said.headers["location"]) == (302, marathon.url + "/v2/leader")
        else:
            assert (said.json["leader"], said.headers["x-marathon-leader"]) == (
                marathon.address,
                marathon.url,
            )


def test_after_a_fail_over_the_other_leads_and_streams_have_ended(marathon: Instance) -> None:
    with marathon.marathon.instance() as other, listen(other) as stream:
        marathon.marathon.fail_over()
        list(stream.lines())
        assert ask(marathon, "GET", "/v2/leader").json["leader"] == other.address
        other.stop()
        assert ask(marathon, "GET", "/v2/leader").json["leader"] == marathon.address


def test_only_who_may_ask_is_answered(agent: Instant) -> None:
    with Marathon(agent.master).instance(user="me:secret", token="t0k") as marathon:
        assert ask(marathon, "GET", "/v2/info").status == 401
        basic = "Basic " + base64.b64encode(b"me:secret").decode()
        for login in (basic, "token=t0k", "Bearer t0k"):
            assert ask(marathon, "GET", "/v2/info", authorization=login).status == 200


def test_it_speaks_tls(agent: Instant, tmp_path: Path) -> None:
    files = ("-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert"))
    names = ("-subj", "/CN=marathon", "-addext", "subjectAltName=IP:127.0.0.1")
    new = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    subprocess.run([*new, *files, *names], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    trusting = ssl.create_default_context(cafile=str(tmp_path / "cert"))
    with Marathon(agent.master).instance(tls=tls) as marathon:
        assert marathon.url.startswith("https://")
        with urllib.request.urlopen(marathon.url + "/ping", context=trusting, timeout=10) as answer:
            assert answer.read() == b"pong"
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(marathon.url + "/ping", timeout=10)


def test_it_goes_away_refuses_and_breaks_off(marathon: Instance) -> None:
    marathon.faults.status = 503
    assert ask(marathon, "GET", "/v2/info").status == 503
    marathon.faults.none()
    marathon.faults.truncate = True
    with pytest.raises(HTTPException):
        ask(marathon, "GET", "/v2/info")
    marathon.faults.none()
    marathon.stop()
    with pytest.raises(OSError):
        ask(marathon, "GET", "/v2/info")
    marathon.start()
    assert ask(marathon, "GET", "/v2/info").status == 200


def states(marathon: Instance, count: int) -> list[str]:
    """The next ``count`` texts on a stream; each of the events sent is numbered."""
    with listen(marathon, "/v2/events?event_type=app_terminated_event") as stream:
        for number in range(count):
            marathon.marathon.streams.publish({"eventType": "app_terminated_event", "appId": f"/{number}"})
        marathon.marathon.streams.faults.none()
        time.sleep(0.3)
        marathon.marathon.streams.publish({"eventType": "app_terminated_event", "appId": "/end"})
        found = []
        for _, text in stream.events():
            if "/end" in text:
                return found
            found.append(text)
    return [*found, "broken"]


@pytest.mark.parametrize("fault", ["none", "lose", "duplicate", "delay", "garble", "cut"])
def test_each_fault_of_the_stream(agent: Instant, fault: str) -> None:
    with Marathon(keepalive=0.1, chance=random.Random(1)).instance() as marathon:
        faults = marathon.marathon.streams.faults
        faults.late = 0.2
        if fault != "none":
            setattr(faults, fault, 0.3)
        found = states(marathon, 50)
    whole = [
        json.dumps({"eventType": "app_terminated_event", "appId": f"/{n}"}, separators=(",", ":"))
        for n in range(50)
    ]
    match fault:
        case "none":
            assert found == whole
        case "lose":
            assert set(found) < set(whole)
        case "duplicate":
            assert len(found) > 50
            assert set(found) == set(whole)
        case "delay":
            assert found != whole
            assert sorted(found) == sorted(whole)
        case "garble":
            assert len(found) == 50
            assert any(text not in whole for text in found)
        case "cut":
            assert found[-1] == "broken"


def test_a_silent_stream_stays_open_and_says_nothing(marathon: Instance) -> None:
    marathon.marathon.streams.silence.on = True
    with listen(marathon) as stream:
        stream._link.sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            next(stream.lines())


def test_an_unreachable_task_is_kept_replaced_forgotten_and_killed_when_it_is_back(
    marathon: Instance, agent: Instant
) -> None:
    marathon.marathon.deploy({**APP, "instances": 1})
    (lost,) = tasks(marathon)
    agent.reaches_master = False
    agent.master.lose(agent.id)
    assert tasks(marathon)[0]["state"] == "TASK_UNREACHABLE"
    marathon.marathon.expunge(lost["id"])
    assert tasks(marathon) == []
    assert agent.has(lost["id"]), "its container goes on all the while"
    agent.reaches_master = True
    assert not agent.has(lost["id"])


def test_an_agent_that_was_marked_gone_is_gone_for_good(marathon: Instance, agent: Instant) -> None:
    marathon.marathon.deploy({**APP, "instances": 1})
    agent.reaches_master = False
    marked = agent.id
    with agent.master.instance() as master:
        ask(
            master,
            "POST",
            "/api/v1",
            {"type": "MARK_AGENT_GONE", "mark_agent_gone": {"agent_id": {"value": marked}}},
        )
        registry = ask(master, "GET", "/registrar(1)/registry").json
    assert [gone["id"]["value"] for gone in registry["gone"]["slaves"]] == [marked]
    assert registry["slaves"]["slaves"] == []
    assert tasks(marathon) == []
    agent.reaches_master = True
    assert agent.containers == {}


def test_a_master_that_does_not_lead_names_the_one_that_does(master: Master, agent: Instant) -> None:
    with master.instance() as one, master.instance() as other:
        said = ask(other, "POST", "/api/v1", {"type": "GET_AGENTS"})
        assert (said.status, said.headers["location"]) == (307, f"//{one.address}/api/v1")
        master.fail_over()
        listed = ask(other, "POST", "/api/v1", {"type": "GET_AGENTS"}).json["get_agents"]
        assert listed["agents"] == []
        assert [known["id"]["value"] for known in listed["recovered_agents"]] == [agent.id]


@pytest.mark.slow
def test_it_holds_100_000_tasks() -> None:
    with Marathon().instance() as marathon:
        infos = [TaskInfo(f"big.instance-{n:032x}._app.1", "big", "f") for n in range(100_000)]
        many = [Task(info, "/big", "S0", "host", "v", "TASK_RUNNING", started=1.0) for info in infos]
        marathon.marathon.fill({"id": "/big", "instances": 100_000}, many)
        assert len(tasks(marathon)) == 100_000
