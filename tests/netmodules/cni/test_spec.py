"""From a CNI call to an AttachSpec: who wins, and what is refused."""

from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from ipam.errors import InvalidInput
from ipam.records import Label
from isolator.model import UNLIMITED, AttachSpec, Bandwidth, Limit, PortMapping
from netmodules.cni.config import parse_config
from netmodules.cni.environment import read_environment
from netmodules.cni.errors import UnsupportedField
from netmodules.cni.spec import attach_spec
from tests.netmodules.fakes import cni_env, cni_request, labels_config, mesos_config


def spec_of(config: dict[str, Any], **env: str) -> AttachSpec:
    request = cni_request("ADD", config, cni_env("ADD", **env))
    return attach_spec(
        parse_config(request.stdin), read_environment(request.env, netns_required=True), request
    )


def ips_of(config: dict[str, Any], **env: str) -> list[str]:
    return [str(ip) for ip in spec_of(config, **env).ips]


def test_a_plain_call_asks_for_nothing_special() -> None:
    spec = spec_of({"name": "web"})
    assert (spec.engine, spec.network, spec.netns) == ("cni", "web", "/run/netns/c0ffee")
    assert (spec.ips, spec.netgroups, spec.labels, spec.mac, spec.mtu) == ((), (), (), None, None)


def test_mesos_is_known_by_its_args_even_empty_ones() -> None:
    assert spec_of({"name": "web", "args": {"org.apache.mesos": {}}}).engine == "mesos"


def test_a_static_address_is_trusted_and_its_protocol_is_not() -> None:
    entries = [{"protocol": "IPv4", "ip_address": "fd00::5"}, {"protocol": "IPv6"}, {"protocol": "IPv4"}]
    assert ips_of(mesos_config({"name": "web", "ip_addresses": entries})) == ["fd00::5"]


def test_addresses_of_all_sources_come_ipv4_first() -> None:
    config = labels_config(("moorage.ip6", "fd00::5"), runtimeConfig={"ips": ["10.1.0.5/24"]})
    assert ips_of(config) == ["10.1.0.5", "fd00::5"]


def test_one_address_said_twice_is_one() -> None:
    config = mesos_config(
        {
            "name": "web",
            "ip_addresses": [{"ip_address": "10.1.0.5"}],
            "labels": {"labels": [{"key": "moorage.ip", "value": "10.1.0.5"}]},
        }
    )
    assert ips_of(config) == ["10.1.0.5"]


def test_two_addresses_of_a_family_are_refused_naming_both_places() -> None:
    config = mesos_config(
        {
            "name": "web",
            "ip_addresses": [{"ip_address": "10.1.0.6"}],
            "labels": {"labels": [{"key": "moorage.ip", "value": "10.1.0.5"}]},
        }
    )
    with pytest.raises(
        InvalidInput, match=r"NetworkInfo\.ip_addresses asks for 10\.1\.0\.6, but label moorage\.ip for"
    ):
        spec_of(config)


def test_args_cni_beats_cni_args_in_its_family_only() -> None:
    config = {"name": "web", "args": {"cni": {"ips": ["10.1.0.5"], "mac": "02:00:00:00:00:01"}}}
    spec = spec_of(config, CNI_ARGS="IP=10.1.0.9,fd00::9;MAC=02:00:00:00:00:02")
    assert spec.ips == (ip_address("10.1.0.5"), ip_address("fd00::9"))
    assert spec.mac == "02:00:00:00:00:01"


def test_the_mac_comes_from_the_label_before_the_runtime_before_cni_args() -> None:
    env = {"CNI_ARGS": "MAC=02:00:00:00:00:03"}
    runtime = {"runtimeConfig": {"mac": "02:00:00:00:00:02"}}
    assert (
        spec_of(labels_config(("moorage.mac", "02:00:00:00:00:01"), **runtime), **env).mac
        == "02:00:00:00:00:01"
    )
    assert spec_of({"name": "web", **runtime}, **env).mac == "02:00:00:00:00:02"
    assert spec_of({"name": "web"}, **env).mac == "02:00:00:00:00:03"


def test_groups_and_the_netgroups_label_are_united() -> None:
    labels = {"labels": [{"key": "moorage.netgroups", "value": "db,web"}]}
    spec = spec_of(mesos_config({"name": "web", "groups": ["web", "ops"], "labels": labels}))
    assert spec.netgroups == ("web", "ops", "db")


def test_a_group_that_is_no_name_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"NetworkInfo\.groups"):
        spec_of(mesos_config({"name": "web", "groups": ["; flush ruleset"]}))


def test_labels_are_recorded_as_given() -> None:
    given = [
        ("dup", "1"),
        ("dup", "2"),
        ("empty", ""),
        ("none", None),
        ("ünï ☃", "<é>\n"),
        ("moorage.pool", "p"),
    ]
    config = labels_config(*given)
    config["args"]["cni"] = {"labels": [{"key": "k", "value": "v"}]}
    assert spec_of(config).labels == (*(Label(key, value) for key, value in given), Label("k", "v"))


def test_port_mappings_of_both_sources_become_typed_values() -> None:
    config = mesos_config({"name": "web", "port_mappings": [{"host_port": 31080, "container_port": 80}]})
    config["runtimeConfig"] = {
        "portMappings": [
            {"hostPort": 31080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": "192.0.2.1"},
            {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "::"},
            {"hostPort": 9, "containerPort": 9, "protocol": "sctp", "hostIP": ""},
        ]
    }
    assert spec_of(config).port_mappings == (
        PortMapping("tcp", 31080, 80),
        PortMapping("udp", 53, 5353, ip_address("192.0.2.1")),
        PortMapping("udp", 53, 53, ip_address("::")),
        PortMapping("sctp", 9, 9),
    )


def test_a_bandwidth_label_beats_the_runtime_in_its_direction_only() -> None:
    runtime = {"ingressRate": 10**6, "ingressBurst": 8 * 10**4, "egressRate": 2 * 10**6, "egressBurst": 0}
    asked = labels_config(("moorage.bandwidth.ingress", "5mbit"), runtimeConfig={"bandwidth": runtime})
    assert spec_of(asked).bandwidth == Bandwidth(ingress=Limit(5 * 10**6), egress=Limit(2 * 10**6))
    unasked = {"name": "web", "runtimeConfig": {"bandwidth": runtime}}
    assert spec_of(unasked).bandwidth == Bandwidth(Limit(10**6, 8 * 10**4), Limit(2 * 10**6))


@pytest.mark.parametrize("runtime", [{}, {"ingressRate": 0, "ingressBurst": 0}, {"egressRate": None}])
def test_a_rate_of_nothing_is_no_limit(runtime: dict[str, Any]) -> None:
    assert spec_of({"name": "web", "runtimeConfig": {"bandwidth": runtime}}).bandwidth == UNLIMITED


@pytest.mark.parametrize(
    ("runtime", "named"),
    [
        ({"ingressBurst": 8000}, "ingressBurst is given without ingressRate"),
        ({"egressRate": 100}, r"egressRate must be from 8kbit"),
        ({"egressRate": -(10**6)}, r"egressRate must be from"),
        ({"egressRate": 10**40}, r"egressRate must be from"),
        ({"egressRate": 10**6, "egressBurst": -1}, r"egressBurst must be from 0"),
        ({"egressRate": 10**6, "egressBurst": 2**36}, r"egressBurst must be from 0"),
    ],
)
def test_an_impossible_bandwidth_is_refused_by_name(runtime: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        spec_of({"name": "web", "runtimeConfig": {"bandwidth": runtime}})


@pytest.mark.parametrize("mapping", [{"host_port": 0}, {"container_port": 65536}, {"protocol": "icmp"}])
def test_impossible_port_mappings_are_refused(mapping: dict[str, Any]) -> None:
    mappings = [{"host_port": 80, "container_port": 80, "protocol": "tcp", **mapping}]
    with pytest.raises(InvalidInput, match="port"):
        spec_of(mesos_config({"name": "web", "port_mappings": mappings}))


@pytest.mark.parametrize("config", [{}, {"name": ""}, {"name": "a b"}, {"network": "x" * 64}])
def test_a_network_needs_a_name_that_can_be_one(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="network"):
        spec_of({"type": "moorage-cni", **config})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ipRanges", [[{"subnet": "10.1.0.0/24"}]]),
        ("aliases", ["db"]),
        ("deviceID", "0000:03:00.0"),
        ("infinibandGUID", "c2:11:22:33:44:55:66:77"),
    ],
)
def test_what_a_container_would_miss_is_refused_with_field_and_value(field: str, value: object) -> None:
    with pytest.raises(UnsupportedField, match=field) as refused:
        spec_of({"name": "web", "runtimeConfig": {field: value}})
    assert repr(value)[:20] in str(refused.value)
    assert spec_of({"name": "web", "runtimeConfig": {field: None}}).network == "web"


def test_what_only_informs_is_dropped() -> None:
    config = {
        "name": "web",
        "runtimeConfig": {"cgroupPath": "/x", "io.kubernetes.cri.pod-annotations": {"a": "b"}},
        "args": {"cni": {"other": 1}, "somebody.else": []},
        "capabilities": {"ips": True},
    }
    pod = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=c0ffee"
    told = spec_of(config, CNI_ARGS=pod)
    assert told == replace(spec_of({"name": "web"}), request_id=told.request_id)


def test_the_addresses_of_the_runtime_are_asked_for() -> None:
    config = {"name": "web", "runtimeConfig": {"ips": ["fd00::5/64", "10.1.0.5"]}}
    assert ips_of(config) == ["10.1.0.5", "fd00::5"]
    assert ips_of({"name": "web"}, CNI_ARGS="IgnoreUnknown=1;IP=10.1.0.7") == ["10.1.0.7"]


def test_the_engines_own_name_for_the_network_is_kept() -> None:
    spec = spec_of({"name": "pods", "network": "web"})
    assert (spec.network, spec.engine_network) == ("web", "pods")
    assert spec_of({"network": "web"}).engine_network == ""


def test_an_interface_that_a_plugin_before_us_made_is_not_made_twice() -> None:
    taken = {"interfaces": [{"name": "eth0", "sandbox": "/run/netns/c0ffee"}]}
    with pytest.raises(InvalidInput, match="eth0 already"):
        spec_of({"name": "web", "prevResult": taken})
    on_the_node = {"interfaces": [{"name": "eth0"}, {"name": "eth1", "sandbox": "/run/netns/c0ffee"}]}
    assert spec_of({"name": "web", "prevResult": on_the_node}).key.ifname == "eth0"
