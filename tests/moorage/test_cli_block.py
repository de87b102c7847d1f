"""``moorage block`` on a real store; with a real agent: tests/system/test_nodes.py."""

from __future__ import annotations

import pytest

from ipam import keys
from ipam.records import Block
from ipam.store import Put, Store, Txn
from tests.moorage.conftest import CommandLine


async def a_block(store: Store) -> None:
    record = Block(pool="10.64.0.0-24", size=26, node="a", claimed_at=1.0)
    await store.txn(Txn(then=(Put(keys.BLOCKS + "4/0a400040", record.encode()),)))


@pytest.fixture
def filled(moorage: CommandLine) -> CommandLine:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    moorage.on_store(a_block)
    return moorage


def test_blocks_are_listed(filled: CommandLine) -> None:
    (row,) = filled.json("block", "list", "--node", "a", "--pool", "10.64.0.0/24")
    assert row == {
        "block": "10.64.0.64/26",
        "pool": "10.64.0.0-24",
        "node": "a",
        "allocated": 0,
        "assigned": 0,
        "warm": 0,
        "cooling": 0,
        "others": 0,
        "free": 64,
        "since": 1.0,
    }
    assert filled.ok("block", "list").split()[:3] == ["BLOCK", "NODE", "POOL"]
    assert "there is no node 'b'" in filled.fails("block", "list", "--node", "b")


def test_a_block_of_a_node_that_is_away_is_not_released(filled: CommandLine) -> None:
    assert "moorage node remove a" in filled.fails("block", "release", "10.64.0.64/26")
    assert "no node has claimed" in filled.fails("block", "release", "10.64.0.0/26")
    assert "is no block" in filled.fails("block", "release", "10.64.0.65/26")
