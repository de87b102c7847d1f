"""The life cycle that net-modules has: reserve or allocate, isolate by pid, release, cleanup; with a real agent and the
program that a module executes."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from moorage.lab import LabNode, Namespace
from moorage.lab.modules import Module
from moorage.lab.namespace import unique
from tests.system.conftest import eventually, links, routes

pytestmark = [pytest.mark.kernel, pytest.mark.slow]


@dataclass(frozen=True)
class Task:
    """A process in a namespace of its own, as the Mesos agent has forked it."""

    id: str
    uid: str
    pid: int
    namespace: Namespace


@contextmanager
def task() -> Iterator[Task]:
    with Namespace(unique("task")) as namespace:
        process = namespace.start("sleep", "600")
        eventually(lambda: os.path.samefile(f"/proc/{process.pid}/ns/net", namespace.path))
        try:
            yield Task(str(uuid.uuid4()), str(uuid.uuid4()), process.pid, namespace)
        finally:
            process.kill()
            process.wait()


Start = Callable[[], Task]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(task())


@pytest.fixture
def module(node: LabNode) -> Module:
    return Module(node.socket, "web")


OK = {"error": None}


def isolated(module: Module, task: Task, **more: Any) -> dict[int, str]:
    """Allocate one address of each family and isolate the task with them."""
    given = module.call("allocate", uid=task.uid, num_ipv4=1, num_ipv6=1)
    assert given["error"] is None
    answer = module.call(
        "isolate",
        container_id=task.id,
        pid=task.pid,
        ipv4_addrs=given["ipv4"],
        ipv6_addrs=given["ipv6"],
        **{"netgroups": [], **more},
    )
    assert answer == OK
    return {4: given["ipv4"][0], 6: given["ipv6"][0]}


def state_of(node: LabNode, ip: str) -> str:
    return str(node.ask("ip", "show", ip)["state"])


def settled(node: LabNode, ip: str, state: str) -> None:
    eventually(lambda: state_of(node, ip) == state, within=30)


def nothing_in_use(node: LabNode) -> bool:
    states = {row["state"] for row in node.ask("ip", "list")}
    return not states & {"assigned", "allocated"} and not links(node) and not routes(node)


def test_the_whole_life_of_a_container(node: LabNode, module: Module, start: Start) -> None:
    one, other = start(), start()
    given = module.call("allocate", uid=one.uid, num_ipv4=1, num_ipv6=1)
    assert {name: len(value or ()) for name, value in given.items()} == {"ipv4": 1, "ipv6": 1, "error": 0}
    ip = given["ipv4"][0]
    settled(node, ip, "allocated")
    assert node.ask("ip", "show", ip)["uid"] == one.uid
    isolate = {
        "container_id": one.id,
        "pid": one.pid,
        "ipv4_addrs": given["ipv4"],
        "ipv6_addrs": given["ipv6"],
        "netgroups": ["web"],
    }
    assert module.call("isolate", **isolate) == OK
    assert module.call("isolate", **isolate) == OK, "the same again is done already"
    (endpoint,) = node.ask("endpoint", "list")
    assert (endpoint["engine"], endpoint["container_id"]) == ("net-modules", one.id)
    assert sorted(endpoint["addresses"]) == sorted([*given["ipv4"], *given["ipv6"]])
    theirs = isolated(module, other)
    for family in (4, 6):
        assert one.namespace.pings(theirs[family])
    assert module.call("release", uid=one.uid) == OK
    assert state_of(node, ip) == "assigned", "released before its interface is gone, it is nobody else's"
    assert one.namespace.pings(theirs[4])
    assert module.call("cleanup", container_id=one.id) == OK
    settled(node, ip, "cooling")
    assert module.call("cleanup", container_id=one.id) == OK, "of what is clean already"
    assert module.call("release", ips=[*theirs.values()]) == OK
    assert module.call("cleanup", container_id=other.id) == OK
    eventually(lambda: nothing_in_use(node))
    node.cli("ip", "check")


def test_reserve_takes_certain_addresses_of_both_families(
    node: LabNode, module: Module, start: Start
) -> None:
    one = start()
    addresses = {"ipv4_addrs": ["10.64.9.9"], "ipv6_addrs": ["fd64::99"]}
    assert module.call("reserve", uid=one.uid, **addresses) == OK
    assert module.call("reserve", uid=one.uid, **addresses) == OK, "they are its own already"
    another = module.call("reserve", uid="another", **addresses)
    assert "10.64.9.9" in another["error"]
    assert one.uid in another["error"]
    assert module.call("isolate", container_id=one.id, pid=one.pid, netgroups=[], **addresses) == OK
    assert "inet 10.64.9.9/32" in one.namespace.run("ip", "address", "show", "eth0").stdout


def test_reserve_is_all_or_nothing(node: LabNode, module: Module, start: Start) -> None:
    other = start()
    assert module.call("reserve", uid=other.uid, ipv4_addrs=["10.64.9.2"], ipv6_addrs=[]) == OK
    answer = module.call("reserve", uid="one", ipv4_addrs=["10.64.9.1", "10.64.9.2", "10.64.9.3"])
    assert "10.64.9.2" in answer["error"]
    assert [row["address"] for row in node.ask("ip", "list", "--state", "allocated")] == ["10.64.9.2"]


def test_release_by_address_gives_back_what_was_not_isolated(node: LabNode, module: Module) -> None:
    given = module.call("allocate", uid="u", num_ipv4=3, num_ipv6=2)
    first, *rest = given["ipv4"]
    assert module.call("release", ips=[first, given["ipv6"][0]]) == OK
    settled(node, first, "cooling")
    settled(node, given["ipv6"][0], "cooling")
    for ip in (*rest, given["ipv6"][1]):
        settled(node, ip, "allocated")
    assert module.call("release", uid="u") == OK
    eventually(lambda: nothing_in_use(node))


def test_what_allocate_said_of_netgroups_and_labels_holds_at_isolate(node: LabNode, start: Start) -> None:
    node.cli("network", "set", "web", "--allow-netgroup", "*")
    module, one, other = Module(node.socket, "web"), start(), start()
    labels = [{"key": "moorage.mac", "value": "02:00:00:00:00:01"}, {"key": "role", "value": "db"}]
    given = module.call("allocate", uid=one.uid, num_ipv4=1, netgroups=["red"], labels=labels)
    assert given["error"] is None
    isolate = {"container_id": one.id, "pid": one.pid, "ipv4_addrs": given["ipv4"], "ipv6_addrs": []}
    assert module.call("isolate", netgroups=[], **isolate) == OK
    (endpoint,) = node.ask("endpoint", "list")
    assert (endpoint["netgroups"], endpoint["mac"]) == (["red"], "02:00:00:00:00:01")
    theirs = isolated(module, other, netgroups=["blue"], labels={"team": "x"})
    assert not one.namespace.pings(theirs[4], wait=1)
    node.cli("endpoint", "set-netgroups", other.id, "red")
    eventually(lambda: one.namespace.pings(theirs[4], wait=1))


def test_a_label_that_names_an_address_is_honoured(node: LabNode, module: Module) -> None:
    given = module.call("allocate", uid="u", num_ipv4=2, num_ipv6=0, labels={"moorage.ip": "10.64.7.7"})
    assert "10.64.7.7" in given["ipv4"]
    assert len(given["ipv4"]) == 2


def test_a_reservation_keeps_its_address_from_task_to_task(
    node: LabNode, module: Module, start: Start
) -> None:
    node.cli("ip", "reserve", "10.64.5.5", "--key", "db")
    labels = {"moorage.reservation": "db"}
    for _ in range(2):
        one = start()
        given = module.call("allocate", uid=one.uid, num_ipv4=1, labels=labels)
        assert (given["ipv4"], given["error"]) == (["10.64.5.5"], None)
        addresses = {"ipv4_addrs": given["ipv4"], "ipv6_addrs": []}
        assert module.call("isolate", container_id=one.id, pid=one.pid, netgroups=[], **addresses) == OK
        assert module.call("release", uid=one.uid) == OK
        assert module.call("cleanup", container_id=one.id) == OK


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("allocate", {"uid": "u"}, "asks for no address"),
        ("allocate", {"uid": "u", "num_ipv4": 10**9}, "num_ipv4 must be from 0 to 64"),
        ("allocate", {"uid": "u", "num_ipv4": -1}, "num_ipv4 must be from 0 to 64"),
        ("allocate", {"uid": "u", "num_ipv4": 10**30}, "args of allocate"),
        ("allocate", {"uid": "", "num_ipv4": 1}, "uid must be"),
        ("allocate", {"uid": "a\nb", "num_ipv4": 1}, "uid must be"),
        ("allocate", {"num_ipv4": 1}, "uid"),
        ("allocate", {"uid": "u", "num_ipv4": 1, "netgroups": ["red"]}, "--allow-netgroup"),
        ("allocate", {"uid": "u", "num_ipv4": 1, "netgroups": ["; flush ruleset"]}, "a netgroup in netgroups"),
        ("allocate", {"uid": "u", "num_ipv4": 1, "labels": {"moorage.nonsense": "1"}}, "moorage.nonsense"),
        ("allocate", {"uid": "u", "num_ipv4": 1, "labels": [{"value": "1"}]}, "args of allocate"),
        ("allocate", {"uid": "u", "num_ipv4": 1, "labels": {"moorage.ip": "__import__('os')"}}, "moorage.ip"),
        ("allocate", {"uid": "u", "num_ipv6": 1, "labels": {"moorage.ip": "10.64.0.9"}}, "make them agree"),
        ("reserve", {"uid": "u"}, "reserve names no address"),
        ("reserve", {"uid": "u", "ipv4_addrs": ["10.99.0.1"]}, "10.99.0.1 is in no pool"),
        ("reserve", {"uid": "u", "ipv4_addrs": ["127.0.0.1"]}, "unicast"),
        ("reserve", {"uid": "u", "ipv4_addrs": ["$(reboot)"]}, "must be an IP address"),
        ("release", {}, "give uid or ips"),
        ("release", {"uid": None, "ips": []}, "give uid or ips"),
        ("isolate", {"container_id": "c", "pid": 0, "ipv4_addrs": ["10.64.0.9"]}, "pid must be"),
        ("isolate", {"container_id": "c", "pid": 4194304, "ipv4_addrs": ["10.64.0.9"]}, "process 4194304"),
        ("isolate", {"container_id": "c", "pid": os.getpid()}, "names no address"),
        ("isolate", {"container_id": "../c", "pid": 1, "ipv4_addrs": ["10.64.0.9"]}, "container_id must be"),
        ("isolate", {"container_id": "c", "pid": 1, "ipv4_addrs": ["10.64.0.8", "10.64.0.9"]}, "one family"),
        ("cleanup", {}, "container_id"),
        ("explode", {}, "the command 'explode' is unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_sentence(
    modest: LabNode, command: str, arguments: dict[str, Any], says: str
) -> None:
    answer = Module(modest.socket, "web").call(command, **arguments)
    assert says in answer["error"]
    assert "\n" not in answer["error"]
    assert modest.ask("ip", "list", "--state", "allocated") == []


@pytest.fixture(scope="module")
def modest() -> Iterator[LabNode]:
    """A node for calls that change nothing, whose network allows little."""
    with LabNode("node") as node:
        node.start()
        node.cli(
            "network",
            "create",
            "web",
            "--pool",
            "10.64.0.0/16",
            "--pool",
            "fd64::/64",
            "--allow-static",
            "all",
        )
        yield node


@pytest.mark.parametrize(
    "stdin",
    [b"", b"[]", b"null", b"{", b"\x00\xff", b'{"command": 1}', b'{"command": "allocate", "args": []}',
     b'{"command":"cleanup","args":{"container_id":"' + b"x" * 2_000_000 + b'"}}', b"[" * 100_000],
    ids=["nothing", "list", "null", "cut short", "bytes", "number", "no args", "two megabytes", "deep"],
)  # fmt: skip
def test_whatever_comes_is_answered_with_a_document_that_has_an_error(modest: LabNode, stdin: bytes) -> None:
    module = Module(modest.socket, "web")
    process = module.start_raw(stdin)
    answer = module.finish_call(process)
    assert answer["error"]
    assert len(json.dumps(answer)) < 40_000
    assert process.returncode == 1


@pytest.mark.parametrize("option", [["--frobnicate"], ["--network"], ["--socket", "relative"]])
def test_a_wrong_option_is_answered_on_stdout_too(option: list[str]) -> None:
    from moorage.lab.modules import HOOK

    done = subprocess.run([HOOK, *option], input=b"{}", capture_output=True, check=False)
    assert done.returncode == 1
    assert option[0] in json.loads(done.stdout)["error"]


def test_isolate_refuses_addresses_that_were_not_allocated_here(
    node: LabNode, module: Module, start: Start
) -> None:
    one, other = start(), start()
    theirs = isolated(module, other)
    asked = {"container_id": one.id, "pid": one.pid, "ipv6_addrs": [], "netgroups": []}
    answer = module.call("isolate", ipv4_addrs=["10.64.200.200"], **asked)
    assert "10.64.200.200 is not allocated on node node" in answer["error"]
    answer = module.call("isolate", ipv4_addrs=[theirs[4]], **asked)
    assert other.id in answer["error"]
    assert "eth0" not in one.namespace.run("ip", "link").stdout


def test_isolate_refuses_the_nodes_own_namespace(node: LabNode, module: Module) -> None:
    given = module.call("allocate", uid="u", num_ipv4=1)
    answer = module.call(
        "isolate", container_id="c", pid=node.pid, ipv4_addrs=given["ipv4"], ipv6_addrs=[], netgroups=[]
    )
    assert "node's own" in answer["error"]
    assert state_of(node, given["ipv4"][0]) == "allocated", "it can be tried again"


def test_the_network_is_the_calls_else_the_configured_one_else_an_error(start: Start) -> None:
    with LabNode("node", options=("--netmodules-network", "web")) as node:
        node.start()
        for name, pool in (("web", "10.64.0.0/16"), ("other", "10.65.0.0/16")):
            node.cli("network", "create", name, "--pool", pool)
        assert Module(node.socket).call("allocate", uid="u", num_ipv4=1)["ipv4"][0].startswith("10.64.")
        assert (
            Module(node.socket, "other").call("allocate", uid="u", num_ipv4=1)["ipv4"][0].startswith("10.65.")
        )
        assert (
            "known networks: other, web"
            in Module(node.socket, "none").call("allocate", uid="u", num_ipv4=1)["error"]
        )
    with LabNode("node") as node:
        node.start()
        assert "no network is named" in Module(node.socket).call("allocate", uid="u", num_ipv4=1)["error"]


def test_what_was_allocated_outlives_the_agent(node: LabNode, module: Module, start: Start) -> None:
    one = start()
    given = module.call("allocate", uid=one.uid, num_ipv4=1, num_ipv6=1)
    node.kill()
    node.start()
    addresses = {"ipv4_addrs": given["ipv4"], "ipv6_addrs": given["ipv6"]}
    assert module.call("isolate", container_id=one.id, pid=one.pid, netgroups=[], **addresses) == OK
    node.kill()
    node.start()
    assert module.call("release", uid=one.uid) == OK
    assert module.call("cleanup", container_id=one.id) == OK
    eventually(lambda: nothing_in_use(node))


def test_what_was_allocated_outlives_the_journal(node: LabNode, module: Module, start: Start) -> None:
    one = start()
    given = module.call("allocate", uid=one.uid, num_ipv4=1)
    settled(node, given["ipv4"][0], "allocated")
    node.kill()
    for file in node.state_dir.glob("journal.db*"):
        file.unlink()
    node.start()
    addresses = {"ipv4_addrs": given["ipv4"], "ipv6_addrs": []}
    assert module.call("isolate", container_id=one.id, pid=one.pid, netgroups=[], **addresses) == OK


def test_release_and_cleanup_wait_for_an_agent_and_succeed_at_once(
    node: LabNode, module: Module, start: Start
) -> None:
    one = start()
    isolated(module, one)
    promised = module.call("allocate", uid="another", num_ipv4=1)["ipv4"][0]
    node.kill()
    assert module.call("release", uid=one.uid) == OK
    assert module.call("release", ips=[promised]) == OK
    assert module.call("cleanup", container_id=one.id) == OK
    node.start()
    eventually(lambda: nothing_in_use(node), within=30)
    settled(node, promised, "cooling")
    assert node.ask("status")["spool"] == 0


def test_a_late_release_does_not_give_back_what_was_allocated_after_it(node: LabNode, module: Module) -> None:
    """Its hook was killed after it had left the release to the spool."""
    given = module.call("allocate", uid="first", num_ipv4=1)["ipv4"][0]
    assert module.call("release", uid="first") == OK
    node.stop()
    assert module.call("release", uid="second") == OK
    (entry,) = (node.socket.parent / "spool").glob("*.del")
    late = entry.read_bytes()
    node.start()
    eventually(lambda: not entry.exists())
    again = module.call("allocate", uid="second", num_ipv4=1)["ipv4"][0]
    assert again != given
    entry.with_name(".late").write_bytes(late)
    entry.with_name(".late").rename(entry)
    eventually(lambda: not entry.exists())
    assert state_of(node, again) == "allocated"


def test_a_container_that_ends_without_cleanup_is_collected(node: LabNode, module: Module) -> None:
    with task() as one:
        ips = isolated(module, one)
        assert module.call("release", uid=one.uid) == OK
    settled(node, ips[4], "cooling")
    eventually(lambda: nothing_in_use(node))


def test_a_drained_node_keeps_what_is_allocated_and_allocates_nothing(
    node: LabNode, module: Module, start: Start
) -> None:
    one = start()
    given = module.call("allocate", uid=one.uid, num_ipv4=1)
    node.cli("node", "drain", "node", check=False)
    assert "drained" in module.call("allocate", uid="u", num_ipv4=1)["error"]
    addresses = {"ipv4_addrs": given["ipv4"], "ipv6_addrs": []}
    assert module.call("isolate", container_id=one.id, pid=one.pid, netgroups=[], **addresses) == OK


CYCLES, AT_ONCE = 100, 16


def test_a_hundred_cycles_with_the_agent_killed_at_random_leave_nothing(node: LabNode) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    module = Module(node.socket, "web")
    done = threading.Event()
    seen: dict[str, str] = {}
    lock = threading.Lock()

    def cycle(_: int) -> None:
        with task() as one:
            given = module.call("allocate", uid=one.uid, num_ipv4=1, num_ipv6=1)
            assert given["error"] is None
            with lock:
                for ip in (*given["ipv4"], *given["ipv6"]):
                    assert ip not in seen, f"{ip} belongs to {seen[ip]} and to {one.uid}"
                    seen[ip] = one.uid
            addresses = {"ipv4_addrs": given["ipv4"], "ipv6_addrs": given["ipv6"]}
            answer = module.call("isolate", container_id=one.id, pid=one.pid, netgroups=[], **addresses)
            assert answer == OK
            assert f"inet {given['ipv4'][0]}/32" in one.namespace.run("ip", "address", "show", "eth0").stdout
            with lock:
                for ip in (*given["ipv4"], *given["ipv6"]):
                    del seen[ip]
            assert module.call("release", uid=one.uid) == OK
            assert module.call("cleanup", container_id=one.id) == OK

    def killer() -> None:
        while not done.wait(rng.uniform(0.5, 2.0)):
            node.kill()
            time.sleep(rng.uniform(0, 0.3))
            node.start()

    disturbing = threading.Thread(target=killer)
    disturbing.start()
    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(cycle, range(CYCLES)))
    finally:
        done.set()
        disturbing.join()
    eventually(lambda: nothing_in_use(node), within=60)
    assert "mrg" not in node.namespace.run("nft", "list", "table", "inet", "moorage").stdout
    with closing(sqlite3.connect(node.state_dir / "journal.db")) as journal:
        assert journal.execute("SELECT count(*) FROM endpoints").fetchone() == (0,)
    node.cli("ip", "check")
    assert node.ask("status")["spool"] == 0
