"""``moorage node`` on a real store; with real agents: tests/system/test_nodes.py."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from click.testing import CliRunner

from ipam import keys
from ipam.records import Address, AddressState, Alive, Block, Fence, Node
from ipam.store import Put, Store, Txn, read_prefix
from moorage.cli import cli
from tests.moorage.conftest import CommandLine


async def a_node(store: Store) -> None:
    """n1 has one address of each state, and a block; its agent does not run."""
    node = Node(name="n1", version="1.0", underlay=["192.0.2.1"], mtu=1500, features=["routed"], since=1.0)
    puts = [
        Put(keys.NODES + "n1", node.encode()),
        Put(keys.WRITERS + "n1", Fence(instance="i", boot_id="b", seq=7).encode()),
        Put(
            keys.BLOCKS + "4/0a400000",
            Block(pool="10.64.0.0-24", size=26, node="n1", claimed_at=0.0).encode(),
        ),
    ]
    for number, state in enumerate(AddressState, start=5):
        record = Address(pool="10.64.0.0-24", state=state, node="n1", network="web")
        puts.append(Put(keys.address_key(ip_address(f"10.64.0.{number}")), record.encode()))
    await store.txn(Txn(then=tuple(puts)))


async def its_agent_runs(store: Store) -> None:
    await store.txn(Txn(then=(Put(keys.ALIVE + "n1", Alive(instance="i", boot_id="b").encode()),)))


async def nothing_of_it_is_left(store: Store) -> None:
    for prefix in (keys.NODES, keys.WRITERS, keys.BLOCKS, keys.ADDRESSES):
        assert (await read_prefix(store, prefix))[0] == []


@pytest.fixture
def with_node(moorage: CommandLine) -> CommandLine:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    moorage.on_store(a_node)
    return moorage


def test_show_has_facts_fence_blocks_and_addresses(with_node: CommandLine) -> None:
    assert with_node.json("node", "show", "n1") == {
        "name": "n1",
        "alive": False,
        "drained": False,
        "version": "1.0",
        "underlay": ["192.0.2.1"],
        "mtu": 1500,
        "features": ["routed"],
        "mesos_agent": "",
        "instance": "",
        "boot_id": "",
        "fence": 7,
        "since": 1.0,
        "blocks": ["10.64.0.0/26"],
        "surroundings": [],
        "addresses": [
            {"network": "web", "family": 4, "state": state, "count": 1}
            for state in ("allocated", "assigned", "cooling", "warm")
        ],
    }
    assert "NETWORK  FAMILY  STATE      COUNT" in with_node.ok("node", "show", "n1")


def test_list_says_who_is_drained(with_node: CommandLine) -> None:
    (row,) = with_node.json("node", "list")
    assert (row["name"], row["alive"], row["drained"], row["blocks"]) == ("n1", False, False, 1)


def test_an_unknown_node_names_the_known(with_node: CommandLine) -> None:
    for command in (("show",), ("drain",), ("remove",), ("remove", "--force"), ("adopt",)):
        assert "there is no node 'n2' (known: n1)" in with_node.fails("node", *command, "n2")


def test_a_node_whose_agent_is_away_cannot_be_drained(with_node: CommandLine) -> None:
    assert "the agent of node n1 is not running" in with_node.fails("node", "drain", "n1")


def test_removing_a_node_that_may_use_addresses_names_counts_and_the_way_out(with_node: CommandLine) -> None:
    said = with_node.fails("node", "remove", "n1")
    assert "1 assigned, 1 warm" in said
    assert "--force" in said


def test_a_forced_removal_warns_asks_for_the_name_and_says_what_it_freed(with_node: CommandLine) -> None:
    result = CliRunner().invoke(cli, ["node", "remove", "n1", "--force"], input="n1\n", prog_name="moorage")
    assert result.exit_code == 0, result.output
    assert (
        "This frees 1 allocated, 1 assigned, 1 cooling, 1 warm addresses and 1 blocks of node n1"
        in result.stderr
    )
    assert "fenced" in result.stderr
    assert "cut off" in result.stderr
    assert (
        result.stdout.strip()
        == "node n1 removed; freed 1 allocated, 1 assigned, 1 cooling, 1 warm addresses and 1 blocks"
    )
    with_node.on_store(nothing_of_it_is_left)


@pytest.mark.parametrize("answer", ["n2\n", "\n", "y\n"])
def test_another_name_changes_nothing(with_node: CommandLine, answer: str) -> None:
    result = CliRunner().invoke(cli, ["node", "remove", "n1", "--force"], input=answer, prog_name="moorage")
    assert result.exit_code == 1
    assert "nothing was changed" in result.stderr
    assert with_node.json("node", "show", "n1")["fence"] == 7


def test_scripts_name_it_with_yes(with_node: CommandLine) -> None:
    assert "nothing was changed" in with_node.fails("node", "remove", "n1", "--force", "--yes", "n2")
    assert with_node.json("node", "remove", "n1", "--force", "--yes", "n1") == {
        "name": "n1",
        "removed": True,
        "addresses": {"allocated": 1, "assigned": 1, "cooling": 1, "warm": 1},
        "blocks": 1,
    }


def test_a_living_node_is_not_removed_by_force(with_node: CommandLine) -> None:
    with_node.on_store(its_agent_runs)
    said = with_node.fails("node", "remove", "n1", "--force", "--yes", "n1")
    assert "the agent of node n1 is running" in said
    assert "moorage node drain n1" in said


def test_the_name_of_a_node_that_is_away_is_adopted_unasked(with_node: CommandLine) -> None:
    assert with_node.json("node", "adopt", "n1") == {"name": "n1", "adopted": True, "was_alive": False}


def test_the_name_of_a_living_node_is_adopted_after_it_was_said_again(with_node: CommandLine) -> None:
    with_node.on_store(its_agent_runs)
    assert "nothing was changed" in with_node.fails("node", "adopt", "n1", "--yes", "n2")
    assert with_node.json("node", "adopt", "n1", "--yes", "n1")["was_alive"] is True
    assert with_node.json("node", "show", "n1")["alive"] is False
