"""Documents of the net-modules protocol, and what is none: a value or one sentence, and never anything else."""

from __future__ import annotations

import contextlib
import json
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ipam.errors import InvalidInput, MoorageError
from ipam.records import Label
from netmodules import frame
from netmodules.modules.calls import (
    MOST_ADDRESSES,
    Allocate,
    Cleanup,
    Isolate,
    Release,
    parse_call,
)


def call(command: str, **args: Any) -> bytes:
    return json.dumps({"command": command, "args": args}).encode()


def test_allocate_as_a_mesos_agent_sends_it() -> None:
    labels = [{"key": "role", "value": "db"}, {"key": "empty"}]
    parsed = parse_call(
        call("allocate", hostname="h", num_ipv4=2, num_ipv6=1, uid="u", netgroups=["a", "b"], labels=labels)
    )
    assert parsed == Allocate("u", {4: 2, 6: 1}, (), ("a", "b"), (Label("role", "db"), Label("empty", None)))


def test_labels_are_read_as_a_list_and_as_an_object() -> None:
    as_object = parse_call(call("allocate", num_ipv4=1, uid="u", labels={"role": "db", "empty": None}))
    assert isinstance(as_object, Allocate)
    assert as_object.labels == (Label("role", "db"), Label("empty", None))


def test_reserve_counts_what_it_names() -> None:
    parsed = parse_call(
        call("reserve", ipv4_addrs=["10.0.0.1", "10.0.0.2"], ipv6_addrs=["fd00::1"], uid="u", netgroups=None)
    )
    ips = tuple(map(ip_address, ("10.0.0.1", "10.0.0.2", "fd00::1")))
    assert parsed == Allocate("u", {4: 2, 6: 1}, ips, (), (), is_reserve=True)


def test_release_goes_by_uid_or_by_addresses_of_both_families() -> None:
    assert parse_call(call("release", uid="u")) == Release("u", ())
    assert parse_call(call("release", ips=["10.0.0.1", "fd00::1", "10.0.0.1"])) == Release(
        "", (ip_address("10.0.0.1"), ip_address("fd00::1"))
    )
    for nothing in ({}, {"uid": None, "ips": []}, {"uid": ""}):
        with pytest.raises(InvalidInput, match="uid, or addresses"):
            parse_call(call("release", **nothing))


def test_isolate_tells_no_labels_from_none_given() -> None:
    args: dict[str, Any] = {"container_id": "c", "pid": 42, "ipv4_addrs": ["10.0.0.1"], "netgroups": ["a"]}
    ips = (ip_address("10.0.0.1"),)
    assert parse_call(call("isolate", **args)) == Isolate("c", 42, ips, ("a",), None)
    assert parse_call(call("isolate", **args, labels=[])) == Isolate("c", 42, ips, ("a",), ())


def test_cleanup() -> None:
    assert parse_call(call("cleanup", hostname="h", container_id="parent.child")) == Cleanup("parent.child")


@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "no document"),
        (b"[]", "no document"),
        (b"null", "no document"),
        (b'"allocate"', "no document"),
        (b"{}", "command"),
        (b"\xff\xfe", "no document"),
        (b'{"command":"allocate","args":{"uid":"\\ud800","num_ipv4":1}}', "no document"),
        (b"[" * 100_000, "no document"),
        (b'{"command":' + b"[" * 100_000, "no document"),
        (b'{"command":"\\u0000"}', "unknown"),
        (b'{"command":"eval"}', "unknown"),
        (b'{"command":"ALLOCATE"}', "unknown"),
        (b'{"command":"allocate","args":[]}', "no document"),
        (b'{"command":"cleanup"}', "container_id"),
        (b" " * (frame.MAX_STDIN + 1), "longer than"),
        (call("allocate", num_ipv4=1), "uid"),
        (call("allocate", num_ipv4=1, uid=7), "uid"),
        (call("allocate", num_ipv4=1, uid="a\0b"), "uid must be"),
        (call("allocate", num_ipv4=1, uid="a\nb"), "uid must be"),
        (call("allocate", num_ipv4=1, uid="u" * 254), "uid must be"),
        (call("allocate", num_ipv4=10**9, uid="u"), "num_ipv4 must be from 0"),
        (call("allocate", num_ipv4=10**400, uid="u"), "num_ipv4"),
        (call("allocate", num_ipv6=-1, uid="u"), "num_ipv6 must be from 0"),
        (call("allocate", num_ipv4=MOST_ADDRESSES, num_ipv6=1, uid="u"), "together"),
        (call("allocate", num_ipv4="1", uid="u"), "num_ipv4"),
        (call("allocate", num_ipv4=True, uid="u"), "num_ipv4"),
        (call("allocate", num_ipv4=1.5, uid="u"), "num_ipv4"),
        (call("allocate", num_ipv4=1, uid="u", netgroups="db"), "netgroups"),
        (call("allocate", num_ipv4=1, uid="u", netgroups=["../../etc"]), "netgroup"),
        (call("allocate", num_ipv4=1, uid="u", labels="__import__('os')"), "labels"),
        (call("allocate", num_ipv4=1, uid="u", labels={"a": {"b": 1}}), "labels"),
        (call("reserve", uid="u"), "both empty"),
        (call("reserve", uid="u", ipv4_addrs=["fd00::1"]), "must be of IPv4"),
        (call("reserve", uid="u", ipv6_addrs=["10.0.0.1"]), "must be of IPv6"),
        (call("reserve", uid="u", ipv4_addrs=["127.0.0.1"]), "unicast"),
        (call("reserve", uid="u", ipv4_addrs=["10.0.0.1; rm -rf /"]), "IP address"),
        (call("reserve", uid="u", ipv4_addrs=[f"10.0.0.{n}" for n in range(65)]), "at most 64"),
        (call("release", ips=["everything"]), "IP address"),
        (call("release", ips=["10.0.0.1"] * 1025), "at most 1024"),
        (call("isolate", container_id="c", pid=0, ipv4_addrs=["10.0.0.1"]), "pid"),
        (call("isolate", container_id="c", pid=-1, ipv4_addrs=["10.0.0.1"]), "pid"),
        (call("isolate", container_id="c", pid=10**30, ipv4_addrs=["10.0.0.1"]), "pid"),
        (call("isolate", container_id="c", pid="self", ipv4_addrs=["10.0.0.1"]), "pid"),
        (call("isolate", container_id="c", ipv4_addrs=["10.0.0.1"]), "pid"),
        (call("isolate", container_id="c", pid=1), "both empty"),
        (call("isolate", container_id="../c", pid=1, ipv4_addrs=["10.0.0.1"]), "container_id"),
        (call("cleanup", container_id=""), "container_id"),
        (call("cleanup", container_id="c" * 1281), "container_id"),
    ],
)
def test_what_makes_no_sense_is_refused_by_the_name_of_the_field(stdin: bytes, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        parse_call(stdin)
    assert len(str(caught.value)) < 1000


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
fields = st.sampled_from(
    [
        "uid",
        "num_ipv4",
        "num_ipv6",
        "ipv4_addrs",
        "ipv6_addrs",
        "ips",
        "container_id",
        "pid",
        "netgroups",
        "labels",
    ]
)
commands = st.sampled_from(["allocate", "reserve", "release", "isolate", "cleanup"]) | st.text()


@given(command=commands, args=st.dictionaries(fields, anything))
@example(command="allocate", args={"uid": "u", "num_ipv4": 64})
def test_whatever_the_fields_hold_there_is_a_call_or_one_sentence(command: str, args: dict[str, Any]) -> None:
    with contextlib.suppress(MoorageError):
        parsed = parse_call(json.dumps({"command": command, "args": args}).encode())
        assert isinstance(parsed, (Allocate, Release, Isolate, Cleanup))


@given(stdin=st.binary(max_size=200))
def test_whatever_the_bytes_are_there_is_a_call_or_one_sentence(stdin: bytes) -> None:
    with pytest.raises(InvalidInput):
        parse_call(stdin)
