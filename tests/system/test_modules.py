"""moorage-netmodules as an old Mesos agent executes it, on live namespaces that it knows by a process's number."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from isolator import steps
from moorage.lab import LabNode
from moorage.lab.modules import PROGRAM, ModulesContainer
from moorage.lab.mortal import command as mortal_agent
from tests.system.conftest import assert_nothing_left, elements, eventually, links

pytestmark = pytest.mark.kernel

OK: dict[str, Any] = {"error": None}


@contextlib.contextmanager
def module(node: LabNode, name: str = "module", network: str | None = "web") -> Iterator[ModulesContainer]:
    with ModulesContainer(node.socket, name, network=network) as container:
        yield container


def isolated(container: ModulesContainer, ipv4: int = 1, ipv6: int = 1, **args: Any) -> list[str]:
    """Its addresses, allocated and in its namespace."""
    answer = container.allocate(ipv4, ipv6, **args)
    assert answer["error"] is None, answer
    ips: list[str] = answer["ipv4"] + answer["ipv6"]
    assert container.isolate(ips) == OK
    return ips


def states(node: LabNode) -> dict[str, str]:
    return {row["address"]: row["state"] for row in node.ask("ip", "list")}


def refused(answer: Mapping[str, Any], *words: str) -> None:
    assert isinstance(answer["error"], str)
    for word in words:
        assert word in answer["error"], answer


def run_program(node: LabNode, stdin: bytes, *arguments: str) -> tuple[int, bytes]:
    done = subprocess.run(
        [str(PROGRAM), "--socket", str(node.socket), *arguments],
        input=stdin,
        capture_output=True,
        check=False,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.stderr == b""
    return done.returncode, done.stdout


def spooled(node: LabNode) -> list[Path]:
    return list((node.socket.parent / "spool").glob("*.del"))


def test_the_full_life_of_two_containers(node: LabNode) -> None:
    with module(node) as a, module(node) as b:
        answer = a.allocate(2, 1, netgroups=["web"], labels=[{"key": "role", "value": "frontend"}])
        assert answer["error"] is None
        assert (len(answer["ipv4"]), len(answer["ipv6"])) == (2, 1)
        ips = answer["ipv4"] + answer["ipv6"]
        assert {states(node)[ip] for ip in ips} == {"allocated"}
        node.cli("ip", "check")

        assert a.isolate(ips, ["web"]) == OK
        assert a.isolate(ips, ["web"]) == OK, "the same again"
        reserved = next(ip for ip in (f"10.64.9.{n}" for n in range(1, 200)) if ip not in states(node))
        assert b.call("reserve", uid=b.uid, ipv4_addrs=[reserved], ipv6_addrs=[]) == OK
        assert b.isolate([reserved]) == OK
        for ip in ips:
            assert node.namespace.pings(ip), ip
        for ip in ips[:2]:
            assert b.namespace.pings(ip), ip
        assert a.namespace.pings(reserved)
        (shown,) = (row for row in node.ask("endpoint", "list") if row["container_id"] == a.id)
        assert (shown["engine"], shown["ifname"], shown["state"]) == ("mesos-netmodules", "eth0", "attached")
        assert sorted(shown["addresses"]) == sorted(ips)
        assert shown["labels"] == [{"key": "role", "value": "frontend"}]
        node.cli("ip", "check")

        assert a.release() == OK
        assert {states(node)[ip] for ip in ips} == {"assigned"}, "the interface is still there"
        assert node.namespace.pings(ips[0])
        assert a.cleanup() == OK
        eventually(lambda: all(states(node).get(ip) != "assigned" for ip in ips))
        assert not node.namespace.pings(ips[0], wait=1)
        assert a.cleanup() == OK
        assert a.release() == OK

        assert b.cleanup() == OK, "without a release before it"
        assert b.release() == OK
        assert_nothing_left(node)
        node.cli("ip", "check")


def test_what_was_not_allocated_for_a_container_is_not_given_to_it(node: LabNode) -> None:
    with module(node) as a, module(node) as b, node.container() as other:
        ips = isolated(a)
        of_cni = other.add("web").ips
        refused(b.isolate(["10.64.250.1"]), "10.64.250.1 is not allocated")
        refused(b.isolate(ips), ips[0], f"belongs to {a.id} (eth0)")
        refused(b.isolate([of_cni[4]]), of_cni[4], f"belongs to {other.id} (eth0)")
        refused(b.call("release", ips=[of_cni[4]]), of_cni[4], other.id)
        refused(b.call("reserve", uid=b.uid, ipv4_addrs=[ips[0]]), ips[0], a.id)
        mine, theirs = b.allocate(1, 0)["ipv4"], a.allocate(1, 0)["ipv4"]
        refused(b.isolate(mine + theirs), "several uids")
        assert other.namespace.pings(ips[0])
        other.delete("web")
        for each in (a, b):
            each.cleanup()
            each.release()
        assert_nothing_left(node)


def test_a_process_that_is_none_a_host_s_or_gone_is_refused_and_the_addresses_wait(node: LabNode) -> None:
    with module(node) as a:
        answer = a.allocate(1, 0)
        ips = answer["ipv4"]
        with node.namespace.start("sleep", "infinity") as beside:
            try:
                refused(a.isolate(ips, pid=beside.pid), "the node's own network namespace")
            finally:
                beside.kill()
        refused(a.isolate(ips, pid=beside.pid), "does not exist (any more)")
        refused(a.isolate(ips, pid=4194304), "does not exist (any more)")
        assert states(node)[ips[0]] == "allocated"
        assert a.isolate(ips) == OK
        a.end()
        assert a.release() == OK
        assert a.cleanup() == OK
        assert_nothing_left(node)


@pytest.mark.parametrize(
    "stdin",
    [
        b"",
        b"{",
        b"[" * 200_000,
        b'{"command":"eval","args":{}}',
        b'{"command":"allocate","args":{"uid":"u","num_ipv4":1000000000}}',
        b'{"command":"allocate","args":{"uid":"u","num_ipv4":1,"labels":{"moorage.netgroups":"__import__(\'os\')"}}}',
        b'{"command":"release","args":{}}',
        b'{"command":"isolate","args":{"container_id":"..","pid":1}}',
        b"\0" * 100,
        b" " * 3_000_000,
    ],
)
def test_whatever_comes_in_one_document_with_an_error_goes_out(node: LabNode, stdin: bytes) -> None:
    code, stdout = run_program(node, stdin, "--network", "web")
    assert code == 1
    assert len(stdout) < 40_000
    refused(json.loads(stdout))


def test_what_the_command_line_and_the_network_do_not_know_is_said_in_a_document(node: LabNode) -> None:
    document = b'{"command":"allocate","args":{"uid":"u","num_ipv4":1}}'
    for arguments, words in (
        (("--netwrok", "web"), "--netwrok"),
        (("--network",), "has no value"),
        (("--network", "nowhere"), "no network 'nowhere'"),
        ((), "--network NAME"),
    ):
        code, stdout = run_program(node, document, *arguments)
        assert code == 1
        refused(json.loads(stdout), words)


def test_a_call_that_names_no_network_means_the_configured_one() -> None:
    with LabNode("node", options=("--default-network", "web")) as node:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/24")
        with module(node, network=None) as a:
            ips = isolated(a, 1, 0)
            assert node.namespace.pings(ips[0])
            a.release()
            a.cleanup()
            assert_nothing_left(node)


def test_netgroups_of_the_call_isolate(node: LabNode) -> None:
    with module(node) as red, module(node) as blue, module(node) as both:
        node.cli("network", "set", "web", "--allow-netgroup", "*")
        of = {}
        for container, netgroups in ((red, ["red"]), (blue, ["blue"]), (both, ["red", "blue"])):
            answer = container.allocate(1, 0, netgroups=netgroups)
            of[container] = answer["ipv4"]
            assert container.isolate(answer["ipv4"], netgroups) == OK
        assert both.namespace.pings(of[red][0])
        assert both.namespace.pings(of[blue][0])
        assert not red.namespace.pings(of[blue][0], wait=1)
        node.cli("network", "set", "web", "--allow-netgroup", "red")
        refused(red.allocate(1, 0, netgroups=["blue"]), "--allow-netgroup")
        for each in (red, blue, both):
            each.release()
            each.cleanup()
        assert_nothing_left(node)


def test_release_and_cleanup_without_an_agent_are_done_in_their_order_when_it_is_back(node: LabNode) -> None:
    with module(node) as a, module(node) as b:
        ips, unused = isolated(a), b.allocate(1, 1)
        node.kill()
        begun = time.monotonic()
        assert a.release() == OK
        assert a.cleanup() == OK
        assert b.release() == OK
        assert time.monotonic() - begun < 20
        assert len(spooled(node)) == 3
        node.start()
        assert spooled(node) == []
        eventually(
            lambda: not {states(node).get(ip) for ip in ips + unused["ipv4"]} & {"assigned", "allocated"}
        )
        assert_nothing_left(node)
        node.cli("ip", "check")


def test_what_was_allocated_and_isolated_is_so_after_a_restart(node: LabNode) -> None:
    with module(node) as a, module(node) as b:
        ips, waiting = isolated(a, 2, 1), b.allocate(1, 1)
        node.kill()
        node.start()
        assert a.isolate(ips) == OK
        assert b.isolate(waiting["ipv4"] + waiting["ipv6"]) == OK
        for ip in (*ips, *waiting["ipv4"], *waiting["ipv6"]):
            assert node.namespace.pings(ip)
        node.cli("ip", "check")
        for each in (a, b):
            assert each.release() == OK
            assert each.cleanup() == OK
        assert_nothing_left(node)


def test_a_container_that_dies_without_a_cleanup_ends_with_its_namespace(node: LabNode) -> None:
    with module(node) as a:
        ips = isolated(a)
        assert a.release() == OK
    eventually(lambda: not {states(node).get(ip) for ip in ips} & {"assigned", "allocated"}, within=30)
    assert_nothing_left(node)


def test_a_released_container_whose_namespace_is_held_ends_with_its_last_process(node: LabNode) -> None:
    with module(node) as a:
        ips = isolated(a)
        assert a.release() == OK
        assert node.namespace.pings(ips[0])
        a.end()  # `ip netns add` keeps the namespace
        eventually(lambda: not {states(node).get(ip) for ip in ips} & {"assigned", "allocated"}, within=60)
        assert_nothing_left(node)


def test_a_drained_node_keeps_what_was_allocated_and_allocates_no_more(node: LabNode) -> None:
    with module(node) as a, module(node) as b:
        answer = a.allocate(1, 0)
        node.cli("node", "drain", node.name, check=False)
        refused(b.allocate(1, 0), "drained")
        assert a.isolate(answer["ipv4"]) == OK
        assert a.release() == OK
        assert a.cleanup() == OK
        assert_nothing_left(node)


def test_an_operator_sees_whom_an_address_is_allocated_to_and_takes_it_away_by_force(node: LabNode) -> None:
    with module(node) as a:
        (ip,) = a.allocate(1, 0)["ipv4"]
        eventually(lambda: states(node).get(ip) == "allocated")
        assert node.ask("ip", "show", ip)["uid"] == a.uid
        assert node.ask("network", "show", "web")["pools"][0]["usage"]["allocated"] == 1
        kept = node.cli("ip", "release", ip, check=False)
        assert kept.returncode != 0
        assert a.uid in kept.stderr
        node.cli("ip", "release", ip, "--force")
        refused(a.isolate([ip]), f"{ip} is")


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def mortal(orders: Path) -> Iterator[LabNode]:
    with LabNode("node", agent=mortal_agent(orders)) as node:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16", "--pool", "fd64::/64")
        yield node


@pytest.mark.slow
@pytest.mark.parametrize("step", [*steps.ALLOCATE, *steps.ATTACH, *steps.RELEASE, *steps.DETACH])
def test_an_agent_killed_at_any_step_loses_nothing(mortal: LabNode, orders: Path, step: str) -> None:
    node = mortal
    with module(node) as a:
        with kept_running(node):
            (orders / "step").write_text(step)
            ips = isolated(a)
            assert len(ips) == 2, "a call that was carried out twice would have others"
            assert node.namespace.pings(ips[0])
            assert a.release() == OK
            assert a.cleanup() == OK
            eventually(lambda: not (orders / "step").exists(), within=30)
            time.sleep(2)  # whoever was to die has died
        eventually(lambda: spooled(node) == [])
        assert_nothing_left(node)
        node.cli("ip", "check")


@contextlib.contextmanager
def kept_running(node: LabNode) -> Iterator[None]:
    """An agent that dies is started again, until the end."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(0.1):
            if not node.is_running:
                node.start()

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()
        if not node.is_running:
            node.start()


CYCLES = 100
AT_ONCE = 16


@pytest.mark.slow
def test_a_hundred_lives_sixteen_at_a_time_with_the_agent_killed_at_random_leave_nothing(
    mortal: LabNode, orders: Path
) -> None:
    node = mortal
    seen: list[str] = []

    def live(number: int) -> None:
        with module(node, f"m{number}") as container:
            ips = isolated(container, 1 + number % 2, 1)
            seen.extend(ips)
            assert container.namespace.run("ip", "-o", "addr", "show", "eth0").stdout.count(
                "scope global"
            ) == len(ips)
            if number % 3:
                assert container.release() == OK
            if number % 10 == 5:
                container.end()
            assert container.cleanup() == OK
            assert container.release() == OK

    with kept_running(node):
        (orders / "interval").write_text("0.2 1.5")
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                lives = [pool.submit(live, number) for number in range(CYCLES)]
            for each in lives:
                each.result()
        finally:
            (orders / "interval").unlink()
            time.sleep(2)  # whoever was to die has died
    kills = (orders / "kills").read_text().splitlines()
    assert len(kills) >= 3, kills
    eventually(lambda: spooled(node) == [], within=30)
    eventually(lambda: not {"assigned", "allocated"} & set(states(node).values()), within=30)
    assert_nothing_left(node)
    assert (links(node), elements(node)) == ([], 0)
    node.cli("ip", "check")
