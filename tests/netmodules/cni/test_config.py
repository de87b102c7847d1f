"""stdin: decoded, typed and bounded."""

import json

import pytest

from ipam.errors import InvalidInput
from netmodules.cni.config import parse_config, version_for_errors
from netmodules.cni.errors import IncompatibleVersion, Undecodable


def test_unknown_fields_of_any_kind_pass() -> None:
    config = parse_config(
        b'{"name":"n","x_big":9007199254740993123456789,"x_float":1.5e300,"x":[null,{"a":[]}]}'
    )
    assert config.network_name == "n"


def test_null_counts_as_absent_everywhere() -> None:
    names = ["cniVersion", "network", "mtu", "dns", "args", "runtimeConfig", "prevResult"]
    config = parse_config(json.dumps({"name": "n", **dict.fromkeys(names)}).encode())
    assert (config.version, config.network_info, config.mtu) == ("0.2.0", None, None)


def test_the_network_is_ours_before_that_of_mesos_before_the_name() -> None:
    mesos = {"args": {"org.apache.mesos": {"network_info": {"name": "b"}}}, "name": "c"}
    assert parse_config(json.dumps({**mesos, "network": "a"}).encode()).network_name == "a"
    assert parse_config(json.dumps(mesos).encode()).network_name == "b"
    assert parse_config(b'{"name":"c"}').network_name == "c"


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b" \n",
        b"garbage",
        b"[]",
        b'"text"',
        b"null",
        b'{"name":"n"',
        b'{"name":"n"}x',
        b'{"name":"\xff"}',
        b'{"name":"\\ud800"}',
        b'{"mtu":NaN}',
        b'{"x":Infinity}',
        b'{"x":' + b"[" * 500_000,
        b'{"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        b"[" * 1_000_000,
        b'{"x":"' + b"a" * (1 << 20) + b'"}',
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_what_is_no_json_object_is_undecodable(hostile: bytes) -> None:
    with pytest.raises(Undecodable):
        parse_config(hostile)
    assert version_for_errors(hostile) == "0.2.0"


@pytest.mark.parametrize(
    "wrong",
    [
        {"mtu": "1400"},
        {"mtu": 575},
        {"mtu": 65536},
        {"mtu": True},
        {"mtu": 10**30},
        {"args": []},
        {"args": {"org.apache.mesos": {"network_info": {"labels": {"labels": [{"value": "no key"}]}}}}},
        {"args": {"org.apache.mesos": {"network_info": {"groups": "web"}}}},
        {"network": 5},
        {"dns": {"nameservers": "10.0.0.1"}},
    ],
)
def test_wrong_types_and_bounds_are_invalid_input(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        parse_config(json.dumps({"name": "n", **wrong}).encode())


def test_an_unsupported_version_names_the_supported() -> None:
    with pytest.raises(IncompatibleVersion, match=r"'2\.0\.0' is not supported; .*0\.1\.0.*1\.1\.0"):
        parse_config(b'{"cniVersion":"2.0.0","name":"n","mtu":"wrong too"}')


def test_errors_are_answered_in_the_callers_version_if_it_is_one() -> None:
    assert version_for_errors(b'{"cniVersion":"1.0.0","mtu":"x"}') == "1.0.0"
    assert version_for_errors(b'{"cniVersion":"9.9.9"}') == "0.2.0"
    assert version_for_errors(b'{"cniVersion":7}') == "0.2.0"
