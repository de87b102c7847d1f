"""Whose a node's name is: restarted, replaced and cloned machines, and copies of state directories."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ipam.namesakes as namesakes_module
from ipam import keys, writer
from ipam.errors import Fenced
from ipam.namesakes import Identity, Namesakes
from ipam.nodes import adopt_node
from ipam.records import Alive
from ipam.records import Node as NodeRecord
from ipam.store import Store
from ipam.store.base import Delete, Put, Txn
from tests.ipam.nodes import Node

MACHINE, OTHER = "1" * 32, "2" * 32


async def started(path: Path, store: Store, boot: str = "boot-1", machine: str = MACHINE) -> Node:
    """A node n1 whose journal is at ``path``, serving."""
    path.mkdir(exist_ok=True)
    node = Node(path, store, "n1", boot_id=boot, machine_id=machine)
    await node.start()
    await node.join()
    return node


async def ended(node: Node) -> None:
    """Its agent is stopped, and its sign of life is gone."""
    await node.crash()
    await node.membership.leave()
    # It may have been given twice, on a lease each.
    await node.store.txn(Txn((), (Delete(keys.ALIVE + node.name),)))


def copied(before: Path, after: Path) -> Path:
    shutil.copytree(before, after)
    return after


async def test_an_agent_that_is_killed_and_started_again_has_no_namesake(
    store: Store, tmp_path: Path
) -> None:
    node = await started(tmp_path / "a", store)
    await node.crash()
    node = await started(tmp_path / "a", store)
    await ended(node)
    node = await started(tmp_path / "a", store, boot="boot-2")
    assert node.namesakes.told == []
    await ended(node)


async def test_a_machine_that_lost_its_journal_takes_its_name_over(store: Store, tmp_path: Path) -> None:
    first = await started(tmp_path / "a", store)
    assert not first.namesakes.lost_journal
    await ended(first)
    node = await started(tmp_path / "b", store)
    assert (node.namesakes.told, node.namesakes.lost_journal) == ([], True)
    await ended(node)


async def test_a_machine_that_replaces_another_has_its_name_and_says_so(store: Store, tmp_path: Path) -> None:
    await ended(await started(tmp_path / "a", store))
    node = await started(tmp_path / "b", store, boot="boot-2", machine=OTHER)
    assert "node n1 was another machine" in node.namesakes.told[0]
    assert not node.namesakes.lost_journal
    await ended(node)


@pytest.mark.parametrize(
    ("machine", "what"), [(MACHINE, "state directory and machine id"), (OTHER, "state directory:")]
)
async def test_a_clone_is_refused_beside_its_living_original_and_told_what_to_do(
    store: Store, tmp_path: Path, machine: str, what: str
) -> None:
    original = await started(tmp_path / "a", store)
    clone = Node(copied(tmp_path / "a", tmp_path / "b"), store, "n1", boot_id="boot-2", machine_id=machine)
    clone.load()
    with pytest.raises(Fenced, match="one of the two is a clone") as refused:
        await clone.holder.sync()
    assert f"a copy of this machine's {what}" in str(refused.value)
    assert clone.namesakes.told == [str(refused.value)]
    clone.journal.close()
    await ended(original)


async def test_a_clone_that_was_refused_for_long_does_not_take_the_name_by_itself(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namesakes_module, "LEFT_OVER", 0.0)
    original = await started(tmp_path / "a", store)
    clone = Node(copied(tmp_path / "a", tmp_path / "b"), store, "n1", boot_id="boot-2", machine_id=MACHINE)
    clone.load()
    for _ in range(3):
        with pytest.raises(Fenced):
            await clone.holder.sync()
    await ended(original)
    await store.txn(Txn((), (Delete(keys.ALIVE + "n1"),)))
    with pytest.raises(Fenced, match="does not take the name"):
        await clone.holder.sync()
    clone.journal.close()
    clone.load()  # restarted
    await clone.holder.sync()
    clone.journal.close()


@pytest.mark.parametrize(
    ("boot", "machine", "copies"),
    [("boot-2", OTHER, False), ("boot-2", OTHER, True), ("boot-1", MACHINE, False)],
    ids=["another machine", "a copied journal", "a lost journal"],
)
async def test_what_an_agent_cannot_know_the_end_of_may_live_until_it_is_settled(
    store: Store, tmp_path: Path, boot: str, machine: str, copies: bool
) -> None:
    await ended(await started(tmp_path / "a", store))
    if copies:
        copied(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b").mkdir(exist_ok=True)
    node = Node(tmp_path / "b", store, "n1", boot_id=boot, machine_id=machine)
    node.load()
    await node.namesakes.look()
    assert (node.namesakes.elsewhere, node.namesakes.lost_in_this_boot) == (
        machine == OTHER,
        machine == MACHINE,
    )
    await node.holder.sync()
    assert (node.namesakes.elsewhere, node.namesakes.lost_in_this_boot) == (False, False)
    node.journal.close()


async def test_what_ended_with_its_boot_or_was_given_up_by_an_operator_does_not_live(
    store: Store, tmp_path: Path
) -> None:
    await ended(await started(tmp_path / "a", store))
    rebooted = await started(tmp_path / "a", store, boot="boot-2")
    assert not rebooted.namesakes.elsewhere
    await ended(rebooted)
    await adopt_node(store, "n1", force=False)
    (tmp_path / "b").mkdir()
    other = Node(tmp_path / "b", store, "n1", boot_id="boot-3", machine_id=OTHER)
    other.load()
    await other.namesakes.look()
    assert not other.namesakes.elsewhere
    other.journal.close()


async def test_a_clone_that_is_gone_is_not_said_to_run_any_more(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHOWS_WITHIN", 0.0)
    await ended(await started(tmp_path / "a", store))
    original = Node(tmp_path / "a", store, "n1", boot_id="boot-1", machine_id=MACHINE)
    original.load()
    await original.holder.sync()
    clone = await started(copied(tmp_path / "a", tmp_path / "b"), store, boot="boot-2")
    with pytest.raises(Fenced, match="one of the two is a clone"):
        await original.holder.sync()
    (now,) = original.namesakes.told
    assert "one of the two is a clone" in now
    await ended(clone)
    await original.holder.sync()
    (before,) = original.namesakes.told
    assert before.startswith("an agent with a copy of this state directory"), "that is so, and was before"
    original.journal.close()


async def test_nothing_is_said_of_a_clone_that_never_had_the_name(store: Store, tmp_path: Path) -> None:
    original = await started(tmp_path / "a", store)
    clone = Node(copied(tmp_path / "a", tmp_path / "b"), store, "n1", boot_id="boot-2", machine_id=MACHINE)
    clone.load()
    with pytest.raises(Fenced, match="one of the two is a clone"):
        await clone.holder.sync()
    clone.journal.close()
    assert original.namesakes.told == []
    await ended(original)


async def test_an_empty_machine_from_the_same_image_is_told_of_the_machine_id(
    store: Store, tmp_path: Path
) -> None:
    original = await started(tmp_path / "a", store)
    other = Node(tmp_path, store, "n1", boot_id="boot-2", machine_id=MACHINE)
    other.load()
    with pytest.raises(Fenced, match="a machine with this one's machine id"):
        await other.holder.sync()
    other.journal.close()
    await ended(original)


async def test_clones_that_run_in_turn_are_told(store: Store, tmp_path: Path) -> None:
    await ended(await started(tmp_path / "a", store))
    copied(tmp_path / "a", tmp_path / "b")
    await ended(await started(tmp_path / "b", store, boot="boot-2"))
    back = await started(tmp_path / "a", store)
    assert "a copy of this state directory" in back.namesakes.told[0]
    await ended(back)
    again = await started(tmp_path / "b", store, boot="boot-2")
    assert "a copy of this state directory" in again.namesakes.told[0]
    await ended(again)


async def test_an_agent_that_died_before_it_had_the_name_is_no_namesake(store: Store, tmp_path: Path) -> None:
    await ended(await started(tmp_path / "a", store))
    died = Node(tmp_path / "a", store, "n1", machine_id=MACHINE)
    died.load()
    died.journal.close()
    node = await started(tmp_path / "a", store)
    assert node.namesakes.told == []
    await ended(node)


# -- whether a node of the store is this machine

ME = Identity(machine_id=MACHINE, state_id="state")


@pytest.mark.parametrize(
    ("fields", "is_this"),
    [
        ({"machine_id": MACHINE, "state_id": "another"}, True),
        ({"machine_id": OTHER, "state_id": "state"}, True),
        ({"machine_id": OTHER, "state_id": "another"}, False),
        ({"state_id": "another"}, False),
        ({"underlay": ["192.0.2.1", "fe80::1"]}, True),
        ({"underlay": ["192.0.2.2"]}, False),
        ({}, True),
    ],
)
async def test_this_machine_is_known_by_its_ids_or_by_its_address(
    store: Store, fields: dict[str, object], is_this: bool
) -> None:
    record = NodeRecord(name="before", version="1").with_(**fields)
    await store.txn(Txn((), (Put(keys.NODES + "before", record.encode()),)))
    assert await Namesakes(store, "n1", ME, lambda: ["192.0.2.1"]).is_this_machine("before") is is_this


async def test_a_sign_of_life_is_doubted_for_as_long_as_it_may_be_left_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = NodeRecord(name="before", version="1", machine_id=MACHINE)
    alive = Alive(instance="i", boot_id="b")
    await store.txn(
        Txn((), (Put(keys.NODES + "before", record.encode()), Put(keys.ALIVE + "before", alive.encode())))
    )
    namesakes = Namesakes(store, "n1", ME)
    assert await namesakes.is_this_machine("before") is None
    monkeypatch.setattr(namesakes_module, "LEFT_OVER", 0.0)
    assert await namesakes.is_this_machine("before") is False
