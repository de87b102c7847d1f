"""The hook: in this process where time is short-cut, as a real process where that is the point."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from isolator.model import EndpointKey
from netmodules import frame, hook
from netmodules.server import Reply, Request, Server
from netmodules.spool import Spool
from tests.netmodules.fakes import CHECKOUT, SCRIPT, FakeIsolator, cni_env, handler_for, run_hook

KEY = EndpointKey("c0ffee", "eth0")
RESULT = frame.encode({"exit": b"0", "stdout": b"result"})
Conversation = Callable[[socket.socket, bytes], None]


@pytest.fixture
def agent_socket(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path / "run" / "agent.sock"


def environ(command: str, agent_socket: Path, **changes: str | None) -> dict[bytes, bytes]:
    env = {**cni_env(command, **changes), "MOORAGE_SOCKET": str(agent_socket)}
    return {name.encode(): value.encode() for name, value in env.items()}


def error_of(answer: tuple[int, bytes]) -> dict[str, object]:
    exit_code, stdout = answer
    assert exit_code == 1
    error: dict[str, object] = json.loads(stdout)
    assert set(error) == {"cniVersion", "code", "msg"}
    return error


def spooled(agent_socket: Path) -> list[EndpointKey]:
    return [entry.key for entry in Spool(agent_socket.parent / "spool").entries()]


def receive_frame(link: socket.socket) -> dict[str, bytes]:
    header = link.recv(frame.HEADER, socket.MSG_WAITALL)
    return frame.decode(link.recv(frame.payload_length(header), socket.MSG_WAITALL))


def reply(link: socket.socket, _: bytes) -> None:
    link.sendall(RESULT)


def break_off(link: socket.socket, _: bytes) -> None:
    """Leave in the middle of the reply."""
    link.sendall(RESULT[:-3])


@contextmanager
def agent(path: Path, *conversations: Conversation, after: float = 0.0) -> Iterator[list[bytes]]:
    """A scripted agent: one connection a conversation, then it is gone. Yields the request ids it saw."""
    seen: list[bytes] = []
    listening = socket.socket(socket.AF_UNIX)

    def serve() -> None:
        time.sleep(after)
        listening.bind(str(path))
        listening.listen()
        for converse in conversations:
            link, _ = listening.accept()
            with link:
                seen.append(receive_frame(link)["request"])
                converse(link, seen[-1])
        path.unlink()
        listening.close()

    thread = threading.Thread(target=serve)
    thread.start()
    while not after and not path.exists():
        time.sleep(0.001)
    yield seen
    thread.join(5)
    assert not thread.is_alive()


def test_version_is_answered_without_an_agent(agent_socket: Path) -> None:
    exit_code, stdout = hook.run(environ("VERSION", agent_socket), b'{"cniVersion":"0.4.0"}')
    assert exit_code == 0
    assert json.loads(stdout) == {
        "cniVersion": "0.4.0",
        "supportedVersions": ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    }
    assert hook.run(environ("VERSION", agent_socket), b"")[0] == 0


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("", "CNI_COMMAND, CNI_CONTAINERID, CNI_IFNAME"),
        ("ADD", "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME"),
        ("CHECK", "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME"),
        ("DEL", "CNI_CONTAINERID, CNI_IFNAME"),
    ],
)
def test_all_missing_variables_are_named(agent_socket: Path, command: str, missing: str) -> None:
    answer = hook.run({b"CNI_COMMAND": command.encode()}, b'{"cniVersion":"1.0.0"}')
    assert error_of(answer) == {
        "cniVersion": "1.0.0",
        "code": 4,
        "msg": f"missing in the environment: {missing}",
    }


def test_an_unknown_command_is_named(agent_socket: Path) -> None:
    error = error_of(hook.run(environ("BREW", agent_socket), b""))
    assert (error["code"], "'BREW'" in str(error["msg"])) == (4, True)


def test_add_passes_bytes_both_ways(agent_socket: Path) -> None:
    with agent(agent_socket, reply):
        assert hook.run(environ("ADD", agent_socket), b"\xff\x00") == (0, b"result")


def test_add_waits_for_an_agent_that_starts_late(agent_socket: Path) -> None:
    with agent(agent_socket, reply, after=0.3):
        assert hook.run(environ("ADD", agent_socket), b"", window=5.0) == (0, b"result")


def test_add_without_an_agent_says_try_again_where_and_why(agent_socket: Path) -> None:
    error = error_of(hook.run(environ("ADD", agent_socket), b"", window=0.2))
    assert error["code"] == 11
    assert str(agent_socket) in str(error["msg"])
    assert "No such file" in str(error["msg"])


def test_add_that_is_not_answered_says_try_again(agent_socket: Path) -> None:
    def be_silent(*_: object) -> None:
        time.sleep(0.3)

    with agent(agent_socket, be_silent):
        error = error_of(hook.run(environ("ADD", agent_socket), b"", answer_timeout=0.1))
    assert (error["code"], "did not answer within 0.1 s" in str(error["msg"])) == (11, True)


def test_status_without_an_agent_is_unavailable_at_once(agent_socket: Path) -> None:
    env = environ("STATUS", agent_socket, CNI_CONTAINERID=None, CNI_IFNAME=None, CNI_NETNS=None)
    assert error_of(hook.run(env, b""))["code"] == 50


@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK"])
def test_a_broken_call_is_sent_again_with_the_same_id(agent_socket: Path, command: str) -> None:
    with agent(agent_socket, break_off, break_off, reply) as seen:
        assert hook.run(environ(command, agent_socket), b"", window=5.0) == (0, b"result")
    assert len(seen) == 3
    assert len(set(seen)) == 1
    assert spooled(agent_socket) == []


def test_a_broken_del_outlives_a_restart_of_the_agent_and_leaves_no_spool_entry(agent_socket: Path) -> None:
    answers: list[tuple[int, bytes]] = []
    with agent(agent_socket, break_off) as first:
        asking = threading.Thread(
            target=lambda: answers.append(hook.run(environ("DEL", agent_socket), b"", window=5.0))
        )
        asking.start()
    while not spooled(agent_socket):
        time.sleep(0.005)
    with agent(agent_socket, reply) as second:
        asking.join(5)
    assert answers == [(0, b"result")]
    assert first == second
    assert spooled(agent_socket) == []


def test_a_broken_del_is_in_the_spool_when_the_window_ends(agent_socket: Path) -> None:
    with agent(agent_socket, break_off):
        assert hook.run(environ("DEL", agent_socket), b"", window=0.2) == (0, b"")
    assert spooled(agent_socket) == [KEY]


def test_a_del_that_is_not_answered_goes_into_the_spool(agent_socket: Path) -> None:
    def be_silent(*_: object) -> None:
        time.sleep(0.3)

    with agent(agent_socket, be_silent):
        assert hook.run(environ("DEL", agent_socket), b"", answer_timeout=0.1) == (0, b"")
    assert spooled(agent_socket) == [KEY]


def test_a_del_is_spooled_whatever_stdin_holds(agent_socket: Path) -> None:
    for stdin in (
        b"",
        b"\xff",
        b'{"socket":' + b"[" * 100_000,
        b'{"socket":7}',
        b"x" * (frame.MAX_STDIN + 1),
    ):
        assert hook.run(environ("DEL", agent_socket), stdin) == (0, b"")
    assert spooled(agent_socket) == [KEY] * 5


def test_a_del_that_is_too_long_is_cut_down_to_its_key(agent_socket: Path) -> None:
    env = environ("DEL", agent_socket, CNI_ARGS="x" * 120_000)
    assert hook.run(env, b"x" * frame.MAX_STDIN) == (0, b"")
    [entry] = Spool(agent_socket.parent / "spool").entries()
    assert (entry.key, entry.request.stdin) == (KEY, b"")
    error = error_of(hook.run({**env, b"CNI_COMMAND": b"ADD"}, b"x" * frame.MAX_STDIN))
    assert (error["code"], "CNI_ARGS" in str(error["msg"])) == (4, True)


def test_the_spool_is_private_and_holds_whole_files_only(agent_socket: Path) -> None:
    hook.run(environ("DEL", agent_socket), b"")
    spool = agent_socket.parent / "spool"
    assert spool.stat().st_mode & 0o777 == 0o700
    [file] = spool.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_del_fails_only_if_the_spool_cannot_be_written(tmp_path: Path) -> None:
    error = error_of(hook.run(environ("DEL", tmp_path / "none" / "none" / "agent.sock"), b""))
    assert error["code"] == 5
    assert str(tmp_path / "none" / "none" / "spool") in str(error["msg"])
    assert "No such file" in str(error["msg"])
    (tmp_path / "spool").write_text("in the way")
    error = error_of(hook.run(environ("DEL", tmp_path / "agent.sock"), b""))
    assert "Not a directory" in str(error["msg"])


def test_after_a_reboot_a_del_makes_the_directory_that_the_agent_has_not_made_yet(tmp_path: Path) -> None:
    directory = tmp_path / "moorage"
    assert hook.run(environ("DEL", directory / "agent.sock"), b"") == (0, b"")
    assert directory.stat().st_mode & 0o777 == 0o700
    assert len(list((directory / "spool").glob("*.del"))) == 1


def test_the_socket_is_the_configurations_before_the_environments(agent_socket: Path) -> None:
    config = json.dumps({"name": "n", "socket": str(agent_socket)}).encode()
    with agent(agent_socket, reply):
        assert hook.run(environ("ADD", Path("/nowhere")), config) == (0, b"result")


def test_a_socket_key_further_down_is_not_ours(agent_socket: Path) -> None:
    with agent(agent_socket, reply):
        assert hook.run(environ("ADD", agent_socket), b'{"args":{"socket":"/nowhere"}}') == (0, b"result")


@pytest.mark.parametrize("wrong", ['"relative"', "7", '""', '"/a\\u0000b"'])
def test_a_socket_that_is_no_path_is_refused(agent_socket: Path, wrong: str) -> None:
    error = error_of(hook.run(environ("ADD", agent_socket), b'{"socket":%s}' % wrong.encode()))
    assert error["code"] == 7


async def test_the_real_process_adds_and_deletes_against_the_real_server(agent_socket: Path) -> None:
    isolator = FakeIsolator()
    handler = handler_for(isolator)
    server = Server(agent_socket, {"cni": handler}, handler.undo)
    await server.start()
    socket_env = {"MOORAGE_SOCKET": str(agent_socket)}
    exit_code, stdout = await run_hook({**cni_env("ADD"), **socket_env})
    assert (exit_code, json.loads(stdout)["ip4"]["ip"]) == (0, "10.1.0.10/32")
    assert list(isolator.live) == [KEY]
    for stdin in (b"", b"{}" + b" " * (1 << 20), b"[" * (1 << 20)):
        exit_code, stdout = await run_hook({**cni_env("ADD"), **socket_env}, stdin)
        assert (exit_code, json.loads(stdout)["code"]) == (1, 6)
    assert await run_hook({**cni_env("DEL"), **socket_env}) == (0, b"")
    assert isolator.live == {}
    await server.stop()


async def test_del_as_a_process_without_an_agent_is_done_within_a_second(agent_socket: Path) -> None:
    begin = time.monotonic()
    assert await run_hook({**cni_env("DEL"), "MOORAGE_SOCKET": str(agent_socket)}) == (0, b"")
    assert time.monotonic() - begin < 1.0
    assert spooled(agent_socket) == [KEY]


async def test_an_add_whose_process_is_killed_is_undone(agent_socket: Path) -> None:
    called = asyncio.Event()
    undone = asyncio.Event()

    async def slow(_: Request) -> Reply:
        called.set()
        await asyncio.sleep(0.1)
        return Reply(0, b"result")

    async def on_abandoned(_: Request) -> None:
        undone.set()

    server = Server(agent_socket, {"cni": slow}, on_abandoned, return_window=0.1)
    await server.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-IS",
        str(SCRIPT),
        stdin=asyncio.subprocess.DEVNULL,
        env={**cni_env("ADD"), "MOORAGE_SOCKET": str(agent_socket)},
    )
    await called.wait()
    process.kill()
    await process.wait()
    await asyncio.wait_for(undone.wait(), 2.0)
    await server.stop()


@pytest.mark.parametrize("stdin", [subprocess.DEVNULL, None])
def test_stdin_may_be_nothing_or_closed(stdin: int | None, agent_socket: Path) -> None:
    command = f'exec "{SCRIPT}" <&-' if stdin is None else f'exec "{SCRIPT}"'
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        stdin=stdin,
        capture_output=True,
        env={**cni_env("DEL"), "PATH": os.environ["PATH"], "MOORAGE_SOCKET": str(agent_socket)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert spooled(agent_socket) == [KEY]


def test_the_script_finds_the_package_it_was_installed_with_through_links(tmp_path: Path) -> None:
    version = "python{}.{}".format(*sys.version_info[:2])
    packages = tmp_path / "venv" / "lib" / version / "site-packages"
    shutil.copytree(CHECKOUT / "netmodules", packages / "netmodules")
    marked = packages / "netmodules" / "hook.py"
    marked.write_text(marked.read_text().replace('NEWEST_VERSION = "1.1.0"', 'NEWEST_VERSION = "installed"'))
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir()
    shutil.copy(SCRIPT, binaries)
    (binaries / "python3").symlink_to(sys.executable)
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "relative").symlink_to("../venv/bin/moorage-cni")
    (plugins / "absolute").symlink_to(plugins / "relative")
    for program in (binaries / "moorage-cni", plugins / "relative", plugins / "absolute"):
        for command in ([program], [sys.executable, "-IS", program], [sys.executable, program]):
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env={"CNI_COMMAND": "VERSION", "PATH": os.environ["PATH"]},
            )
            assert b'"cniVersion": "installed"' in done.stdout, (command, done)


def test_the_hook_imports_nothing_but_its_frame_and_c_modules() -> None:
    program = (
        "import sys; before = set(sys.modules); "
        f"sys.path.insert(0, {str(CHECKOUT)!r}); import netmodules.hook; "
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "['_socket', 'netmodules', 'netmodules.frame', 'netmodules.hook']"
