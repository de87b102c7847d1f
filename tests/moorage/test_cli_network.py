"""``moorage network`` on a real store."""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipam import keys
from ipam.records import Address, AddressState, Network
from ipam.store import Put, Store, Txn
from moorage.cli.network import resolver_warning
from tests.moorage.conftest import CommandLine


def test_a_network_with_everything_is_stored_and_listed(moorage: CommandLine) -> None:
    created = moorage.json(
        "network", "create", "db",
        "--pool", "10.65.0.0/24", "--pool", "fd00:65::/64",
        "--block-size", "28", "--block-size", "/124",
        "--static", "10.65.0.10-10.65.0.19", "--static", "fd00:65::100/120",
        "--exclude", "10.65.0.1", "--mtu", "1400", "--no-nat",
        "--dns", "10.0.0.2", "--dns", "fd00::2", "--search", "db.example.org",
        "--warm", "4", "--preload", "--strict",
        "--allow-netgroup", "team-*", "--allow-netgroup", "ops", "--allow-static", "all", "--allow-mac",
        "--allow-hostport", "80", "--allow-hostport", "8000-8999", "--allow-public", "--max-bandwidth", "1gbit",
        "--isolation", "open", "--allow-from", "192.0.2.0/24", "--allow-from", "nodes",
        "--to-node", "store", "--max-connections", "5000",
    )  # fmt: skip
    assert created == {
        "name": "db",
        "pools": [
            {
                "name": "10.65.0.0-24",
                "cidr": "10.65.0.0/24",
                "network": "db",
                "block_size": 28,
                "static": ["10.65.0.10-10.65.0.19"],
                "excluded": ["10.65.0.1"],
                "disabled": False,
                "forced": False,
            },
            {
                "name": "fd00:65::-64",
                "cidr": "fd00:65::/64",
                "network": "db",
                "block_size": 124,
                "static": ["fd00:65::100/120"],
                "excluded": [],
                "disabled": False,
                "forced": False,
            },
        ],
        "driver": "routed",
        "mtu": 1400,
        "nat": False,
        "dns": ["10.0.0.2", "fd00::2"],
        "search": ["db.example.org"],
        "warm": 4,
        "preload": True,
        "strict": True,
        "fabric": "none",
        "isolation": "open",
        "allow_from": ["192.0.2.0/24", "nodes"],
        "to_node": ["store"],
        "max_connections": 5000,
        "allow_netgroups": ["team-*", "ops"],
        "allow_public": True,
        "allow_static": ["all"],
        "allow_mac": True,
        "allow_hostports": ["80", "8000-8999"],
        "max_bandwidth": 10**9,
        "next_hop": 1,
    }
    assert moorage.json("network", "list") == [created]


def test_show_says_by_what_next_hop_containers_of_a_network_send(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/16")
    moorage.ok("network", "create", "db", "--pool", "10.65.0.0/16")
    shown = moorage.ok("network", "show", "db")
    assert "169.254.1.2" in shown
    assert "fe80::2" in shown
    moorage.ok("network", "set", "db", "--mtu", "1400")
    assert moorage.json("network", "show", "db")["next_hop"] == 2


def test_a_new_network_reaches_no_store_and_one_from_before_there_was_a_choice_does(
    moorage: CommandLine,
) -> None:
    created = moorage.json("network", "create", "web", "--pool", "10.64.0.0/16")
    assert (created["to_node"], created["max_connections"]) == ([], 0)
    assert moorage.json("network", "set", "web", "--to-node", "store")["to_node"] == ["store"]
    assert moorage.json("network", "set", "web", "--to-node", "none")["to_node"] == []
    assert Network.decode("networks/old", b'{"name": "old", "pools": []}').to_node == ["store"]


def test_a_limit_of_connections_is_a_number_or_the_nodes(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/16", "--max-connections", "50")
    assert "50" in moorage.ok("network", "show", "web")
    assert moorage.json("network", "set", "web", "--max-connections", "default")["max_connections"] == 0
    for nonsense in ("0", "-1", "many", "1e3", "99999999999"):
        assert "connections" in moorage.fails("network", "set", "web", "--max-connections", nonsense, code=2)
    assert "--to-node" in moorage.fails("network", "set", "web", "--to-node", "everything")


def test_callers_are_allowed_and_taken_back_live(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/16", "--allow-from", "192.0.2.0/24")
    assert moorage.json("network", "set", "web", "--isolation", "open")["isolation"] == "open"
    assert moorage.json("network", "set", "web", "--allow-from", "nodes")["allow_from"] == ["nodes"]
    assert moorage.json("network", "set", "web", "--allow-from", "none")["allow_from"] == []
    assert "has host bits set" in moorage.fails("network", "set", "web", "--allow-from", "192.0.2.1/24")


RULES = ("netgroups", "public", "static", "mac", "hostports")


def test_a_new_network_allows_little_until_its_operator_says_so(moorage: CommandLine) -> None:
    created = moorage.json("network", "create", "web", "--pool", "10.64.0.0/16")
    assert [created[f"allow_{rule}"] for rule in RULES] == [[], False, ["ranges"], False, ["31000-32000"]]
    assert created["max_bandwidth"] == 0
    changed = moorage.json(
        "network", "set", "web",
        "--allow-netgroup", "*", "--allow-public", "--allow-static", "10.64.1.0/24", "--allow-mac",
        "--allow-hostport", "none", "--max-bandwidth", "100mbit",
    )  # fmt: skip
    assert [changed[f"allow_{rule}"] for rule in RULES] == [["*"], True, ["10.64.1.0/24"], True, []]
    assert changed["max_bandwidth"] == 100_000_000
    back = ("--allow-netgroup", "none", "--no-allow-mac", "--allow-static", "none", "--max-bandwidth", "none")
    again = moorage.json("network", "set", "web", *back)
    assert [again[f"allow_{rule}"] for rule in RULES] == [[], True, [], False, []]
    assert again["max_bandwidth"] == 0


def test_what_a_network_allows_is_shown_in_words(moorage: CommandLine) -> None:
    moorage.ok(
        "network", "create", "web", "--pool", "10.64.0.0/16", "--allow-netgroup", "team-*",
        "--allow-static", "none", "--max-bandwidth", "1500k",
    )  # fmt: skip
    shown = [line.split(maxsplit=2) for line in moorage.ok("network", "show", "web").splitlines()]
    words = {" ".join(line[:2]): line[2] for line in shown if len(line) > 2}
    assert words["allow netgroups"] == "web, team-*"
    assert words["allow static"] == "none"
    assert words["max bandwidth"] == "1500kbit"


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["--allow-netgroup", "a b"], "'a b' is no netgroup", 1),
        (["--allow-netgroup", "none", "--allow-netgroup", "a"], "'none' stands alone", 2),
        (["--allow-static", "some"], "'some' is no address range", 1),
        (["--allow-hostport", "0-80"], "'0-80' is no port range", 1),
        (["--allow-hostport", "90-80"], "'90-80' is no port range", 1),
        (["--max-bandwidth", "fast"], "it must be bits per second like", 2),
        (["--max-bandwidth", "1bit"], "it must be from 8kbit", 2),
    ],
)
def test_rules_that_make_no_sense_are_refused(
    moorage: CommandLine, arguments: list[str], sentence: str, code: int
) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/16")
    said = moorage.fails("network", "set", "web", *arguments, code=code)
    assert sentence in " ".join(said.split())


def test_a_network_called_public_has_to_say_that_it_is(moorage: CommandLine) -> None:
    assert "--allow-public" in moorage.fails("network", "create", "public", "--pool", "10.64.0.0/16")
    moorage.ok("network", "create", "public", "--pool", "10.64.0.0/16", "--allow-public")


def test_defaults(moorage: CommandLine) -> None:
    created = moorage.json("network", "create", "web", "--pool", "10.64.0.0/16", "--pool", "fd00:64::/64")
    assert [pool["block_size"] for pool in created["pools"]] == [26, 122]
    assert (created["nat"], created["mtu"], created["warm"], created["preload"]) == (True, 0, 8, False)
    assert created["strict"] is False


def test_the_table_names_the_pools(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/16", "--pool", "fd00:64::/64")
    assert moorage.ok("network", "list").splitlines() == [
        "NAME  POOLS                       DRIVER  FABRIC  NAT  MTU         WARM",
        "web   10.64.0.0/16, fd00:64::/64  routed  none    yes  underlay's  8",
    ]


def test_creating_says_what_comes_next(moorage: CommandLine) -> None:
    said = moorage.ok("network", "create", "web", "--pool", "10.64.0.0/16")
    assert "network web created with 10.64.0.0/16" in said
    assert "moorage network cni-config web" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--pool", "10.64.0.0/16", "--block-size", "122"],
            "--block-size 122 is for IPv6 pools, and there is none",
        ),
        (
            ["--pool", "fd00::/64", "--block-size", "26"],
            "--block-size 26 is for IPv4 pools, and there is none",
        ),
        (
            ["--pool", "10.64.0.0/16", "--block-size", "26", "--block-size", "27"],
            "--block-size is given twice for IPv4: 26 and 27; keep one",
        ),
        (["--pool", "10.64.0.0/16", "--static", "10.65.0.1"], "is inside none of the pools 10.64.0.0/16"),
        (
            ["--pool", "10.64.0.0/24", "--pool", "10.65.0.0/24", "--exclude", "ten"],
            "'ten' is no address range",
        ),
        (["--pool", "10.64.0.0/24", "--exclude", "10.64.0.9-10.64.0.1"], "runs backwards"),
        (["--pool", "10.64.0.0/33", "--static", "10.64.0.1"], "the pool '10.64.0.0/33' is no CIDR"),
        (["--pool", "10.64.0.0/16", "--mtu", "-1"], "the MTU -1 is not between"),
        (["--pool", "10.64.0.0/16", "--warm", "-1"], "warm -1 is not between"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(
    moorage: CommandLine, arguments: list[str], sentence: str
) -> None:
    assert sentence in moorage.fails("network", "create", "web", *arguments)
    assert moorage.json("network", "list") == []


@pytest.mark.parametrize("size", ["0", "129", "-1", "x", "²"])
def test_a_block_size_that_is_no_prefix_length_is_exit_2(moorage: CommandLine, size: str) -> None:
    said = moorage.fails("network", "create", "web", "--pool", "10.64.0.0/16", f"--block-size={size}", code=2)
    assert "is no prefix length" in said


def test_a_network_without_pool_is_exit_2(moorage: CommandLine) -> None:
    assert "'--pool'" in moorage.fails("network", "create", "web", code=2)


def test_a_network_is_changed(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24", "--dns", "10.0.0.2", "--search", "a.org")
    changed = moorage.json(
        "network", "set", "web",
        "--add-pool", "10.65.0.0/24", "--add-pool", "fd00:65::/64", "--block-size", "28",
        "--disable-pool", "10.64.0.0/24", "--no-nat", "--mtu", "1400", "--warm", "2", "--no-dns",
        "--search", "b.org", "--preload", "--strict",
    )  # fmt: skip
    assert [(pool["cidr"], pool["block_size"], pool["disabled"]) for pool in changed["pools"]] == [
        ("10.64.0.0/24", 26, True),
        ("10.65.0.0/24", 28, False),
        ("fd00:65::/64", 122, False),
    ]
    assert {key: changed[key] for key in ("nat", "mtu", "warm", "dns", "search", "preload", "strict")} == {
        "nat": False,
        "mtu": 1400,
        "warm": 2,
        "dns": [],
        "search": ["b.org"],
        "preload": True,
        "strict": True,
    }
    assert moorage.json("network", "list") == [changed]
    assert moorage.ok("network", "set", "web", "--enable-pool", "10.64.0.0/24") == "network web changed\n"
    assert moorage.json("network", "list")[0]["pools"][0]["disabled"] is False


def test_a_change_of_nothing_and_a_contradiction_are_refused(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    assert "nothing is to be changed" in moorage.fails("network", "set", "web")
    assert "both given and emptied" in moorage.fails("network", "set", "web", "--dns", "10.0.0.2", "--no-dns")
    assert "there is no network 'wbe'" in moorage.fails("network", "set", "wbe", "--warm", "1")
    assert "there is none" in moorage.fails("network", "set", "web", "--warm", "1", "--block-size", "28")


def test_an_overlapping_pool_names_the_other(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/16")
    said = moorage.fails("network", "create", "db", "--pool", "10.64.3.0/24")
    assert "overlaps 10.64.0.0/16 of network web" in said


def test_an_unknown_network_names_the_known(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/16")
    for command in ("show", "delete", "cni-config"):
        assert "there is no network 'wbe' (known: web)" in moorage.fails("network", command, "wbe")


async def two_addresses(store: Store) -> None:
    for ip, state in (("10.64.0.5", AddressState.ASSIGNED), ("10.64.0.6", AddressState.WARM)):
        record = Address(pool="10.64.0.0-24", state=state, node="a", network="web")
        await store.txn(Txn(then=(Put(keys.address_key(ip_address(ip)), record.encode()),)))


def test_show_counts_addresses_by_node(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    moorage.on_store(two_addresses)
    assert moorage.json("network", "show", "web")["pools"][0]["usage"] == {
        "usable": 254,
        "allocated": 0,
        "assigned": 1,
        "own": 0,
        "warm": 1,
        "cooling": 0,
        "withdrawn": 0,
        "outside": 0,
        "free": 252,
        "by_node": {"a": {"assigned": 1, "warm": 1}},
    }
    table = moorage.ok("network", "show", "web")
    assert table.splitlines()[0].split() == ["name", "web"]
    assert table.splitlines()[-2:] == [
        "NODE  CIDR          ALLOCATED  ASSIGNED  OWN  WARM  COOLING",
        "a     10.64.0.0/24  0          1         0    1     0",
    ]


async def a_larger_holder(store: Store) -> None:
    for number in range(20, 25):
        record = Address(pool="10.64.0.0-24", state=AddressState.ASSIGNED, node="b", network="web")
        key = keys.address_key(ip_address(f"10.64.0.{number}"))
        await store.txn(Txn(then=(Put(key, record.encode()),)))


def test_show_names_the_largest_holder_first(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    moorage.on_store(two_addresses)
    moorage.on_store(a_larger_holder)
    table = moorage.ok("network", "show", "web").splitlines()
    assert [line.split()[0] for line in table[-2:]] == ["b", "a"]


def test_a_network_in_use_is_not_deleted(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    moorage.on_store(two_addresses)
    assert "the network web is in use" in moorage.fails("network", "delete", "web")


def test_a_network_nobody_uses_is_deleted(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    assert moorage.ok("network", "delete", "web") == "network web deleted\n"
    assert moorage.json("network", "list") == []


def test_the_cni_config_is_what_mesos_needs_and_names_a_socket_of_its_own(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    assert json.loads(moorage.ok("network", "cni-config", "web")) == {
        "cniVersion": "0.2.0",
        "name": "web",
        "type": "moorage-cni",
        "socket": str(moorage.socket),
    }


def test_the_default_socket_is_left_out_of_the_cni_config(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    shown = json.loads(
        moorage.ok(
            "network", "cni-config", "web", "--cni-version", "1.0.0", "--socket", "/run/moorage/agent.sock"
        )
    )
    assert shown == {"cniVersion": "1.0.0", "name": "web", "type": "moorage-cni"}


def test_a_list_of_plugins_says_what_a_runtime_may_pass_on(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    shown = json.loads(moorage.ok("network", "cni-config", "web", "--conflist"))
    [plugin] = shown.pop("plugins")
    assert shown == {"cniVersion": "1.0.0", "name": "web"}
    capabilities = dict.fromkeys(("portMappings", "bandwidth", "ips", "mac", "dns"), True)
    assert plugin == {"type": "moorage-cni", "socket": str(moorage.socket), "capabilities": capabilities}
    newer = moorage.ok("network", "cni-config", "web", "--conflist", "--cni-version", "1.1.0")
    assert json.loads(newer)["cniVersion"] == "1.1.0"


@pytest.mark.parametrize(
    ("dns", "file", "warned"),
    [
        ([], "nameserver 127.0.0.53\n", True),
        ([], "# nameserver 127.0.0.53\nnameserver 10.0.0.2\n", False),
        ([], "nameserver ::1\nnameserver 10.0.0.2\n", False),
        (["127.0.0.1"], "nameserver 10.0.0.2\n", True),
        (["10.0.0.2"], "nameserver 127.0.0.53\n", False),
    ],
)
def test_a_resolver_that_only_the_host_reaches_is_warned_of(
    tmp_path: Path, dns: list[str], file: str, warned: bool
) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(file)
    warning = resolver_warning(Network(name="web", pools=[], dns=dns), resolv_conf)
    assert ("--dns" in warning) == warned
