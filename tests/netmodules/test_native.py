"""The native hook: what it sends is what the Python hook would, and what it does not do the Python hook does.

To tell which of the two answered, ``bare`` has a stub where the Python hook should be, which prints its
arguments and stdin and ends with HANDED_OVER.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from isolator.model import EndpointKey
from netmodules import frame, hook
from netmodules.spool import Spool
from tests.netmodules.fakes import CHECKOUT, NATIVE, SCRIPT, cni_env
from tests.netmodules.scripted import Fields, agent, be_silent, break_off, reply, spooled
from tests.patience import PATIENCE

KEY = EndpointKey("c0ffee", "eth0")
HANDED_OVER = 99
STUB = f"""#!/bin/sh
printf '%s\\n' "$@" STDIN
cat
exit {HANDED_OVER}
"""
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-U_FORTIFY_SOURCE")
Answer = tuple[int, bytes]


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native program, built to find its own faults, with a stub in place of the Python hook."""
    program = tmp_path_factory.mktemp("bare") / "moorage-cni"
    source = NATIVE / "moorage-cni.c"
    subprocess.run(
        ["cc", f"@{NATIVE / 'flags'}", "-Werror", *SANITIZERS, "-o", program, source],
        check=True,
    )
    stub = program.with_name("moorage-cni-py")
    stub.write_text(STUB)
    stub.chmod(0o755)
    return program


def execute(program: Path, env: Mapping[str, str], stdin: bytes = b"", *arguments: str) -> Answer:
    """Exit code and stdout; nothing may be said on stderr, where sanitizers report."""
    done = subprocess.run([program, *arguments], env={"PATH": os.environ["PATH"], **env}, input=stdin,
                          capture_output=True, timeout=PATIENCE)  # fmt: skip
    assert done.stderr == b""
    return done.returncode, done.stdout


def environment(command: str, agent_socket: Path, **changes: str | None) -> dict[str, str]:
    return {**cni_env(command, **changes), "MOORAGE_SOCKET": str(agent_socket)}


def handed_over(answer: Answer) -> tuple[list[str], bytes]:
    """The arguments and the stdin that the stub was given."""
    assert answer[0] == HANDED_OVER, answer
    arguments, _, stdin = answer[1].partition(b"STDIN\n")
    return arguments.decode().split(), stdin


@contextmanager
def echo_agents(*paths: Path) -> Iterator[None]:
    """Agents that answer with their socket's name and the length of stdin, for as long as they are needed."""
    listening = []
    for path in paths:
        listening.append(socket.socket(socket.AF_UNIX))
        listening[-1].bind(str(path))
        listening[-1].listen(64)
    stop, stopped = socket.socketpair()

    def serve() -> None:
        while True:
            ready, _, _ = select.select([stopped, *listening], [], [])
            for one in ready:
                if one is stopped:
                    return
                link, _ = one.accept()
                with link:
                    header = link.recv(frame.HEADER, socket.MSG_WAITALL)
                    fields = frame.decode(link.recv(frame.payload_length(header), socket.MSG_WAITALL))
                    stdout = b"%s %d" % (one.getsockname().encode(), len(fields["stdin"]))
                    link.sendall(frame.encode({"exit": b"7", "stdout": stdout}))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stop.close()
        thread.join(5)
        for one in [*listening, stopped]:
            one.close()
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("command", "changes", "stdin"),
    [
        ("ADD", {}, b'{"name":"web"}'),
        ("ADD", {"CNI_ARGS": "K=V;\xe9", "CNI_EMPTY": "", "CNIX": "no", "OTHER": "no"}, b"\xff\x00\n"),
        ("DEL", {"CNI_NETNS": None}, b""),
        ("CHECK", {}, b"{" + b" " * (frame.MAX_STDIN - 2) + b"}"),
        ("GC", {"CNI_CONTAINERID": None, "CNI_IFNAME": None, "CNI_NETNS": None}, b"{}"),
        ("STATUS", {"CNI_CONTAINERID": "", "CNI_IFNAME": None, "CNI_NETNS": None}, b"{}"),
        ("ADD", {"CNI_ARGS": "x" * 60_000}, b"y" * 100_000),
    ],
)
def test_the_frame_is_the_python_hooks_byte_for_byte(
    bare: Path, agent_socket: Path, command: str, changes: dict[str, str | None], stdin: bytes
) -> None:
    env = environment(command, agent_socket, **changes)
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    with agent(agent_socket, reply, reply) as seen:
        assert execute(bare, env, stdin) == (0, b"result")
        done = subprocess.run([sys.executable, "-IS", SCRIPT], env=env, input=stdin, stdout=subprocess.PIPE)
        assert (done.returncode, done.stdout) == (0, b"result")
    native, python = seen
    assert set(native["request"]) <= set(b"0123456789abcdef")
    assert len(native["request"]) == 32
    assert native["request"] != python["request"]
    assert before < int(native["started"]) < int(python["started"])
    same = {"request": b"", "started": b""}
    assert frame.encode({**native, **same}) == frame.encode({**python, **same})


def reply_in_pieces(link: socket.socket, _: Fields) -> None:
    for byte in frame.encode({"exit": b"1", "stdout": b"in pieces"}):
        link.sendall(bytes([byte]))
        time.sleep(0.001)


def reply_with_a_megabyte(link: socket.socket, _: Fields) -> None:
    link.sendall(frame.encode({"exit": b"255", "stdout": b"x" * frame.MAX_STDIN}))


def reply_with_nothing(link: socket.socket, _: Fields) -> None:
    link.sendall(frame.encode({"exit": b"0", "stdout": b""}))


def test_replies_arrive_whole_whatever_their_form(bare: Path, agent_socket: Path) -> None:
    env = environment("ADD", agent_socket)
    with agent(agent_socket, reply_in_pieces, reply_with_a_megabyte, reply_with_nothing):
        assert execute(bare, env) == (1, b"in pieces")
        assert execute(bare, env) == (255, b"x" * frame.MAX_STDIN)
        assert execute(bare, env) == (0, b"")


def raw(payload: bytes) -> bytes:
    return frame.MAGIC + len(payload).to_bytes(4, "big") + payload


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"MRG",
        b"MRG1\x00\x00\x00\x10",
        b"MRG2\x00\x00\x00\x00",
        b"MRG1\xff\xff\xff\xff",
        raw(b""),
        raw(b"\x00\x04exit"),
        raw(b"\x00\x04exit\xff\xff\xff\xff"),
        raw(b"\xff\xffexit\x00\x00\x00\x010"),
        frame.encode({"exit": b"0"}),
        frame.encode({"stdout": b"result"}),
        frame.encode({"exit": b"", "stdout": b"result"}),
        frame.encode({"exit": b"256", "stdout": b"result"}),
        frame.encode({"exit": b"-1", "stdout": b"result"}),
        frame.encode({"exit": b"0001", "stdout": b"result"}),
        frame.encode({"exit": b"0", "stdout": b"result", "more": b"of it"}),
        raw(frame.encode({"exit": b"0", "stdout": b"result"})[frame.HEADER : -1]),
    ],
)
def test_a_call_that_broke_is_handed_over_with_its_id_time_and_stdin(
    bare: Path, agent_socket: Path, answer: bytes
) -> None:
    with agent(agent_socket, lambda link, _: link.sendall(answer)) as seen:
        given = execute(bare, environment("ADD", agent_socket), b'{"name":"web"}')
    assert handed_over(given) == (
        ["--resume", seen[0]["request"].decode(), seen[0]["started"].decode()],
        b'{"name":"web"}',
    )


@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK"])
def test_a_broken_call_is_sent_again_as_the_very_same_request(
    native_hook: Path, agent_socket: Path, command: str
) -> None:
    stdin = b'{"name":"web"}' + b" " * 200_000
    with agent(agent_socket, break_off, break_off, reply) as seen:
        assert execute(native_hook, environment(command, agent_socket), stdin) == (0, b"result")
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    assert spooled(agent_socket) == []


def test_a_broken_del_is_spooled_with_the_id_that_the_agent_saw(
    native_hook: Path, agent_socket: Path
) -> None:
    answers: list[Answer] = []
    env = environment("DEL", agent_socket)
    with agent(agent_socket, break_off) as first:
        asking = threading.Thread(target=lambda: answers.append(execute(native_hook, env)))
        asking.start()
    spool = Spool(agent_socket.parent / "spool")
    while not (entries := spool.entries()):
        time.sleep(0.005)
    assert [entry.request.request_id.encode() for entry in entries] == [first[0]["request"]]
    with agent(agent_socket, reply) as second:
        asking.join(PATIENCE)
    assert answers == [(0, b"result")]
    assert first == second
    assert spooled(agent_socket) == []


def test_a_del_without_an_agent_is_spooled_once_with_its_stdin(native_hook: Path, agent_socket: Path) -> None:
    assert execute(native_hook, environment("DEL", agent_socket), b'{"name":"web"}') == (0, b"")
    [entry] = Spool(agent_socket.parent / "spool").entries()
    assert (entry.key, entry.request.stdin) == (KEY, b'{"name":"web"}')


def test_a_call_that_no_agent_took_is_handed_over_as_a_new_one(bare: Path, agent_socket: Path) -> None:
    env = environment("ADD", agent_socket)
    assert handed_over(execute(bare, env, b"\x00stdin")) == ([], b"\x00stdin")
    refusing = socket.socket(socket.AF_UNIX)
    refusing.bind(str(agent_socket))
    refusing.close()
    assert handed_over(execute(bare, env, b"\x00stdin")) == ([], b"\x00stdin")
    too_long = {**env, "MOORAGE_SOCKET": "/" + "x" * 107}
    assert handed_over(execute(bare, too_long, b"\x00stdin")) == ([], b"\x00stdin")


@pytest.mark.parametrize(
    "changes",
    [
        {"CNI_COMMAND": "VERSION"},
        {"CNI_COMMAND": "BREW"},
        {"CNI_COMMAND": ""},
        {"CNI_COMMAND": None},
        {"CNI_CONTAINERID": None},
        {"CNI_IFNAME": ""},
        {"CNI_NETNS": None},
        {"CNI_lower": "x"},
        {"CNI_A-B": "x"},
        {"CNI_ARGS": "x" * 100_000},
        {f"CNI_{number}": "x" for number in range(60)},
    ],
    ids=lambda changes: ",".join(changes)[:30],
)
def test_what_is_not_an_ordinary_environment_is_handed_over(
    bare: Path, agent_socket: Path, changes: dict[str, str | None]
) -> None:
    stdin = b"x" * frame.MAX_STDIN
    with echo_agents(agent_socket):
        assert execute(bare, environment("ADD", agent_socket), stdin)[0] == 7
        assert handed_over(execute(bare, environment("ADD", agent_socket, **changes), stdin)) == ([], stdin)


@pytest.mark.parametrize("twice", ["CNI_ARGS", "CNI_COMMAND", "MOORAGE_SOCKET"])
def test_a_variable_that_is_there_twice_is_handed_over(bare: Path, agent_socket: Path, twice: str) -> None:
    """Which one counts is for one program to decide; only execve(2) itself can pass such an environment."""
    variables = [f"{name}={value}" for name, value in environment("ADD", agent_socket).items()]
    program = (
        "import ctypes, sys; program, *env = [argument.encode() for argument in sys.argv[1:]]; "
        "ctypes.CDLL(None).execve(program, (ctypes.c_char_p * 2)(program), "
        "(ctypes.c_char_p * (len(env) + 1))(*env))"
    )
    for more, exit_code in (["CNI_ARGS=a"], 7), ([f"{twice}=ADD", f"{twice}=ADD"], HANDED_OVER):
        with echo_agents(agent_socket):
            done = subprocess.run(
                [sys.executable, "-c", program, bare, *variables, *more],
                stdin=subprocess.DEVNULL,
                capture_output=True,
            )
        assert (done.returncode, done.stderr) == (exit_code, b"")
        agent_socket.unlink()


def test_arguments_are_handed_over_untouched(bare: Path, agent_socket: Path) -> None:
    with echo_agents(agent_socket):
        given = execute(bare, environment("ADD", agent_socket), b"stdin", "--resume", "x")
    assert handed_over(given) == (["--resume", "x"], b"stdin")


def test_stdin_that_is_too_long_is_handed_over_as_far_as_the_python_hook_reads_it(
    native_hook: Path, bare: Path, agent_socket: Path, tmp_path: Path
) -> None:
    stdin = os.urandom(frame.MAX_STDIN + 1)
    env = environment("ADD", agent_socket)
    with echo_agents(agent_socket):
        assert handed_over(execute(bare, env, stdin + b"more")) == ([], stdin)
        expected = (7, f"{agent_socket} {frame.MAX_STDIN + 1}".encode())
        assert execute(native_hook, env, stdin + b"more") == expected
        (tmp_path / "stdin").write_bytes(stdin + b"more")
        with (tmp_path / "stdin").open("rb") as file:
            done = subprocess.run([native_hook], env=env, stdin=file, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == expected


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_descriptors_are_handed_over_untouched(bare: Path, agent_socket: Path, closed: str) -> None:
    with echo_agents(agent_socket):
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "{bare}" {closed}'], env=environment("ADD", agent_socket), input=b"x",
            capture_output=True,
        )  # fmt: skip
    assert done.returncode == HANDED_OVER


def test_unreadable_stdin_is_nothing(native_hook: Path, agent_socket: Path) -> None:
    directory = os.open("/", os.O_RDONLY)
    with echo_agents(agent_socket):
        done = subprocess.run(
            [native_hook], env=environment("ADD", agent_socket), stdin=directory, capture_output=True
        )
    os.close(directory)
    assert (done.returncode, done.stdout) == (7, f"{agent_socket} 0".encode())


def test_an_answer_that_nobody_reads_is_a_failure(bare: Path, agent_socket: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with agent(agent_socket, reply):
        done = subprocess.run([bare], env=environment("ADD", agent_socket), stdin=subprocess.DEVNULL,
                              stdout=writing, stderr=subprocess.PIPE)  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_missing_python_hook_is_an_error_that_says_so(native_hook: Path, tmp_path: Path) -> None:
    alone = shutil.copy(native_hook, tmp_path)
    exit_code, stdout = execute(Path(alone), {"CNI_COMMAND": "VERSION"})
    assert (exit_code, json.loads(stdout)["code"]) == (1, 5)
    assert "moorage-cni-py" in json.loads(stdout)["msg"]


def test_an_agent_that_is_silent_is_left_to_the_python_hook(tmp_path: Path, agent_socket: Path) -> None:
    source = (NATIVE / "moorage-cni.c").read_text()
    timeout = f"ANSWER_SECONDS = {hook.ANSWER_TIMEOUT:.0f} "
    assert timeout in source
    (tmp_path / "hasty.c").write_text(source.replace(timeout, "ANSWER_SECONDS = 1 "))
    program = tmp_path / "moorage-cni"
    subprocess.run(["cc", f"@{NATIVE / 'flags'}", "-o", program, tmp_path / "hasty.c"], check=True)
    (tmp_path / "moorage-cni-py").write_text(STUB)
    (tmp_path / "moorage-cni-py").chmod(0o755)
    with agent(agent_socket, be_silent) as seen:
        given = execute(program, environment("DEL", agent_socket), b"stdin")
    assert handed_over(given)[0][:2] == ["--resume", seen[0]["request"].decode()]


PLAIN = [
    '{"socket":"A"}',
    '{"name":"web","socket":"A","type":"moorage-cni"}',
    ' \r\n\t{ "a" : [ 1 , 20 , 0 , true , false , null , {} , [] ] , "socket" : "A" } \n',
    '{"args":{"socket":"B"},"socket":"A"}',
    '{"args":{"socket":"B"}}',
    '{"name":"socket","x":["socket",{"socket":"B"}]}',
    '["socket","B"]',
    '"socket"',
    '"socket',
    '{"\\u0073ocket":"B","x":"\\"socket\\""}',
    '{"a":' * 60 + '{"socket":"B"}' + "}" * 60,
]
ODD = [
    '{"socket":"A","socket":"B"}',
    '{"socket":"A","\\u0073ocket":"B"}',
    '{"socket":"\\u002f"}',
    '{"socket":"A","x":"☃"}',
    '{"socket":"A☃"}',
    '{"socket":"A\\/"}',
    '{"socket":"A","x":"\\n"}',
    '{"x":"\\"socket\\":","socket":"A"}',
    '{"socket":"A"',
    '{"socket":"A"}}',
    '{"socket":"A"} x',
    '{"socket":"A",}',
    '{"socket":"A" "x":1}',
    '{"socket":"A","x":01}',
    '{"socket":"A","x":1.5e3}',
    '{"socket":"A","x":-2}',
    '{"socket":"A","x":-}',
    '{"socket":"A","x":NaN}',
    '{"socket":"A","x":tru}',
    '{"socket":"A","x":' + "1" * 5000 + "}",
    '{"socket":"A","x":"\x01"}',
    '{"socket":"A\x7f"}',
    '{"socket":"A\x00"}',
    '{"socket":null}',
    '{"socket":7}',
    '{"socket":{"socket":"B"}}',
    '{"socket":""}',
    '{"socket":"relative"}',
    '{"socket":"A","socket":null}',
    '{"socket":"A","x":[}',
    '{"socket":"A","x":' + "[" * 100 + "]" * 100 + "}",
    '{"socket":"A","x":' + "[" * 100_000,
    '\ufeff{"socket":"A"}',
    "{'socket':\"A\",\"socket\"}",
    '{"socket"',
    '{"socket":',
    '{"socket":"',
    '{"socket":"/',
]  # fmt: skip


@pytest.fixture
def sockets(agent_socket: Path) -> Iterator[dict[str, Path]]:
    """Agents on the environment's socket and on two that configurations name A and B."""
    paths = {"env": agent_socket, "A": agent_socket.with_name("a"), "B": agent_socket.with_name("b")}
    with echo_agents(*paths.values()):
        yield paths


def configured(document: str, sockets: Mapping[str, Path]) -> bytes:
    for name in ("A", "B"):
        document = document.replace(f'"{name}', f'"{sockets[name]}')
    return document.encode("utf-8", "surrogateescape")


def reference(env: Mapping[str, str], stdin: bytes) -> Answer:
    return hook.run({name.encode(): value.encode() for name, value in env.items()}, stdin)


def test_a_plain_configuration_is_read_without_python(bare: Path, sockets: dict[str, Path]) -> None:
    env = environment("STATUS", sockets["env"])
    for document in PLAIN:
        stdin = configured(document, sockets)
        assert execute(bare, env, stdin) == reference(env, stdin), document


def test_an_odd_configuration_is_left_to_python(
    bare: Path, native_hook: Path, sockets: dict[str, Path]
) -> None:
    env = environment("STATUS", sockets["env"])
    for document in ODD:
        stdin = configured(document, sockets)
        assert handed_over(execute(bare, env, stdin)) == ([], stdin), document
        assert execute(native_hook, env, stdin) == reference(env, stdin), document


def mutations(seed: int, count: int, sockets: Mapping[str, Path]) -> Iterator[bytes]:
    """Configurations with a few bytes changed, doubled, dropped or swapped for a piece of another."""
    dice = random.Random(seed)
    whole = [configured(document, sockets) for document in PLAIN + ODD if len(document) < 1000]
    pieces = [
        b'"socket"',
        b'"',
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"\xff",
        b"\x00",
        b"0",
        b"-",
        b" ",
    ]
    for _ in range(count):
        document = bytearray(dice.choice(whole))
        for _ in range(dice.randint(0, 3)):
            at = dice.randrange(len(document) + 1)
            until = min(len(document), at + dice.choice([0, 0, 1, 1, 5]))
            piece = dice.choice([*pieces, bytes([dice.randrange(256)]), document[at : at + 20]])
            document[at:until] = piece
        yield bytes(document)


def test_random_configurations_end_as_with_the_python_hook_or_are_left_to_it(
    bare: Path, sockets: dict[str, Path]
) -> None:
    env = environment("STATUS", sockets["env"])
    done_natively = 0
    for stdin in mutations(11, 150, sockets):
        answer = execute(bare, env, stdin)
        if answer[0] == HANDED_OVER:
            assert handed_over(answer) == ([], stdin)
        else:
            assert answer == reference(env, stdin), stdin
            done_natively += 1
    assert done_natively > 15


def test_random_environments_and_replies_break_nothing(bare: Path, agent_socket: Path) -> None:
    dice = random.Random(12)
    names = ["CNI_", "CNI_A", "CNI_a", "CNI_ARGS", "CNI_NETNS", "CNI_IFNAME", "MOORAGE_SOCKET", "CNI", "X"]
    sizes = [0, 1, 2, 100, 107, 108, 4096, 30_000]
    whole = frame.encode({"exit": b"0", "stdout": b"result"})

    def misbehave(link: socket.socket, _: Fields) -> None:
        answer = bytearray(whole)
        for _ in range(dice.randint(0, 2)):
            answer[dice.randrange(len(answer))] = dice.choice([0, 1, 127, 255, dice.randrange(256)])
        link.sendall(answer[: dice.choice([len(answer), len(answer), dice.randrange(len(answer))])])

    for _ in range(60):
        env = environment(dice.choice(["ADD", "DEL", "STATUS"]), agent_socket)
        env |= {dice.choice(names): dice.choice(["/", "x", "\xe9", "="]) * dice.choice(sizes) for _ in "abc"}
        assert execute(bare, env, dice.randbytes(dice.choice(sizes)))[0] == HANDED_OVER
    for _ in range(60):
        with agent(agent_socket, misbehave):
            exit_code, _ = execute(bare, environment("ADD", agent_socket), b"{}")
        assert 0 <= exit_code <= 255


@pytest.mark.parametrize("compiler", ["cc", "/nowhere/cc", "false"])
def test_the_build_makes_the_native_hook_or_the_python_one_under_its_name(
    tmp_path: Path, compiler: str
) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_scripts", "--build-dir", tmp_path],
        cwd=CHECKOUT,
        env={**os.environ, "CC": compiler},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    python, native = tmp_path / "moorage-cni-py", tmp_path / "moorage-cni"
    assert python.read_bytes() == SCRIPT.read_bytes()
    assert os.access(python, os.X_OK)
    assert os.access(native, os.X_OK)
    is_python = native.read_bytes() == python.read_bytes()
    assert is_python == (compiler != "cc")
    assert ("becomes the Python program" in done.stderr) == is_python
