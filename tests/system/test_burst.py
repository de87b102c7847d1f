"""Many containers at once, and an agent that dies all the time: nothing lost, nothing given twice."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from isolator import steps
from moorage.lab import Answer, Container, LabNode
from moorage.lab.mortal import command as mortal_agent
from tests.system.conftest import assert_nothing_left, eventually, links

pytestmark = [pytest.mark.kernel, pytest.mark.slow]

AT_ONCE = 16


@contextlib.contextmanager
def containers(node: LabNode, count: int) -> Iterator[list[Container]]:
    made = [node.container("burst") for _ in range(count)]
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda c: c.namespace.create(), made))
        yield made
    finally:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda c: c.namespace.delete(), made))


def all_at_once(call: Callable[[Container], Answer], everyone: Sequence[Container]) -> list[Answer]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(call, everyone))


def assert_all_distinct(answers: Sequence[Answer]) -> None:
    refused = [answer for answer in answers if answer.exit != 0]
    assert not refused, f"{len(refused)} ADDs failed, the first: {refused[0].stdout}"
    for family in (4, 6):
        ips = [answer.ips[family] for answer in answers]
        assert len(set(ips)) == len(ips)


def assert_all_deleted(answers: Sequence[Answer]) -> None:
    assert [a for a in answers if (a.exit, a.stdout) != (0, "")] == []


def add_and_delete(
    node: LabNode, count: int, calm: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
) -> None:
    """ADDs, a look, DELs, a look; the looks are taken under ``calm``."""
    with containers(node, count) as everyone:
        added = all_at_once(lambda c: c.add("web"), everyone)
        assert_all_distinct(added)
        with calm():
            look_at(node, everyone, added)
        assert_all_deleted(all_at_once(lambda c: c.delete("web"), everyone))
        with calm():
            assert_nothing_left(node)


def look_at(node: LabNode, everyone: Sequence[Container], added: Sequence[Answer]) -> None:
    assigned = {ip for answer in added for ip in answer.ips.values()}
    eventually(lambda: {row["address"] for row in node.ask("ip", "list", "--state", "assigned")} == assigned)
    for container, answer in random.sample(list(zip(everyone, added, strict=True)), 10):
        for family, ip in answer.ips.items():
            assert node.namespace.pings(ip)
            assert ip in container.namespace.run("ip", f"-{family}", "addr", "show", "eth0").stdout


def test_200_adds_and_dels_with_8_warm_all_succeed_with_distinct_addresses(node: LabNode) -> None:
    add_and_delete(node, 200)
    assert node.cli("ip", "check").returncode == 0


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[tuple[LabNode, Path]]:
    """A node whose agent dies where ``tmp_path`` says, and is started again at once."""
    with LabNode("mortal", agent=mortal_agent(tmp_path)) as node:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16", "--pool", "fd64::/64")
        ending = threading.Event()

        def restart() -> None:
            while not ending.wait(0.02):
                if not node.is_running:
                    node.launch()

        restarter = threading.Thread(target=restart)
        restarter.start()
        try:
            yield node, tmp_path
        finally:
            ending.set()
            restarter.join()


def kills(directory: Path) -> list[tuple[str, int]]:
    """(where, requests under way) of every death."""
    file = directory / "kills"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def lives_on(node: LabNode) -> bool:
    """Whether the agent serves, and is still the same after a while: who is about to die is so by then."""
    before = node.agent.pid
    time.sleep(0.5)
    return node.answers() and node.agent.pid == before


def test_kill_9_at_random_moments_of_a_burst_changes_nothing(
    mortal: tuple[LabNode, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    node, directory = mortal
    seed = random.randrange(1 << 32)
    random.seed(seed)
    begun = time.monotonic()
    node.ask("status")  # takes about what an agent's start does
    lives = f"0.005 {max(0.2, (time.monotonic() - begun) / 3):.3f}"
    interval = directory / "interval"
    interval.write_text(lives)

    @contextlib.contextmanager
    def calm() -> Iterator[None]:
        """Nobody is killed for a while."""
        interval.unlink()
        eventually(lambda: lives_on(node))
        yield
        interval.write_text(lives)

    rounds = 0
    while sum(count > 0 for _, count in kills(directory)) < 30:
        rounds += 1
        assert rounds <= 6, f"too few kills inside a request after {rounds} rounds: {kills(directory)}"
        add_and_delete(node, 200, calm)
    inside = sum(count > 0 for _, count in kills(directory))
    with capsys.disabled():
        print(f"\n  {len(kills(directory))} kills, {inside} of them inside a request, seed {seed}")
    assert inside >= 30


@pytest.mark.parametrize("step", steps.ATTACH)
def test_an_agent_killed_at_any_step_of_add_completes_it_when_it_is_back(
    mortal: tuple[LabNode, Path], step: str
) -> None:
    node, directory = mortal
    (directory / "step").write_text(step)
    with node.container() as container, node.container() as peer:
        ips = container.add("web").ips
        assert kills(directory) == [(step, 1)]
        peer.add("web")
        assert peer.namespace.pings(ips[4])
        assert peer.namespace.pings(ips[6])
        for each in (container, peer):
            assert each.delete("web").exit == 0
        assert_nothing_left(node)
    node.cli("ip", "check")


@pytest.mark.parametrize("step", steps.DETACH)
def test_an_agent_killed_at_any_step_of_del_completes_it_when_it_is_back(
    mortal: tuple[LabNode, Path], step: str
) -> None:
    node, directory = mortal
    with node.container() as container:
        container.add("web")
        mortal_pid = node.agent.pid
        (directory / "step").write_text(step)
        answer = container.delete("web")
        assert (answer.exit, answer.stdout) == (0, "")
        eventually(lambda: kills(directory))
        assert kills(directory)[0][0] == step
        eventually(lambda: node.agent.pid != mortal_pid and node.answers())
        assert_nothing_left(node)
        assert links(node) == []
    node.cli("ip", "check")
