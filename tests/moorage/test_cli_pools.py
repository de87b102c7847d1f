"""``moorage network`` and pools over the nodes' own networks."""

from __future__ import annotations

import json

import pytest

from ipam import keys
from ipam.records import Node
from ipam.store import Put, Store, Txn
from tests.moorage.conftest import CommandLine

LAN = (
    "address 10.50.0.3 eth0",
    "connected 10.50.0.0/29 eth0",
    "gateway 10.50.0.1 eth0",
    "route 10.0.0.0/8 tun0",
)


def say(moorage: CommandLine, node: str, *said: str) -> None:
    """A node's agent says what its networks use."""

    async def act(store: Store) -> None:
        record = Node(name=node, version="1", surroundings=list(said))
        await store.txn(Txn((), (Put(keys.NODES + node, record.encode()),)))

    moorage.on_store(act)


@pytest.mark.parametrize(
    "command", [("create", "lan", "--pool"), ("set", "web", "--add-pool")], ids=["create", "set"]
)
def test_a_pool_over_a_nodes_network_is_refused_and_nothing_is_written(
    moorage: CommandLine, command: tuple[str, ...]
) -> None:
    moorage.ok("network", "create", "web", "--pool", "172.16.0.0/24")
    before = moorage.json("network", "list")
    say(moorage, "n1", *LAN)
    assert moorage.fails("network", *command, "10.50.0.0/29") == (
        "the pool 10.50.0.0/29 collides with the network 10.50.0.0/29 (eth0) of node n1, the address 10.50.0.3 (eth0) "
        "of node n1, the gateway 10.50.0.1 (eth0) of node n1; choose another CIDR, or give --force to use what is left "
        "of it without the addresses that nodes use"
    )
    assert moorage.json("network", "list") == before


@pytest.mark.parametrize(
    "command", [("create", "lan", "--pool"), ("set", "web", "--add-pool")], ids=["create", "set"]
)
def test_force_says_which_addresses_are_left_out(moorage: CommandLine, command: tuple[str, ...]) -> None:
    moorage.ok("network", "create", "web", "--pool", "172.16.0.0/24")
    say(moorage, "n1", *LAN)
    result = moorage.run("network", *command, "10.50.0.0/29", "--force")
    assert result.exit_code == 0, result.output
    assert (
        "the pool 10.50.0.0/29 gives out all but the address 10.50.0.3 (eth0) of node n1, the gateway 10.50.0.1 (eth0) "
        "of node n1" in result.stderr
    )
    (shown,) = [
        pool
        for pool in moorage.json("network", "show", command[1])["pools"]
        if pool["cidr"] == "10.50.0.0/29"
    ]
    assert (shown["forced"], shown["usage"]["usable"], shown["usage"]["free"]) == (True, 4, 4)
    assert moorage.json("ip", "show", "10.50.0.1")["used_by"] == "the gateway 10.50.0.1 (eth0) of node n1"
    assert moorage.json("ip", "show", "10.50.0.2")["state"] == "free"


def test_a_route_is_a_warning_and_the_network_is_made(moorage: CommandLine) -> None:
    say(moorage, "n1", "route 10.0.0.0/8 tun0")
    result = moorage.run(
        "network", "create", "web", "--pool", "10.64.0.0/16", "--dns", "192.0.2.1", "-o", "json"
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == (
        "Warning: the pool 10.64.0.0/16 shares addresses with a route to 10.0.0.0/8 (tun0) of node n1; from those "
        "nodes the pool's addresses lead to containers instead: see that nothing there is needed\n"
    )
    assert json.loads(result.stdout)["name"] == "web"


def test_a_pool_cannot_be_forced_into_having_no_address(moorage: CommandLine) -> None:
    say(moorage, "n1", "address 10.50.0.1 eth0", "gateway 10.50.0.2 eth0")
    refused = moorage.fails("network", "create", "lan", "--pool", "10.50.0.0/30", "--force")
    assert "has no address that nodes do not use themselves" in refused


def test_force_without_a_pool_means_nothing(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "172.16.0.0/24")
    assert "--add-pool or --enable-pool" in moorage.fails("network", "set", "web", "--force")


def test_an_existing_pool_is_forced_by_enabling_it(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.50.0.0/28")
    say(moorage, "n1", *LAN)
    assert moorage.json("network", "show", "web")["pools"][0]["usage"]["usable"] == 7
    moorage.ok("network", "set", "web", "--enable-pool", "10.50.0.0/28", "--force")
    assert moorage.json("network", "show", "web")["pools"][0]["usage"]["usable"] == 12


def test_a_node_says_what_its_networks_use(moorage: CommandLine) -> None:
    say(moorage, "n1", *LAN)
    assert moorage.json("node", "show", "n1")["surroundings"] == list(LAN)


def test_a_pool_that_is_enabled_over_a_nodes_network_without_force_says_what_it_does_not_give_out(
    moorage: CommandLine,
) -> None:
    moorage.ok("network", "create", "lan", "--pool", "10.50.0.0/29")
    moorage.ok("network", "set", "lan", "--disable-pool", "10.50.0.0/29")
    say(moorage, "n1", *LAN)
    result = moorage.run("network", "set", "lan", "--enable-pool", "10.50.0.0/29")
    assert result.exit_code == 0
    assert "Warning: the pool 10.50.0.0/29 of network lan collides with" in result.stderr
    assert "--enable-pool 10.50.0.0/29 --force" in result.stderr
