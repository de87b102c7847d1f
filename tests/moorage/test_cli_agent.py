"""``moorage agent``, ``endpoint`` and ``status``: what is said to and heard from the local agent."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import structlog

from moorage.config import AgentConfig
from tests.moorage.agents import answering
from tests.moorage.conftest import CommandLine


def endpoint(container_id: str, ifname: str = "eth0", network: str = "web") -> dict[str, Any]:
    return {
        "container_id": container_id,
        "ifname": ifname,
        "state": "attached",
        "network": network,
        "engine": "mesos",
        "addresses": ["10.64.0.5", "fd00:64::5"],
        "mac": "0a:58:0a:40:00:05",
        "host_ifname": "mrg0123456789a",
        "netns": "/var/run/netns/c1",
        "mtu": 1500,
        "netgroups": ["web"],
        "labels": [{"key": "tier", "value": "front"}],
        "node": "a",
        "since": 1.0,
    }


ENDPOINTS = [
    endpoint("abc1"),
    endpoint("abc1", "eth1", "db"),
    endpoint("abd2"),
    endpoint("xyz", network="db"),
]


@pytest.fixture
def live(moorage: CommandLine) -> Iterator[CommandLine]:
    """A command line beside an agent with endpoints."""
    status = {"node": "a", "store": {"reachable": True, "in_sync": True}, "endpoints": {"attached": 4}}
    with answering(moorage.socket, {"endpoints": (0, ENDPOINTS), "status": (0, status)}):
        yield moorage


def test_endpoints_are_listed_as_the_agent_gives_them(live: CommandLine) -> None:
    assert live.json("endpoint", "list") == ENDPOINTS
    assert [e["container_id"] for e in live.json("endpoint", "list", "--network", "db")] == ["abc1", "xyz"]


def test_the_table_of_endpoints(live: CommandLine) -> None:
    lines = live.ok("endpoint", "list").splitlines()
    assert lines[0].split() == (
        "CONTAINER IFNAME STATE NETWORK ADDRESSES HOST IFNAME ENGINE NETGROUPS AGE".split()
    )
    assert "abc1       eth0    attached  web      10.64.0.5, fd00:64::5  mrg0123456789a  mesos" in lines[1]


def test_one_endpoint_is_an_object_and_a_container_an_array(live: CommandLine) -> None:
    assert live.json("endpoint", "show", "abc1/eth1") == ENDPOINTS[1]
    assert live.json("endpoint", "show", "abc1") == ENDPOINTS[:2]
    assert live.json("endpoint", "show", "x") == [ENDPOINTS[3]]
    assert "labels        tier=front" in live.ok("endpoint", "show", "xyz")


def test_the_beginning_of_two_containers_is_refused(live: CommandLine) -> None:
    assert (
        live.fails("endpoint", "show", "ab") == "ab is the beginning of 2 containers: abc1, abd2; write more"
    )


@pytest.mark.parametrize("name", ["nope", "abc1/eth7", "/eth0"])
def test_an_endpoint_that_is_not_there_says_where_to_look(live: CommandLine, name: str) -> None:
    assert "see `moorage endpoint list`" in live.fails("endpoint", "show", name)


@pytest.fixture
def missing(moorage: CommandLine) -> Iterator[CommandLine]:
    """A command line beside an agent that misses a container, abc1, and has others."""
    gone = [one | {"state": "missing"} for one in ENDPOINTS[:1]]
    answers = {"endpoints": (0, gone + ENDPOINTS[1:]), "missing": (0, gone)}
    with answering(moorage.socket, answers) as seen:
        yield moorage
    asked = [one["asked"] for one in seen]
    assert not [one for one in asked if one.get("answer")], "nothing was released or kept"


def test_a_container_cannot_have_ended_and_live(missing: CommandLine) -> None:
    said = missing.fails("endpoint", "missing", "--release", "--keep", code=2)
    assert "--release and --keep" in said
    assert "--release and --keep" in missing.fails(
        "endpoint", "missing", "--keep", "--release", "abc1", code=2
    )


def test_an_endpoint_that_is_not_missing_is_named_with_what_it_is(missing: CommandLine) -> None:
    for answer in ("--release", "--keep"):
        assert missing.fails("endpoint", "missing", answer, "abc1", "xy") == (
            "xyz/eth0 is attached, not missing; see `moorage endpoint missing` for those that are"
        )
    assert missing.fails("endpoint", "missing", "abc1/eth1").startswith("abc1/eth1 is attached, not missing;")
    assert "there is no endpoint nope" in missing.fails("endpoint", "missing", "--release", "nope")


def test_status_in_words_and_json(live: CommandLine) -> None:
    assert live.ok("status") == (
        "node       a\n"
        "store      reachable yes, in_sync yes\n"
        "endpoints  attached 4\n"
    )  # fmt: skip
    assert live.json("status")["node"] == "a"


@pytest.mark.parametrize("command", [["status"], ["endpoint", "list"], ["endpoint", "show", "c1"]])
def test_without_an_agent_there_is_one_line(moorage: CommandLine, command: list[str]) -> None:
    assert moorage.fails(*command) == (
        f"no agent answers on {moorage.socket}: start it with `moorage agent`, or name its socket with --socket"
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[AgentConfig]]:
    """The configurations that the agent was run with; it ends with 3."""
    configs: list[AgentConfig] = []

    def run(config: AgentConfig) -> int:
        configs.append(config)
        return 3

    module = ModuleType("moorage.agent")
    module.run = run
    monkeypatch.setitem(sys.modules, "moorage.agent", module)
    yield configs
    structlog.reset_defaults()


def test_the_agent_runs_with_all_layers_and_its_exit_code_is_ours(
    moorage: CommandLine, started: list[AgentConfig], tmp_path: Path
) -> None:
    file = tmp_path / "other.toml"
    file.write_text('underlay = "eth9"\nlog_level = "error"\n')
    result = moorage.run("agent", "--node", "n1", "--state-dir", str(tmp_path), "--config", str(file))
    assert (result.exit_code, result.output) == (3, "")
    assert started == [
        AgentConfig(
            node="n1",
            node_given=True,
            store=moorage.store,
            state_dir=tmp_path,
            socket=moorage.socket,
            log_level="error",
            log_format="console",
            underlay="eth9",
            vxlan_port=4789,
            gateway=False,
            manage_docker_user=True,
            default_network=None,
            mesos_agent_url=None,
            mesos_credentials=None,
            mesos_ca=None,
        )
    ]


def test_global_store_and_socket_hold_for_the_agent_too(
    moorage: CommandLine, started: list[AgentConfig]
) -> None:
    moorage.run("--store", "sqlite:///s.db", "--socket", "/s", "agent", "--node", "n1")
    assert (started[0].store, started[0].socket) == ("sqlite:///s.db", Path("/s"))


def test_paths_given_as_flags_may_be_relative(
    moorage: CommandLine, started: list[AgentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moorage.run("agent", "--node", "n1", "--state-dir", "state", "--socket", "s")
    assert (started[0].state_dir, started[0].socket) == (tmp_path / "state", tmp_path / "s")


def test_an_agent_that_cannot_be_configured_says_why(
    moorage: CommandLine, started: list[AgentConfig]
) -> None:
    assert moorage.fails("agent", "--node", "No Name").startswith("--node: expected a name of 1 to 63")
    assert started == []
