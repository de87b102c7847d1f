"""The program of net-modules: what it does where no agent answers, in this process so that its waits can be short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netmodules import frame
from netmodules.modules import hook
from netmodules.spool import NETMODULES, Spool

RELEASE = b'{"command":"release","args":{"uid":"u"}}'
CLEANUP = b'{"command":"cleanup","args":{"container_id":"c"}}'


def run(stdin: bytes, agent_socket: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code, stdout = hook.run(("--socket", str(agent_socket), *arguments), {}, stdin, window=0.1)
    answer: dict[str, Any] = json.loads(stdout)
    assert (answer["error"] is None) == (code == 0)
    return code, answer


@pytest.mark.parametrize("stdin", [RELEASE, CLEANUP])
def test_what_gives_back_is_spooled_and_answered(agent_socket: Path, stdin: bytes) -> None:
    assert run(stdin, agent_socket) == (0, {"error": None})
    (entry,) = Spool(agent_socket.parent / "spool").entries()
    assert entry.key == NETMODULES
    assert (entry.request.call, entry.request.command) == ("netmodules", json.loads(stdin)["command"])
    assert entry.request.stdin == stdin


@pytest.mark.parametrize("command", ["allocate", "reserve", "isolate", "eval", "", 7, None, ["release"]])
def test_everything_else_waits_and_is_an_error(agent_socket: Path, command: object) -> None:
    code, answer = run(json.dumps({"command": command}).encode(), agent_socket)
    assert code == 1
    assert "no moorage agent answers" in answer["error"]
    assert not (agent_socket.parent / "spool").exists()


@pytest.mark.parametrize("stdin", [b"", b"{", b"\xff", b"[" * 10**5, b" " * (frame.MAX_STDIN + 1)])
def test_what_cannot_be_read_is_not_spooled(agent_socket: Path, stdin: bytes) -> None:
    assert run(stdin, agent_socket)[0] == 1
    assert not (agent_socket.parent / "spool").exists()


def test_a_spool_that_cannot_be_written_is_an_error(agent_socket: Path) -> None:
    (agent_socket.parent / "spool").write_text("in the way")
    code, answer = run(RELEASE, agent_socket)
    assert code == 1
    assert "spool" in answer["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--frobnicate",), "unknown argument '--frobnicate'"),
        (("--network",), "--network has no value"),
        (("--network=",), "--network has no value"),
        (("--socket", "run/agent.sock"), "absolute path"),
        (("web",), "unknown argument 'web'"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused(arguments: tuple[str, ...], words: str) -> None:
    code, stdout = hook.run(arguments, {}, RELEASE, window=0.1)
    assert code == 1
    assert words in json.loads(stdout)["error"]


def test_the_network_goes_with_the_request(agent_socket: Path) -> None:
    run(RELEASE, agent_socket, "--network=web")
    (entry,) = Spool(agent_socket.parent / "spool").entries()
    assert entry.request.env["NETMODULES_NETWORK"] == "web"
