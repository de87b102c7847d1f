"""An agent that is short of descriptors, memory or room on its disks, or is called by more than it can serve: it serves
again afterwards, without a hand."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from isolator.identity import boot_id
from moorage import admin
from moorage.lab import LabNode
from moorage.lab.node import AGENT
from netmodules import frame
from tests.patience import PATIENCE
from tests.system.conftest import assert_nothing_left

pytestmark = pytest.mark.kernel

CALLERS = int(os.environ.get("CALLERS") or 400)
"""Hooks at once. 5,000 in the run by hand."""

DISKS = [("run", "state"), ("run",), ("state",)]
"""What is on the full one: the spool stands in ``run``, the journal in ``state``."""

BY_HAND = pytest.mark.skipif(
    not os.environ.get("CALLERS"),
    reason="test_journal_lost.py and test_agent_away.py fill either for a while",
)

NOWHERE = b"/proc/1/ns/nowhere"


@pytest.fixture
def limited() -> Iterator[Callable[[str], LabNode]]:
    """limited("--nofile=256:256") -> a node whose agent has this limit of prlimit(1), with a network ``web``."""
    with contextlib.ExitStack() as stack:

        def start(limit: str) -> LabNode:
            node = stack.enter_context(LabNode("node", agent=("prlimit", limit, "--", *AGENT)))
            node.start()
            node.cli("network", "create", "web", "--pool", "10.64.0.0/16", "--pool", "fd64::/64")
            return node

        yield start


@pytest.fixture(autouse=True)
def _room_for_callers() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def request(command: bytes, number: int) -> bytes:
    """An ADD or DEL of a container that has no namespace (any more), as the hook sends it."""
    config = b'{"cniVersion":"1.0.0","name":"web","type":"moorage-cni"}'
    return frame.encode(
        {
            "call": b"cni",
            "request": uuid.uuid4().hex.encode(),
            "boot": boot_id().encode(),
            "started": str(time.clock_gettime_ns(time.CLOCK_BOOTTIME)).encode(),
            "stdin": config,
            "env.CNI_COMMAND": command,
            "env.CNI_CONTAINERID": b"c%d" % number,
            "env.CNI_IFNAME": b"eth0",
            "env.CNI_NETNS": NOWHERE,
            "env.CNI_PATH": b"/",
        }
    )


async def ask(path: str, call: bytes) -> tuple[int, bytes]:
    """One call, waiting for its turn like a hook: in connect(2) when the queue of those who wait is full."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as link:
        link.setblocking(False)
        while True:
            try:
                link.connect(path)
                break
            except BlockingIOError:
                await asyncio.sleep(0.1)
        await loop.sock_sendall(link, call)
        received = b""
        while chunk := await loop.sock_recv(link, 65536):
            received += chunk
            if len(received) >= frame.HEADER and len(received) >= frame.HEADER + frame.payload_length(
                received[: frame.HEADER]
            ):
                break
        reply = frame.decode(received[frame.HEADER :])
        return int(reply["exit"]), reply["stdout"]


async def ask_all(path: str, calls: Sequence[bytes]) -> list[tuple[int, bytes]]:
    async with asyncio.timeout(10 * PATIENCE):
        return list(await asyncio.gather(*(ask(path, call) for call in calls)))


def flood(path: str, count: int, sent: bytes) -> list[socket.socket]:
    """Connections that sent that, and say nothing more; fewer where the agent lets no more wait."""
    links = []
    for _ in range(count):
        link = socket.socket(socket.AF_UNIX)
        link.setblocking(False)
        try:
            link.connect(path)
        except BlockingIOError:
            link.close()
            break
        with contextlib.suppress(BlockingIOError):
            link.send(sent)
        links.append(link)
    return links


def served_again(node: LabNode) -> None:
    with node.container() as container:
        answer = container.add("web")
        assert answer.exit == 0, answer.stdout
        assert node.namespace.pings(answer.ips[4])
        assert container.delete("web").exit == 0
        assert_nothing_left(node)
    assert admin.call(str(node.socket), "status")["failing"] == []
    assert "Traceback" not in node.log.read_text()


def test_with_256_descriptors_every_caller_of_many_has_its_turn_and_the_right_answer(
    limited: Callable[[str], LabNode],
) -> None:
    node = limited("--nofile=128:256")
    limits = Path(f"/proc/{node.pid}/limits").read_text()
    assert [line.split()[3:5] for line in limits.splitlines() if "open files" in line] == [["256", "256"]]
    silent = flood(str(node.socket), 1000, request(b"ADD", 0)[:20])
    time.sleep(0.5)
    for link in silent:
        link.close()
    adds = asyncio.run(ask_all(str(node.socket), [request(b"ADD", n) for n in range(CALLERS)]))
    # That the namespace is not there, and nothing about rights or descriptors.
    assert {(code, b'"code":3' in said.replace(b" ", b"")) for code, said in adds} == {(1, True)}
    dels = asyncio.run(ask_all(str(node.socket), [request(b"DEL", n) for n in range(CALLERS)]))
    assert {code for code, _ in dels} == {0}
    served_again(node)
    assert len(os.listdir(f"/proc/{node.pid}/fd")) < 64


def test_with_128_mb_of_memory_many_callers_and_large_requests_are_served(
    limited: Callable[[str], LabNode],
) -> None:
    node = limited("--data=134217728")
    pid = node.pid
    large = b"MRG1" + frame.MAX_PAYLOAD.to_bytes(4, "big") + bytes(frame.MAX_PAYLOAD - 1)
    links = flood(str(node.socket), 64, b"")
    for start in range(0, len(large), 1 << 16):
        for link in links:
            with contextlib.suppress(OSError):
                link.send(large[start : start + (1 << 16)])
    dels = asyncio.run(ask_all(str(node.socket), [request(b"DEL", n) for n in range(CALLERS)]))
    assert {code for code, _ in dels} == {0}
    for link in links:
        link.close()
    served_again(node)
    assert node.pid == pid


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(os.urandom(4096)):
            pass
    return filler


@BY_HAND
@pytest.mark.parametrize("full", DISKS, ids="-and-".join)
def test_with_full_disks_and_an_agent_that_was_killed_all_goes_on_when_there_is_room(
    small_disk: Path, full: tuple[str, ...]
) -> None:
    with LabNode("node") as node:
        for name in full:
            (small_disk / name).mkdir(mode=0o700)
            (node.directory / name).symlink_to(small_disk / name)
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16", "--pool", "fd64::/64")
        with node.container() as old, node.container() as new:
            assert old.add("web").exit == 0
            filler = fill(small_disk)
            # Whatever becomes of these: refused in order, or done.
            added = new.add("web")
            assert added.exit == 0 or added.json["code"] in (5, 11), added.stdout
            node.kill()
            gone = old.delete("web")
            assert gone.exit == 0 or gone.json["code"] in (5, 11), gone.stdout
            node.launch()  # as its unit does, also while the disk is full
            time.sleep(0.5)
            filler.unlink()
            if not node.is_running:
                node.launch()
            node.wait_ready()
            for container in (old, new):
                assert container.delete("web").exit == 0
            assert_nothing_left(node)
