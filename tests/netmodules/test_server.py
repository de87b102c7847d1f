"""The socket server, with clients that behave, and clients that do not."""

import asyncio
import contextlib
import os
import shutil
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ipam import supervision
from ipam.supervision import Supervision
from isolator.errors import AgentBusy
from netmodules import frame, server
from netmodules.server import Reply, Request, Server
from tests.patience import PATIENCE

REPLY = Reply(0, b"done")

WINDOW = 0.2
"""Seconds in which a caller may return."""


class Agent:
    """A server with a handler that can be held up."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.requests: list[Request] = []
        self.abandoned: list[Request] = []
        self.reply = REPLY
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.called = asyncio.Event()
        self.server = Server(
            path,
            {"cni": self.handle},
            self.on_abandoned,
            Supervision(),
            **{"return_window": WINDOW, **options},
        )

    async def handle(self, request: Request) -> Reply:
        self.requests.append(request)
        self.called.set()
        await self.go_on.wait()
        return self.reply

    async def on_abandoned(self, request: Request) -> None:
        self.abandoned.append(request)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.path)

    async def send(self, raw: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self.connect()
        writer.write(raw)
        await writer.drain()
        return reader, writer

    async def ask(self, raw: bytes) -> dict[str, bytes]:
        """The fields of the reply; {} if the server closed instead."""
        reader, writer = await self.send(raw)
        answer = await reader_all(reader)
        writer.close()
        return answer


async def reader_all(reader: asyncio.StreamReader) -> dict[str, bytes]:
    try:
        header = await reader.readexactly(frame.HEADER)
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return {}
    return frame.decode(await reader.readexactly(frame.payload_length(header)))


@asynccontextmanager
async def running(tmp_path: Path, **options: Any) -> AsyncIterator[Agent]:
    agent = Agent(tmp_path / "run" / "agent.sock", **options)
    await agent.server.start()
    try:
        yield agent
    finally:
        agent.go_on.set()
        await agent.server.stop(1.0)


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    async with running(tmp_path) as agent:
        yield agent


@pytest.fixture
async def patient(tmp_path: Path) -> AsyncIterator[Agent]:
    """An agent whose callers have all the time to return."""
    async with running(tmp_path, return_window=PATIENCE) as agent:
        yield agent


def request(call_id: str = "0" * 32, command: str = "ADD", **fields: bytes) -> bytes:
    return frame.encode(
        {
            "call": b"cni",
            "request": call_id.encode(),
            "boot": b"11111111-2222",
            "started": b"5",
            "env.CNI_COMMAND": command.encode(),
            "stdin": b"{}",
            **fields,
        }
    )


async def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def test_one_request_one_reply(agent: Agent) -> None:
    assert await agent.ask(request(stdin=b"\xff" * 1000)) == {"exit": b"0", "stdout": b"done"}
    [seen] = agent.requests
    assert (seen.call, seen.asked.at, seen.env, len(seen.stdin)) == ("cni", 5, {"CNI_COMMAND": "ADD"}, 1000)


async def test_socket_and_directory_are_private(agent: Agent) -> None:
    assert stat.S_IMODE(agent.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(agent.path.parent.stat().st_mode) == 0o700
    assert os.listdir(agent.path.parent) == ["agent.sock"]


async def test_a_directory_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    async with running(tmp_path):
        assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o755


async def test_other_users_are_turned_away(agent: Agent) -> None:
    agent.server._allowed_uids = {os.geteuid() + 1}
    assert await agent.ask(request()) == {}
    assert agent.requests == []


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"MRG1\xff\xff\xff\xff",
        b"MRG1\x00\x00\x00\x03abc",
        frame.encode({}),
        request("0" * 31),
        request("Z" * 32),
        request(started=b"-5"),
        request(boot=b""),
        frame.encode({"call": b"../x", "request": b"0" * 32, "boot": b"1", "started": b"1"}),
    ],
    ids=lambda raw: repr(raw[:30]),
)
async def test_what_is_no_request_is_closed_on(agent: Agent, raw: bytes) -> None:
    assert await agent.ask(raw) == {}
    assert agent.requests == []
    assert await agent.ask(request("1" * 32))


async def test_an_unknown_kind_of_call_is_an_error(agent: Agent) -> None:
    answer = await agent.ask(request(call=b"other"))
    assert answer["exit"] == b"1"
    assert b'"code":100' in answer["stdout"]


async def test_a_handler_that_raises_is_an_error_without_traceback(agent: Agent) -> None:
    async def broken(_: Request) -> Reply:
        raise ZeroDivisionError("secret")

    agent.server._handlers = {"cni": broken}
    answer = await agent.ask(request())
    assert answer["exit"] == b"1"
    assert b"secret" not in answer["stdout"]


Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def slow_and_silent(agent: Agent) -> list[Client]:
    return [await agent.send(request()[:n]) for n in (0, 5, 20) for _ in range(20)]


async def test_slow_and_silent_clients_block_nobody(tmp_path: Path) -> None:
    async with running(tmp_path, read_timeout=PATIENCE) as agent:
        slow = await slow_and_silent(agent)
        async with asyncio.timeout(PATIENCE / 2):
            assert await agent.ask(request())
        assert not any(reader.at_eof() for reader, _ in slow)
        for _, writer in slow:
            writer.close()


async def test_slow_and_silent_clients_are_cut_off(tmp_path: Path) -> None:
    async with running(tmp_path, read_timeout=0.1) as agent:
        for reader, writer in await slow_and_silent(agent):
            assert await reader.read() == b""
            writer.close()


async def test_callers_that_there_is_no_room_for_wait_for_their_turn(tmp_path: Path) -> None:
    async with running(tmp_path, callers=4) as agent:
        agent.go_on.clear()
        asking = [asyncio.create_task(agent.ask(request(f"{n:032x}"))) for n in range(40)]
        await until(lambda: len(agent.requests) == 4)
        await asyncio.sleep(0.1)
        assert len(agent.requests) == 4
        agent.go_on.set()
        assert {answer["exit"] for answer in await asyncio.gather(*asking)} == {b"0"}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("half_closed", [False, True])
async def test_a_caller_that_never_takes_its_reply_holds_no_descriptor(
    tmp_path: Path, half_closed: bool
) -> None:
    async with running(tmp_path, read_timeout=0.1) as agent:
        agent.reply = Reply(0, bytes(8 << 20))  # more than the kernel keeps for it
        before, links = descriptors(), []
        for _ in range(20):
            link = socket.socket(socket.AF_UNIX)
            link.connect(str(agent.path))
            link.sendall(request())
            if half_closed:
                link.shutdown(socket.SHUT_WR)
            links.append(link)
        await until(lambda: bool(agent.requests) and descriptors() <= before + len(links))
        for link in links:
            link.close()


async def test_a_request_that_drips_is_cut_off_and_others_are_served(tmp_path: Path) -> None:
    async with running(tmp_path, read_timeout=0.3, callers=30) as agent:
        slow = [await agent.connect() for _ in range(20)]

        async def drip(writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                for byte in request():
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.02)

        dripping = [asyncio.create_task(drip(writer)) for _, writer in slow]
        assert (await agent.ask(request("f" * 32)))["exit"] == b"0"
        for reader, _ in slow:
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        for task in dripping:
            task.cancel()
        await asyncio.gather(*dripping, return_exceptions=True)


async def test_many_requests_run_at_once(agent: Agent) -> None:
    agent.go_on.clear()
    asking = [asyncio.create_task(agent.ask(request(f"{n:032x}"))) for n in range(200)]
    await until(lambda: len(agent.requests) == 200)
    agent.go_on.set()
    assert {answer["exit"] for answer in await asyncio.gather(*asking)} == {b"0"}


async def test_the_same_id_joins_the_running_call_and_gets_its_reply(agent: Agent) -> None:
    agent.go_on.clear()
    asking = [asyncio.create_task(agent.ask(request())) for _ in range(3)]
    await agent.called.wait()
    await asyncio.sleep(0.05)
    agent.go_on.set()
    assert await asyncio.gather(*asking) == [{"exit": b"0", "stdout": b"done"}] * 3
    assert len(agent.requests) == 1


async def test_one_id_on_two_different_requests_is_refused(agent: Agent) -> None:
    agent.go_on.clear()
    first = asyncio.create_task(agent.ask(request()))
    await agent.called.wait()
    assert b"in use" in (await agent.ask(request(stdin=b"other")))["stdout"]
    agent.go_on.set()
    assert (await first)["exit"] == b"0"


async def test_a_finished_call_is_forgotten(agent: Agent) -> None:
    for _ in range(2):
        await agent.ask(request())
        await until(lambda: not agent.server._calls)
    assert len(agent.requests) == 2


Leave = Callable[[Agent], Awaitable[None]]


async def leave_while_it_runs(agent: Agent) -> None:
    agent.go_on.clear()
    _, writer = await agent.send(request())
    await agent.called.wait()
    writer.close()
    await asyncio.sleep(0.02)
    agent.go_on.set()


async def leave_with_the_reply_unread(agent: Agent) -> None:
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(agent.path))
        link.sendall(request())
        await agent.called.wait()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("leave", [leave_while_it_runs, leave_with_the_reply_unread])
async def test_an_add_nobody_comes_back_for_is_undone(agent: Agent, leave: Leave) -> None:
    begun = time.monotonic()
    await leave(agent)
    await until(lambda: agent.abandoned == agent.requests)
    assert time.monotonic() - begun >= WINDOW
    assert agent.server._calls == {}


@pytest.mark.parametrize("leave", [leave_while_it_runs, leave_with_the_reply_unread])
async def test_an_add_whose_caller_returns_is_kept_and_answered(patient: Agent, leave: Leave) -> None:
    await leave(patient)
    await asyncio.sleep(0.05)
    assert (await patient.ask(request()))["stdout"] == b"done"
    await until(lambda: patient.server._calls == {} and not patient.server._watches)
    assert (len(patient.requests), patient.abandoned) == (1, [])


async def test_an_add_that_ends_after_the_window_is_undone_then(agent: Agent) -> None:
    agent.go_on.clear()
    _, writer = await agent.send(request())
    await agent.called.wait()
    writer.close()
    await asyncio.sleep(0.3)
    assert agent.abandoned == []
    agent.go_on.set()
    await until(lambda: agent.abandoned == agent.requests)


async def test_a_failed_add_and_a_del_have_nothing_to_undo(agent: Agent) -> None:
    agent.reply = Reply(1, b"error")
    await leave_while_it_runs(agent)
    agent.called.clear()
    agent.go_on.clear()
    _, writer = await agent.send(request("d" * 32, "DEL"))
    await agent.called.wait()
    writer.close()
    agent.reply = REPLY
    agent.go_on.set()
    await until(lambda: not agent.server._calls)
    assert (len(agent.requests), agent.abandoned) == (2, [])


async def test_stop_finishes_what_is_in_flight_and_removes_the_socket(agent: Agent) -> None:
    agent.go_on.clear()
    asking = asyncio.create_task(agent.ask(request()))
    idle, idle_writer = await agent.connect()
    await agent.called.wait()
    stopping = asyncio.create_task(agent.server.stop())
    await asyncio.sleep(0.05)
    assert not agent.path.exists()
    assert await idle.read() == b""
    assert not stopping.done()
    agent.go_on.set()
    assert (await asking)["stdout"] == b"done"
    await asyncio.wait_for(stopping, PATIENCE)
    idle_writer.close()


async def test_stop_does_not_wait_for_ever(agent: Agent) -> None:
    agent.go_on.clear()
    asking = asyncio.create_task(agent.ask(request()))
    await agent.called.wait()
    await asyncio.wait_for(agent.server.stop(0.1), PATIENCE)
    assert await asking == {}


async def test_stop_keeps_an_add_whose_caller_may_return_to_the_next_agent(patient: Agent) -> None:
    await leave_while_it_runs(patient)
    await asyncio.sleep(0.05)
    await asyncio.wait_for(patient.server.stop(), PATIENCE / 2)
    assert (patient.abandoned, patient.server._watches) == ([], set())


async def test_a_dead_agents_socket_is_replaced_and_a_live_ones_is_not(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(AgentBusy, match=r"agent\.sock"):
        await Agent(agent.path).server.start()
    assert await agent.ask(request())
    dead = tmp_path / "dead" / "agent.sock"
    dead.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(dead))
    next_agent = Agent(dead)
    await next_agent.server.start()
    assert await next_agent.ask(request())
    await next_agent.server.stop()


async def test_a_socket_that_somebody_removed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SOCKET_EVERY", 0.05)
    monkeypatch.setattr(supervision, "FIRST_PAUSE", 0.01)
    async with running(tmp_path) as agent:
        agent.go_on.clear()
        before = asyncio.create_task(agent.ask(request("b" * 32)))
        await agent.called.wait()
        shutil.rmtree(agent.path.parent)
        await until(agent.path.exists)
        assert stat.S_IMODE(agent.path.parent.stat().st_mode) == 0o700
        agent.go_on.set()
        assert (await agent.ask(request("c" * 32)))["exit"] == b"0"
        assert (await before)["exit"] == b"0"


async def test_a_stopped_agent_leaves_its_successors_socket_alone(agent: Agent) -> None:
    agent.path.unlink()
    successor = Agent(agent.path)
    await successor.server.start()
    await agent.server.stop()
    assert await successor.ask(request())
    await successor.server.stop()
