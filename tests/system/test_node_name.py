"""A node keeps its name, and a container is never cut off for that name's sake.

``WAYS_OUT=1`` also waits, for a minute, for a container whose address another one has. Its short twin is in
tests/isolator/test_endpoints.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ipam import keys
from ipam.records import Node
from ipam.store import open_store
from ipam.store.base import Put, Txn
from isolator.identity import boot_id
from isolator.journal import Journal
from isolator.model import EndpointState
from moorage.lab import Container, LabNode
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel


@dataclass
class Scene:
    """node: called vnode, stopped; its container lives, with ``ip``."""

    node: LabNode
    container: Container
    ip: str

    @property
    def journal(self) -> contextlib.closing[Journal]:
        return contextlib.closing(Journal(self.node.state_dir / "journal.db", boot_id()))

    def holder(self) -> tuple[str, str]:
        """Node and container that the store says the address is of."""
        (row,) = [r for r in self.node.ask("ip", "list", "--state", "assigned") if r["address"] == self.ip]
        return row["node"], row["container_id"]

    def state(self) -> list[str]:
        return [endpoint["state"] for endpoint in self.node.ask("endpoint", "list")]


@pytest.fixture(scope="module")
def running() -> Iterator[Scene]:
    with LabNode("vnode") as node, node.container() as container:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16")
        ip = container.add("web").ips[4]
        eventually(lambda: node.ask("status")["outbox"] == 0)
        node.stop()
        yield Scene(node, container, ip)


@pytest.fixture
def scene(running: Scene) -> Iterator[Scene]:
    """Each test finds the node as another left it, and has it back under its first name."""
    yield running
    running.node.stop()


def refusal(node: LabNode) -> str:
    node.launch()
    eventually(lambda: not node.is_running)
    return node.log.read_text()


def test_an_agent_that_is_given_another_name_refuses_to_start_and_says_how_to_rename(scene: Scene) -> None:
    scene.node.name = "renamed"
    said = refusal(scene.node)
    assert "is node vnode's, and this agent was told to be node renamed" in said
    assert "moorage node drain vnode" in said
    scene.node.name = "vnode"
    scene.node.start()
    assert (scene.state(), scene.holder()) == (["attached"], ("vnode", scene.container.id))
    assert scene.node.namespace.pings(scene.ip)


def forget_the_name(scene: Scene) -> None:
    """As an earlier version left it: neither journal nor node record say whose they are."""
    with scene.journal as journal:
        journal.save_node("")
        journal.save_window("")
        journal.drop_addresses([row.ip for row in journal.load_addresses()])
        journal.save_confirmed_seq(0)
        for endpoint in journal.load_endpoints():
            journal.save_endpoint(replace(endpoint, state=EndpointState.CONFLICT))


async def forget_the_machine(node: LabNode) -> None:
    store = await open_store(node.store)
    try:
        key = keys.NODES + "vnode"
        kv = await store.get(key)
        assert kv is not None
        record = Node.decode(key, kv.value).with_(machine_id="", state_id="")
        await store.txn(Txn((), (Put(key, record.encode()),)))
    finally:
        await store.close()


def nothing(_: LabNode) -> None:
    """Only the agent is started again."""


def go_back(node: LabNode) -> None:
    node.name = "vnode"


def adopt(node: LabNode) -> None:
    node.cli("node", "adopt", "vnode")


def remove(node: LabNode) -> None:
    node.cli("node", "remove", "vnode", "--force", "--yes", "vnode")


@pytest.mark.parametrize("way", [nothing, go_back, adopt, remove])
async def test_a_container_that_an_earlier_version_cut_off_for_a_new_name_is_connected_again(
    scene: Scene, way: Callable[[LabNode], None]
) -> None:
    forget_the_name(scene)
    await forget_the_machine(scene.node)
    scene.node.name = "renamed"
    way(scene.node)
    scene.node.start()
    eventually(lambda: scene.state() == ["attached"])
    assert scene.holder() == (scene.node.name, scene.container.id)
    assert scene.node.namespace.pings(scene.ip)
    assert scene.node.ask("status")["conflicts"] == []


def rename(scene: Scene, name: str) -> None:
    """The name that its agent had before is known by the ids in the store alone."""
    with scene.journal as journal:
        journal.save_node(name)
    scene.node.name = name


def test_a_container_whose_address_stands_under_an_earlier_name_of_its_machine_is_not_cut_off(
    scene: Scene,
) -> None:
    rename(scene, "renamed")
    pinged = scene.node.namespace.start("ping", "-n", "-q", "-i", "0.1", "-c", "50", scene.ip, stdout=-1)
    scene.node.start()
    eventually(lambda: scene.holder() == ("renamed", scene.container.id))
    stdout, _ = pinged.communicate()
    assert b" 0% packet loss" in stdout, stdout.decode()
    assert scene.state() == ["attached"]
    assert "CONFLICT" not in scene.node.log.read_text()


def test_a_name_that_the_machine_had_before_and_has_again_gets_back_what_stands_under_another_one(
    scene: Scene,
) -> None:
    """Under the other name more was written, so the store seems to have forgotten what this one wrote, and is doubted
    as well; and nobody looks at it under the other name any more."""
    for name, writes in (("again", 0), ("between", 1000), ("again", 1000)):
        rename(scene, name)
        with scene.journal as journal:
            journal.save_confirmed_seq(writes)
        scene.node.start()
        eventually(lambda name=name: scene.holder() == (name, scene.container.id))
        assert scene.state() == ["attached"]
        assert "CONFLICT" not in scene.node.log.read_text()
        scene.node.stop()


# -- another machine that has the name

OTHER_MACHINE = {"BOOT": "1" * 8 + "-1111-1111-1111-" + "1" * 12, "MACHINE": "b" * 32, "LEFT_OVER": "1"}
SAME_MACHINE = {"LEFT_OVER": "1"}


@pytest.fixture
def owner() -> Iterator[Scene]:
    """Its agent runs, and two containers live."""
    with LabNode("vnode") as node, node.container() as container, node.container() as second:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16")
        ip = container.add("web").ips[4]
        second.add("web")
        eventually(lambda: node.ask("status")["outbox"] == 0)
        yield Scene(node, container, ip)


@pytest.fixture
def other(owner: Scene) -> Iterator[LabNode]:
    agent = (sys.executable, str(Path(__file__).with_name("other_machine_agent.py")), "agent")
    with LabNode("vnode", agent=agent, store=owner.node.store) as node:
        yield node


def stands(owner: Scene) -> bool:
    """Whether the store has the address of the living container as its, and the container answers on it."""
    return owner.holder() == ("vnode", owner.container.id) and owner.node.namespace.pings(owner.ip)


@pytest.mark.parametrize("has_copy", [False, True], ids=["empty state", "copied state"])
def test_an_agent_that_was_refused_a_name_does_not_take_it_while_its_owner_is_restarted(
    owner: Scene, other: LabNode, has_copy: bool
) -> None:
    if has_copy:
        owner.node.stop()
        shutil.copytree(owner.node.state_dir, other.state_dir)
        owner.node.start()
    other.start(**OTHER_MACHINE)
    eventually(lambda: "does not take the name" in other.ask("status")["problem"])
    owner.node.stop()
    time.sleep(4)  # it tries every two
    owner.node.start()
    eventually(lambda: owner.node.ask("status")["problem"] == "")
    assert owner.state() == ["attached", "attached"]
    assert stands(owner)
    assert "moorage node adopt vnode" in other.ask("status")["problem"]


@pytest.mark.parametrize(
    ("has_copy", "where"),
    [(True, OTHER_MACHINE), (False, OTHER_MACHINE), (False, SAME_MACHINE)],
    ids=["copied state on another machine", "another machine", "another namespace and a new journal"],
)
def test_what_lives_where_an_agent_cannot_see_it_is_a_question_when_that_takes_the_name(
    owner: Scene, other: LabNode, has_copy: bool, where: dict[str, str]
) -> None:
    owner.node.stop()
    if has_copy:
        shutil.copytree(owner.node.state_dir, other.state_dir)
    other.start(**where)
    eventually(lambda: other.ask("status")["in_sync"])
    assert "all 2 containers" in other.ask("status")["missing"]
    assert stands(owner)
    other.kill()
    other.start(**where)
    eventually(lambda: other.ask("status")["in_sync"])
    status = other.ask("status")
    assert "all 2 containers" in status["missing"]
    assert status["identity"] == []
    other.stop()
    owner.node.start()
    eventually(lambda: owner.state() == ["attached", "attached"])
    assert stands(owner)


def test_an_operator_ends_the_containers_of_the_machine_that_was_replaced(
    owner: Scene, other: LabNode
) -> None:
    owner.node.stop()
    owner.node.switch_off()
    other.start(**OTHER_MACHINE)
    eventually(lambda: other.ask("status")["in_sync"])
    assert "node vnode was another machine" in other.ask("status")["identity"][0]
    other.cli("endpoint", "missing", "--release")
    assert other.ask("status")["missing"] == ""
    eventually(lambda: not other.ask("ip", "list", "--state", "assigned"))


HASTY = Path(__file__).parent.parent / "cluster" / "hasty_agent.py"


@pytest.mark.skipif(not os.environ.get("WAYS_OUT"), reason="a removed node takes nothing new for 30 s")
def test_a_container_that_is_cut_off_is_connected_again_when_the_other_one_has_ended() -> None:
    agent = (sys.executable, str(HASTY), "agent")
    with (
        LabNode("n1", agent=agent) as first,
        LabNode("n2", agent=agent, store=first.store) as second,
        first.container() as robbed,
        second.container() as taker,
    ):
        first.start()
        first.cli("network", "create", "web", "--pool", "10.64.0.0/16", "--allow-static", "all")
        ip = robbed.add("web").ips[4]
        eventually(lambda: first.ask("status")["outbox"] == 0)
        first.stop()
        second.start()
        second.cli("node", "remove", "n1", "--force", "--yes", "n1")
        assert taker.add("web", labels={"moorage.ip": ip}).exit == 0
        eventually(lambda: second.ask("status")["outbox"] == 0)
        first.start()
        eventually(lambda: first.ask("status")["conflicts"])
        eventually(lambda: f"container {taker.id}" in first.ask("status")["cut_off"][0])
        assert not first.namespace.pings(ip, wait=1)
        assert taker.delete("web").exit == 0
        eventually(lambda: first.namespace.pings(ip, wait=1))
        assert [e["state"] for e in first.ask("endpoint", "list")] == ["attached"]
        (row,) = [r for r in first.ask("ip", "list", "--state", "assigned") if r["address"] == ip]
        assert (row["node"], row["container_id"]) == ("n1", robbed.id)
