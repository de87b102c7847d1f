"""Every long-lived task of an agent is made to raise, by name: it is told, tried again, and ends nothing else."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from moorage import admin
from moorage.lab import Lab, LabNode
from tests.system.conftest import elements, eventually, links

pytestmark = pytest.mark.kernel

RAISING = (
    sys.executable,
    str(Path(__file__).with_name("raising_agent.py")),
    "agent",
    "--mesos-agent-url",
    "http://127.0.0.1:9",  # nobody answers there
)

TASKS = {
    "addresses", "allocated", "catalogue", "changes", "cluster", "collector", "conflicts", "connections",
    "continuity", "fabric", "fabric addresses", "fence", "firewall", "firewalls", "forwarding", "fullness", "grace",
    "incarnation", "intents", "isolator", "journal", "lease", "limits", "links", "listener", "membership", "mending",
    "mesos", "neighbours", "pool routes", "reaper", "reconnections", "spool", "takeover", "underlay", "unfinished",
}  # fmt: skip
"""What every agent supervises, beside ``store pulse``, of SQLite."""

PARTS = {"watch of .*", "watch ends", "moorage-etcd-watch", "accepting"}
"""Patterns of tasks that others of the list have started, and wait for: what they raise, those raise."""

GRPC = {r"_?\w*Call\.\w+"}
"""What gRPC starts for each stream; whoever reads from that hears of it."""

WORKERS = {
    "moorage-store-reader",
    "moorage-store-writer",
    "moorage-wiring",
    "moorage-reaping",
    "moorage-fabric",
}
"""Threads that do what is handed to them, and what that raises, who handed it gets."""

OTHERS = {r"asyncio_\d+", r"Thread-\d+ \(_poll_wrapper\)"}
"""Patterns of threads of asyncio's, likewise, and of gRPC's."""

ON_ETCD = [
    pytest.mark.etcd,
    pytest.mark.skipif(not os.environ.get("EVERY_TASK"), reason="most tasks are the same as on SQLite"),
]

SHOWN = "supervised"

LONG = 2.0
"""Seconds: what lives for that long in an agent with nothing to do does so on purpose."""


class RaisingNode:
    """A node, and what is told to its tasks."""

    def __init__(self, node: LabNode) -> None:
        self.node = node

    def control(self, line: str) -> Any:
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(self.node.directory / "control"))
            link.sendall(f"{line}\n".encode())
            with link.makefile() as answer:
                return json.loads(answer.readline())

    def living(self, least: float = 0.0) -> list[str]:
        return [name for name, age in self.control("list") if age >= least]

    def failing(self) -> list[str]:
        sentences: list[str] = admin.call(str(self.node.socket), "status")["failing"]
        return sentences

    def told(self, name: str) -> str:
        """The sentence about a task; "" if it works."""
        return next((one for one in self.failing() if f" task {name} failed" in one), "")


@pytest.fixture(params=["sqlite", pytest.param("etcd", marks=ON_ETCD)])
def raising(request: pytest.FixtureRequest) -> Iterator[RaisingNode]:
    with ExitStack() as stack:
        if request.param == "etcd":
            node = stack.enter_context(Lab(nodes=1, agent=RAISING)).nodes[0]
        else:
            node = stack.enter_context(LabNode("node", agent=RAISING))
        node.start(CONTROL=str(node.directory / "control"))
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16", "--pool", "fd64::/64")
        yield RaisingNode(node)


def is_of(name: str, patterns: set[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def supervised_name(name: str) -> str:
    return "lease" if name.startswith("lease ") else name


def test_every_task_of_an_agent_that_raises_is_told_tried_again_and_ends_nothing_else(
    raising: RaisingNode, record_property: Callable[[str, object], None]
) -> None:
    node = raising.node
    # A store of one file has a thread that looks at it.
    tasks = TASKS | ({"store pulse"} if node.store.startswith("sqlite") else set())
    with node.container() as container:
        ips = container.add("web").ips
        eventually(lambda: {"addresses", "underlay", "journal"} <= set(raising.living(LONG)))
        old = sorted({*raising.living(LONG), *(n for n in raising.living() if supervised_name(n) in tasks)})
        assert tasks - set(map(supervised_name, old)) == set()
        unknown = {
            name
            for name in map(supervised_name, old)
            if not is_of(name, tasks | PARTS | GRPC | WORKERS | OTHERS)
        }
        assert unknown <= {"moorage-store-pulse"}, "long-lived, and not supervised under a name of the list"
        for name in sorted({name for name in raising.living() if is_of(name, PARTS)}):
            before = raising.failing()
            # Those that it shares an owner with may have ended with that.
            if raising.control(f"raise {name}"):
                eventually(lambda before=before: set(raising.failing()) - set(before))
        assert raising.failing()
        for name in sorted(WORKERS & set(old)):
            assert raising.control(f"raise {name}") == 1
        supervised = sorted(name for name in old if supervised_name(name) in tasks)
        supervised.sort(key="isolator".__ne__)  # it starts most of the others anew, so it comes first
        raised: dict[str, tuple[float, str]] = {}
        for name in supervised:
            before = raising.told(name)
            thread = "moorage-store-pulse" if name == "store pulse" else name
            eventually(lambda thread=thread: raising.control(f"raise {thread}"))
            eventually(lambda name=name, before=before: raising.told(name) not in ("", before))
            said = raising.told(name)
            assert "made to raise" in said
            assert "tried again" in said
            raised[name] = (time.monotonic(), said)

        def works(name: str) -> bool:
            if name in raised and not raising.told(name):
                begun, said = raised.pop(name)
                record_property(
                    SHOWN, f"{name}, {time.monotonic() - begun:.1f} s until it works again: {said}"
                )
            return name not in raised

        eventually(lambda: not [name for name in supervised if not works(name)])
        eventually(lambda: raising.failing() == [])

        log = node.log.read_text()
        for name in supervised:
            assert any(f"task={shown}" in log for shown in (name, repr(name))), "what fails is logged"
        assert "task works again" in log
        assert node.namespace.pings(ips[4])
        assert container.delete("web").exit == 0
        eventually(lambda: node.ask("endpoint", "list") == [])
        eventually(lambda: links(node) == [])
        eventually(lambda: elements(node) == 0)
    assert node.is_running


def test_what_stands_still_while_a_task_fails_is_in_the_runbook() -> None:
    runbook = Path(__file__).parents[2].joinpath("docs", "runbook.md").read_text("utf-8")
    rows = runbook.partition("## A task of the agent fails")[2].partition("\n## ")[0]
    told = set(re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (`.*?) \|", rows, re.MULTILINE))))
    assert told == (TASKS - {"lease"}) | {"lease ...", "store pulse"}
