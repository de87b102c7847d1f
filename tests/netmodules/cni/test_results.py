"""Results, version by version: the whole JSON, so that a reader sees what an engine gets."""

import json
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from isolator.model import Endpoint, EndpointKey, EndpointState
from netmodules.cni.config import SUPPORTED_VERSIONS, PreviousResult, parse_config
from netmodules.cni.results import differences, render_result
from tests.netmodules.fakes import ASKED, MAC

ENDPOINT = Endpoint(
    key=EndpointKey("c0ffee", "eth0"),
    state=EndpointState.ATTACHED,
    request_id="0" * 32,
    asked=ASKED,
    engine="cni",
    network="dual",
    driver="routed",
    netns="/run/netns/c0ffee",
    ips=(ip_address("10.2.0.9"), ip_address("fd00::9")),
    host_ifname="mrg0123456789",
    mac=MAC,
    mtu=1450,
    nameservers=("10.9.9.9",),
    search=("net.internal",),
    next_hop=17,
    pools=(ip_network("10.2.0.0/16"), ip_network("fd00::/64")),
)
ROUTES4 = [{"dst": "0.0.0.0/0", "gw": "169.254.1.17"}, {"dst": "10.2.0.0/16", "gw": "169.254.1.17"}]
ROUTES6 = [{"dst": "::/0", "gw": "fe80::11"}, {"dst": "fd00::/64", "gw": "fe80::11"}]
ROUTES = [ROUTES4[0], ROUTES6[0], ROUTES4[1], ROUTES6[1]]
DNS = {"nameservers": ["10.9.9.9"], "search": ["net.internal"]}
OLD = {
    "ip4": {"ip": "10.2.0.9/32", "gateway": "169.254.1.17", "routes": ROUTES4},
    "ip6": {"ip": "fd00::9/128", "gateway": "fe80::11", "routes": ROUTES6},
}


def result(version: str | None = None, endpoint: Endpoint = ENDPOINT, **fields: Any) -> dict[str, Any]:
    config = {"name": "dual", **({"cniVersion": version} if version else {}), **fields}
    parsed: dict[str, Any] = json.loads(render_result(endpoint, parse_config(json.dumps(config).encode())))
    return parsed


@pytest.mark.parametrize("version", [None, "0.1.0", "0.2.0"])
def test_the_oldest_shape(version: str | None) -> None:
    assert result(version) == {"cniVersion": version or "0.2.0", **OLD, "dns": DNS}


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0"])
def test_the_shape_with_interfaces(version: str) -> None:
    assert result(version) == {
        "cniVersion": version,
        "interfaces": [
            {"name": "mrg0123456789"},
            {"name": "eth0", "mac": MAC, "sandbox": "/run/netns/c0ffee"},
        ],
        "ips": [
            {"version": "4", "address": "10.2.0.9/32", "gateway": "169.254.1.17", "interface": 1},
            {"version": "6", "address": "fd00::9/128", "gateway": "fe80::11", "interface": 1},
        ],
        "routes": ROUTES,
        "dns": DNS,
    }


def test_1_0_0_has_no_family() -> None:
    assert result("1.0.0")["ips"][0] == {
        "address": "10.2.0.9/32",
        "gateway": "169.254.1.17",
        "interface": 1,
    }


def test_1_1_0_has_the_mtu() -> None:
    assert result("1.1.0")["interfaces"] == [
        {"name": "mrg0123456789", "mtu": 1450},
        {"name": "eth0", "mac": MAC, "mtu": 1450, "sandbox": "/run/netns/c0ffee"},
    ]


@pytest.mark.parametrize("version", [None, *SUPPORTED_VERSIONS])
def test_mesos_always_finds_the_addresses_it_reads(version: str | None) -> None:
    for_mesos = result(version, args={"org.apache.mesos": {"network_info": {"name": "dual"}}})
    assert for_mesos == {**result(version), **OLD}


def test_one_family_gives_one_entry() -> None:
    single = replace(ENDPOINT, ips=(ip_address("fd00::9"),))
    assert "ip4" not in result("0.2.0", single)
    assert [ip["address"] for ip in result("1.0.0", single)["ips"]] == ["fd00::9/128"]


def test_dns_is_the_runtimes_then_the_configurations_then_the_networks_field_by_field() -> None:
    own = {"dns": {"nameservers": ["10.8.8.8"], "domain": "d", "options": ["ndots:2"]}}
    assert result(**own)["dns"] == {**own["dns"], "search": ["net.internal"]}
    runtime = {"runtimeConfig": {"dns": {"servers": ["10.7.7.7"], "searches": ["r"]}}}
    assert result(**own, **runtime)["dns"] == {**own["dns"], "nameservers": ["10.7.7.7"], "search": ["r"]}


def test_a_chained_call_passes_the_previous_result_through() -> None:
    before = {
        "interfaces": [{"name": "eth9", "mac": "aa:aa:aa:aa:aa:aa", "sandbox": "/run/netns/c0ffee"}],
        "ips": [{"address": "192.0.2.1/24", "interface": 0}],
        "routes": [{"dst": "192.0.2.0/24", "mtu": 1400}],
    }
    chained = result("1.0.0", prevResult=before)
    assert chained["interfaces"][0] == before["interfaces"][0]
    assert [ip["interface"] for ip in chained["ips"]] == [0, 2, 2]
    assert chained["routes"] == [*before["routes"], *ROUTES]


BEFORE: dict[str, Any] = {
    "interfaces": [
        {"name": "br0", "mac": "aa:aa:aa:aa:aa:aa"},
        {"name": "eth9", "mac": "aa:aa:aa:aa:aa:ab", "sandbox": "/run/netns/c0ffee"},
    ],
    "ips": [{"version": "4", "address": "192.0.2.1/24", "gateway": "192.0.2.254", "interface": 1}],
    "routes": [{"dst": "192.0.2.0/24", "gw": "192.0.2.254"}],
    "dns": {"nameservers": ["192.0.2.53"], "domain": "before", "options": ["edns0"]},
}


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_each_modern_version_passes_through_what_came_before_and_counts_on(version: str) -> None:
    chained = result(version, prevResult=BEFORE)
    alone = result(version)
    assert chained["interfaces"] == [*BEFORE["interfaces"], *alone["interfaces"]]
    assert chained["ips"] == [*BEFORE["ips"], *({**ip, "interface": 3} for ip in alone["ips"])]
    assert chained["routes"] == [*BEFORE["routes"], *alone["routes"]]
    assert chained["dns"] == {**BEFORE["dns"], **DNS}


def test_what_1_1_0_knows_of_interfaces_and_routes_passes_through() -> None:
    before = {
        "interfaces": [{"name": "vf0", "mtu": 9000, "socketPath": "/run/v.sock", "pciID": "0000:03:00.0"}],
        "routes": [{"dst": "::/0", "mtu": 1400, "advmss": 1300, "priority": 5, "table": 7, "scope": 253}],
    }
    chained = result("1.1.0", prevResult=before)
    assert chained["interfaces"][:1] == before["interfaces"]
    assert chained["routes"][:1] == before["routes"]


def test_in_the_oldest_shape_only_a_family_that_is_not_ours_passes_through() -> None:
    before: dict[str, Any] = {
        "ip4": {"ip": "192.0.2.1/24", "gateway": "192.0.2.254"},
        "ip6": {"ip": "2001:db8::1/64", "routes": [{"dst": "2001:db8::/32"}]},
        "dns": {"domain": "before"},
    }
    assert result("0.2.0", prevResult=before) == {**result("0.2.0"), "dns": {**DNS, "domain": "before"}}
    only4 = replace(ENDPOINT, ips=ENDPOINT.ips[:1])
    chained = result("0.2.0", only4, prevResult=before)
    assert (chained["ip4"], chained["ip6"]) == (OLD["ip4"], before["ip6"])


@pytest.mark.parametrize("empty", [None, {}, {"interfaces": None, "ips": None, "routes": None, "dns": None}])
def test_a_previous_result_of_nothing_changes_nothing(empty: object) -> None:
    for version in SUPPORTED_VERSIONS:
        assert result(version, prevResult=empty) == result(version)


def kept(**fields: Any) -> PreviousResult:
    previous = parse_config(json.dumps({"prevResult": {**result("1.0.0"), **fields}}).encode()).prev_result
    assert previous is not None
    return previous


def test_check_finds_its_own_result_in_order() -> None:
    assert differences(ENDPOINT, kept()) == []


def test_check_ignores_what_other_plugins_added() -> None:
    own = result("1.0.0")
    more = [*own["ips"], {"address": "192.0.2.1/24", "interface": 2}]
    assert differences(ENDPOINT, kept(ips=more, interfaces=[*own["interfaces"], {"name": "eth9"}])) == []


def test_check_tells_each_difference() -> None:
    own = result("1.0.0")
    other_mac = [own["interfaces"][0], {**own["interfaces"][1], "mac": "02:00:00:00:00:99"}]
    assert differences(ENDPOINT, kept(interfaces=other_mac, ips=[{"address": "10.2.0.8/32"}])) == [
        f"prevResult has MAC 02:00:00:00:00:99, the endpoint {MAC}",
        "prevResult lacks 10.2.0.9, which the endpoint has",
        "prevResult lacks fd00::9, which the endpoint has",
        "prevResult has 10.2.0.8, which the endpoint lacks",
    ]
    assert "has no interface eth0" in differences(ENDPOINT, kept(interfaces=[{"name": "eth0"}]))[0]
