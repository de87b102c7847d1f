"""How often other firewalls are looked at, and what is said of them when."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import cast

import pytest
from structlog.testing import capture_logs

from isolator import foreign_firewalls
from isolator.foreign_firewalls import SHARE, ForeignFirewalls
from isolator.kernel import Kernel
from isolator.policy.docker_user import Edit, Line
from isolator.policy.foreign import Blocked
from isolator.policy.look import Look
from isolator.policy.others import Chain

FORWARD = Chain("ip", "filter", "FORWARD")
USER = Chain("ip", "filter", "DOCKER-USER")
POLICY = Blocked(FORWARD, "its policy is drop", ("iptables-nft …",))
NOTHING = Look((), frozenset(), (), (), "", 0.0)
OPENED = Edit(USER, (), (Line("iifname", "mrg*", "accept"),), None)


@dataclass
class FakeKernel:
    """A kernel of which a test says what is in it."""

    found: Look = NOTHING
    changes: int = 0
    asked: list[bool] = field(default_factory=list)

    async def changes_of_others(self) -> int:
        return self.changes

    async def look_at_firewalls(self, *, wants_accepts: bool) -> Look:
        self.asked.append(wants_accepts)
        return self.found

    def becomes(self, found: Look) -> None:
        self.changes += 1
        self.found = found


class Scene:
    """The watch, with seconds that are short. containers: whether the node has any."""

    def __init__(self, *, manages: bool = True) -> None:
        self.kernel = FakeKernel()
        self.containers = True
        self.watch = ForeignFirewalls(cast("Kernel", self.kernel), lambda: self.containers, manages=manages)

    async def seconds(self, number: int = 3) -> list[str]:
        """What is logged in that many seconds."""
        with capture_logs() as logs:
            task = asyncio.create_task(self.watch.run())
            await asyncio.sleep(number * foreign_firewalls.LOOK_EVERY)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return [line["event"] for line in logs]

    @property
    def told(self) -> list[str]:
        return [f"{row['chain']}: {row['why']}" for row in self.watch.status()["firewalls"]]


@pytest.fixture(autouse=True)
def _short_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_firewalls, "LOOK_EVERY", 0.02)


async def test_nothing_is_read_while_nobody_else_changes_a_rule() -> None:
    scene = Scene()
    await scene.seconds(5)
    assert scene.kernel.asked == [True]
    scene.kernel.changes += 1
    await scene.seconds(5)
    assert scene.kernel.asked == [True, True]


async def test_looks_take_no_more_than_their_share_of_the_time() -> None:
    scene = Scene()
    scene.kernel.becomes(replace(NOTHING, seconds=60 * SHARE))
    await scene.seconds(2)
    scene.kernel.changes += 1
    await scene.seconds(5)
    assert len(scene.kernel.asked) == 1, "the next one comes after a minute"


async def test_a_drop_is_told_when_it_begins_changes_and_ends() -> None:
    scene = Scene()
    scene.kernel.becomes(replace(NOTHING, blocked=(POLICY,)))
    assert await scene.seconds() == ["another firewall drops containers' traffic"]
    assert scene.told == ["chain FORWARD of table ip filter: its policy is drop"]
    scene.kernel.changes += 1
    assert await scene.seconds() == [], "it is as it was"
    scene.kernel.becomes(replace(NOTHING, blocked=(replace(POLICY, why="a rule in it would drop it"),)))
    assert await scene.seconds() == ["another firewall drops containers' traffic"]
    scene.kernel.becomes(NOTHING)
    assert await scene.seconds() == ["another firewall lets containers' traffic pass again"]
    assert scene.told == []


async def test_dockers_policy_is_no_trouble_while_there_are_no_containers() -> None:
    scene = Scene()
    scene.containers = False
    scene.kernel.becomes(replace(NOTHING, blocked=(POLICY,), waiting=frozenset([FORWARD])))
    assert await scene.seconds() == []
    assert (scene.told, scene.kernel.asked) == ([], [False])
    scene.containers = True
    scene.kernel.found = replace(NOTHING, ours=(USER,), edited=(OPENED,))
    assert len(await scene.seconds()) == 1
    assert scene.kernel.asked == [False, True]
    assert scene.watch.status()["docker_user"] == {"managed": True, "chains": [str(USER)]}


async def test_the_first_container_does_not_wait_for_the_next_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_firewalls, "LOOK_EVERY", 60.0)
    scene = Scene()
    scene.containers = False
    task = asyncio.create_task(scene.watch.run())
    await asyncio.sleep(0.05)
    scene.containers = True
    scene.watch.containers_came()
    await asyncio.sleep(0.05)
    task.cancel()
    assert scene.kernel.asked == [False, True]


async def test_an_administrator_who_keeps_the_chain_is_told_of_the_policy() -> None:
    scene = Scene(manages=False)
    scene.kernel.becomes(replace(NOTHING, blocked=(POLICY,), waiting=frozenset([FORWARD])))
    await scene.seconds()
    assert scene.kernel.asked == [False]
    assert len(scene.told) == 1


async def test_what_is_refused_is_tried_again_and_told_once() -> None:
    scene = Scene()
    scene.kernel.becomes(
        replace(NOTHING, blocked=(POLICY,), waiting=frozenset([FORWARD]), refused="could not: no")
    )
    events = await scene.seconds(5)
    assert events == ["Docker's policy cannot be passed", "another firewall drops containers' traffic"]
    assert scene.told == ["chain FORWARD of table ip filter: its policy is drop; could not: no"]
    assert len(scene.kernel.asked) > 1
