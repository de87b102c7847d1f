"""The hook: in this process where time is short-cut, as a real process where that is the point."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ipam.supervision import Supervision
from isolator.model import EndpointKey
from netmodules import frame, hook
from netmodules.server import Reply, Request, Server
from netmodules.spool import Spool
from tests.netmodules.fakes import CHECKOUT, SCRIPT, FakeIsolator, cni_env, handler_for, run_hook
from tests.netmodules.scripted import agent, be_silent, break_off, reply, spooled
from tests.patience import PATIENCE

KEY = EndpointKey("c0ffee", "eth0")


def environ(command: str, agent_socket: Path, **changes: str | None) -> dict[bytes, bytes]:
    env = {**cni_env(command, **changes), "MOORAGE_SOCKET": str(agent_socket)}
    return {name.encode(): value.encode() for name, value in env.items()}


def error_of(answer: tuple[int, bytes]) -> dict[str, object]:
    exit_code, stdout = answer
    assert exit_code == 1
    error: dict[str, object] = json.loads(stdout)
    assert set(error) == {"cniVersion", "code", "msg"}
    return error


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
        assert hook.run(environ("ADD", agent_socket), b"", window=PATIENCE) == (0, b"result")


def test_add_without_an_agent_says_try_again_where_and_why(agent_socket: Path) -> None:
    error = error_of(hook.run(environ("ADD", agent_socket), b"", window=0.2))
    assert error["code"] == 11
    assert str(agent_socket) in str(error["msg"])
    assert "No such file" in str(error["msg"])


def test_add_that_is_not_answered_says_try_again(agent_socket: Path) -> None:
    with agent(agent_socket, be_silent):
        error = error_of(hook.run(environ("ADD", agent_socket), b"", answer_timeout=0.1))
    assert (error["code"], "did not answer within 0.1 s" in str(error["msg"])) == (11, True)


def test_status_without_an_agent_is_unavailable_at_once(agent_socket: Path) -> None:
    env = environ("STATUS", agent_socket, CNI_CONTAINERID=None, CNI_IFNAME=None, CNI_NETNS=None)
    assert error_of(hook.run(env, b""))["code"] == 50


def test_gc_is_not_sent_later_than_it_was_asked_for(agent_socket: Path) -> None:
    env = environ("GC", agent_socket, CNI_CONTAINERID=None, CNI_IFNAME=None, CNI_NETNS=None)
    absent = error_of(hook.run(env, b""))
    with agent(agent_socket, break_off) as seen:
        broken = error_of(hook.run(env, b""))
    assert (absent["code"], broken["code"], len(seen)) == (11, 11, 1)
    assert spooled(agent_socket) == []


@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK"])
def test_a_broken_call_is_sent_again_with_the_same_id(agent_socket: Path, command: str) -> None:
    with agent(agent_socket, break_off, break_off, reply) as seen:
        assert hook.run(environ(command, agent_socket), b"", window=PATIENCE) == (0, b"result")
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    assert spooled(agent_socket) == []


def test_a_broken_del_outlives_a_restart_of_the_agent_and_leaves_no_spool_entry(agent_socket: Path) -> None:
    answers: list[tuple[int, bytes]] = []
    with agent(agent_socket, break_off) as first:
        asking = threading.Thread(
            target=lambda: answers.append(hook.run(environ("DEL", agent_socket), b"", window=PATIENCE))
        )
        asking.start()
    while not spooled(agent_socket):
        time.sleep(0.005)
    with agent(agent_socket, reply) as second:
        asking.join(PATIENCE)
    assert answers == [(0, b"result")]
    assert first == second
    assert spooled(agent_socket) == []


def test_a_broken_del_is_in_the_spool_when_the_window_ends(agent_socket: Path) -> None:
    with agent(agent_socket, break_off):
        assert hook.run(environ("DEL", agent_socket), b"", window=0.2) == (0, b"")
    assert spooled(agent_socket) == [KEY]


def test_a_del_that_is_not_answered_goes_into_the_spool(agent_socket: Path) -> None:
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


async def test_the_real_process_adds_and_deletes_against_the_real_server(
    hook_program: Path, agent_socket: Path
) -> None:
    isolator = FakeIsolator()
    handler = handler_for(isolator)
    server = Server(agent_socket, {"cni": handler}, handler.undo, Supervision())
    await server.start()
    socket_env = {"MOORAGE_SOCKET": str(agent_socket)}
    exit_code, stdout = await run_hook({**cni_env("ADD"), **socket_env}, program=hook_program)
    assert (exit_code, json.loads(stdout)["ip4"]["ip"]) == (0, "10.1.0.10/32")
    assert list(isolator.live) == [KEY]
    for stdin in (b"", b"{}" + b" " * (1 << 20), b"[" * (1 << 20)):
        exit_code, stdout = await run_hook({**cni_env("ADD"), **socket_env}, stdin, program=hook_program)
        assert (exit_code, json.loads(stdout)["code"]) == (1, 6)
    assert await run_hook({**cni_env("DEL"), **socket_env}, program=hook_program) == (0, b"")
    assert isolator.live == {}
    await server.stop()


@pytest.mark.parametrize("nothing", [None, ""])
async def test_calls_that_mean_no_endpoint_are_answered_alike_by_both_programs(
    hook_program: Path, agent_socket: Path, nothing: str | None
) -> None:
    """libcni sets the variables of an endpoint for these too, to nothing."""

    async def ask(command: str, **fields: object) -> tuple[int, dict[str, object]]:
        config = {"name": "web", "cniVersion": "1.1.0", **fields}
        names = ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS")
        env = {**cni_env(command, **dict.fromkeys(names, nothing)), "MOORAGE_SOCKET": str(agent_socket)}
        exit_code, stdout = await run_hook(env, json.dumps(config).encode(), program=hook_program)
        return exit_code, json.loads(stdout or b"{}")

    for command, code in (("GC", 11), ("STATUS", 50)):
        exit_code, refused = await ask(command)
        assert (exit_code, refused["cniVersion"], refused["code"]) == (1, "1.1.0", code)
    isolator = FakeIsolator()
    handler = handler_for(isolator)
    server = Server(agent_socket, {"cni": handler}, handler.undo, Supervision())
    await server.start()
    listed = {"cni.dev/valid-attachments": [{"containerID": "c0ffee", "ifname": "eth0"}]}
    assert await ask("GC", **listed) == (0, {})
    assert [set(valid.keys) for valid in isolator.collected] == [{KEY}]
    assert await ask("STATUS") == (0, {})
    exit_code, refused = await ask("GC")
    assert (exit_code, refused["code"]) == (1, 7)
    versions = {"cniVersion": "1.1.0", "supportedVersions": list(hook.SUPPORTED_VERSIONS)}
    assert await ask("VERSION") == (0, versions)
    await server.stop()


async def test_del_as_a_process_without_an_agent_does_not_wait_for_one(
    hook_program: Path, agent_socket: Path
) -> None:
    begin = time.monotonic()
    env = {**cni_env("DEL"), "MOORAGE_SOCKET": str(agent_socket)}
    assert await run_hook(env, program=hook_program) == (0, b"")
    assert time.monotonic() - begin < hook.WINDOW
    assert spooled(agent_socket) == [KEY]


async def test_an_add_whose_process_is_killed_is_undone(hook_program: Path, agent_socket: Path) -> None:
    called = asyncio.Event()
    undone = asyncio.Event()

    async def slow(_: Request) -> Reply:
        called.set()
        await asyncio.sleep(0.1)
        return Reply(0, b"result")

    async def on_abandoned(_: Request) -> None:
        undone.set()

    server = Server(agent_socket, {"cni": slow}, on_abandoned, Supervision(), return_window=0.1)
    await server.start()
    process = await asyncio.create_subprocess_exec(
        hook_program,
        stdin=asyncio.subprocess.DEVNULL,
        env={**cni_env("ADD"), "MOORAGE_SOCKET": str(agent_socket)},
    )
    await called.wait()
    process.kill()
    await process.wait()
    await asyncio.wait_for(undone.wait(), PATIENCE)
    await server.stop()


@pytest.mark.parametrize("stdin", [subprocess.DEVNULL, None])
def test_stdin_may_be_nothing_or_closed(stdin: int | None, hook_program: Path, agent_socket: Path) -> None:
    command = f'exec "{hook_program}" <&-' if stdin is None else f'exec "{hook_program}"'
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        stdin=stdin,
        capture_output=True,
        env={**cni_env("DEL"), "PATH": os.environ["PATH"], "MOORAGE_SOCKET": str(agent_socket)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert spooled(agent_socket) == [KEY]


def test_the_hook_finds_the_package_it_was_installed_with_through_links(
    native_hook: Path, tmp_path: Path
) -> None:
    version = "python{}.{}".format(*sys.version_info[:2])
    packages = tmp_path / "venv" / "lib" / version / "site-packages"
    shutil.copytree(CHECKOUT / "netmodules", packages / "netmodules")
    marked = packages / "netmodules" / "hook.py"
    marked.write_text(marked.read_text().replace('NEWEST_VERSION = "1.1.0"', 'NEWEST_VERSION = "installed"'))
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir()
    shutil.copy(SCRIPT, binaries)
    shutil.copy(native_hook, binaries)
    (binaries / "python3").symlink_to(sys.executable)
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "relative").symlink_to("../venv/bin/moorage-cni")
    (plugins / "absolute").symlink_to(plugins / "relative")
    (plugins / "python").symlink_to("../venv/bin/moorage-cni-py")
    programs = [
        *(binaries / "moorage-cni", plugins / "relative", plugins / "absolute"),
        *(binaries / "moorage-cni-py", plugins / "python"),
    ]
    for program in programs:
        commands: list[list[str | Path]] = [[program]]
        if program.resolve().name == "moorage-cni-py":
            commands += [[sys.executable, "-IS", program], [sys.executable, program]]
        for command in commands:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env={"CNI_COMMAND": "VERSION", "PATH": os.environ["PATH"]},
            )
            assert b'"cniVersion": "installed"' in done.stdout, (command, done)


RESUMED = ("--resume", "0123456789abcdef" * 2, "1000000000")


@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK", "STATUS", "GC"])
def test_a_resumed_call_keeps_its_id_and_its_time(agent_socket: Path, command: str) -> None:
    with agent(agent_socket, reply) as seen:
        assert hook.run(environ(command, agent_socket), b"", RESUMED) == (0, b"result")
    assert (seen[0]["request"], seen[0]["started"]) == (RESUMED[1].encode(), b"1000000000")


def test_a_resumed_del_counts_as_broken_and_outlives_a_restart_of_the_agent(agent_socket: Path) -> None:
    with agent(agent_socket, reply, after=0.3) as seen:
        assert hook.run(environ("DEL", agent_socket), b"", RESUMED, window=PATIENCE) == (0, b"result")
    assert seen[0]["request"] == RESUMED[1].encode()
    assert spooled(agent_socket) == []


def test_a_resumed_call_has_only_what_is_left_of_its_time(
    agent_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "ANSWER_TIMEOUT_LEAST", 0.1)
    started = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - 60 * 10**9
    with agent(agent_socket, be_silent):
        error = error_of(hook.run(environ("ADD", agent_socket), b"", (*RESUMED[:2], str(started))))
    assert (error["code"], "did not answer within 55 s" in str(error["msg"])) == (11, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--resume",),
        RESUMED[:2],
        (*RESUMED, ""),
        ("--resumed", *RESUMED[1:]),
        ("--resume", "0123456789ABCDEF" * 2, "1"),
        ("--resume", "0" * 31, "1"),
        ("--resume", "0" * 33, "1"),
        (*RESUMED[:2], ""),
        (*RESUMED[:2], "-1"),
        (*RESUMED[:2], "1.0"),
        (*RESUMED[:2], "٣"),
        (*RESUMED[:2], "9" * 19),
        (*RESUMED[:2], "0" * 20),
    ],
)
def test_other_arguments_are_refused(agent_socket: Path, arguments: tuple[str, ...]) -> None:
    for command in ("ADD", "DEL", "VERSION"):
        error = error_of(hook.run(environ(command, agent_socket), b"", arguments))
        assert (error["code"], "takes no arguments" in str(error["msg"])) == (4, True)
    assert spooled(agent_socket) == []


@pytest.mark.parametrize(
    "document",
    [
        b'{"cniVersion":"1.0.0"}',
        b'\xef\xbb\xbf {"cniVersion":"1.0.0"}',
        '{"cniVersion":"1.0.0"}'.encode("utf-16"),
        b' \r\n\t{"a":[1,-2.5e3,true,null,NaN,-Infinity,"\\u2603"],"cniVersion":"1.0.0","a":{}} \n',
        b'{"cniVersion":"1.0.0"}\x0b',
        b'\xa0{"cniVersion":"1.0.0"}',
        b'{"cniVersion":"1.0.0"} x',
        b'{"cniVersion":"1.0.0","x":"\xff"}',
        b'{"cniVersion":"1.0.0","x":"\xed\xa0\x80"}',
        b'{"cniVersion":"1.0.0","x":%s}' % (b"1" * 5000),
        b'["cniVersion"]',
        b"[" * 100_000,
        b"",
    ],
)
def test_a_configuration_is_read_as_the_json_module_reads_it(document: bytes) -> None:
    try:
        expected = json.loads(document)
    except (ValueError, RecursionError):
        expected = {}
    read = hook.configuration(document)
    assert repr(read) == repr(expected if isinstance(expected, dict) else {})


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ('{"socket":"/a"}', "b'/a' False"),
        ('{"socket":"/a","x":NaN}', "b'/a' False"),
        ('\ufeff{"socket":"/a"}', "b'/a' True"),
        ('{"socket":"/a"', "b'/run/moorage/agent.sock' True"),
        ('{"socket":"/a","x":"', "b'/run/moorage/agent.sock' True"),
        ('{"socket":"/a","x":[1,}', "b'/run/moorage/agent.sock' True"),
    ],
)
def test_json_is_imported_only_for_what_is_not_plain(document: str, expected: str) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); import netmodules.hook as hook; "
        f'print(hook.socket_path({{}}, {document.encode()!r}, "ADD"), "json" in sys.modules)'
    )
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


def test_the_hook_imports_nothing_but_its_frame_and_c_modules() -> None:
    program = (
        "import sys; before = set(sys.modules); "
        f"sys.path.insert(0, {str(CHECKOUT)!r}); import netmodules.hook; "
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "['_socket', 'netmodules', 'netmodules.frame', 'netmodules.hook']"
