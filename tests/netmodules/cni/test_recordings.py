"""Every call that a real Mesos agent made, replayed against the handler; tests/data/mesos says what must come."""

import json
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

from ipam.records import Label
from netmodules.request import Reply
from tests.netmodules.fakes import FakeIsolator, body, cni_request, handler_for

DATA = Path(__file__).parents[2] / "data" / "mesos"
CALLS: list[dict[str, Any]] = json.loads((DATA / "cni-calls.json").read_text())
EXPECTED: dict[str, Any] = json.loads((DATA / "expectations.json").read_text())


def test_the_table_covers_the_recording_call_by_call() -> None:
    assert [(call["run"], call["call"]) for call in CALLS] == [
        (call["run"], call["call"]) for call in EXPECTED["calls"]
    ]
    assert len(CALLS) == 40


async def test_every_recorded_call_gets_what_the_table_says() -> None:
    isolator = FakeIsolator(EXPECTED["networks"])
    handler = handler_for(isolator)
    for call, expected in zip(CALLS, EXPECTED["calls"], strict=True):
        env = {name: value for name, value in call["env"].items() if name.startswith("CNI_")}
        reply = await handler(cni_request(expected["command"], call["stdin"].encode(), env))
        assert reply.exit == expected["exit"], (expected, reply)
        if expected["command"] == "ADD":
            assert_added(isolator, reply, expected)
        else:
            assert reply.stdout.decode() == expected["stdout"]
    assert isolator.live == {}


def assert_added(isolator: FakeIsolator, reply: Reply, expected: dict[str, Any]) -> None:
    result = body(reply)
    assert ("ip4" in result, "ip6" in result) == (expected["ip4"], expected["ip6"])
    given = [str(ip_interface(result[family]["ip"]).ip) for family in ("ip4", "ip6") if family in result]
    assert set(expected["static"]) <= set(given)
    assert result["cniVersion"] == expected["cniVersion"]
    assert expected["dns"].items() <= result["dns"].items()
    spec = isolator.specs[-1]
    assert (spec.engine, spec.network, spec.mtu) == ("mesos", expected["network"], expected["mtu"])
    assert list(spec.netgroups) == expected["netgroups"]
    assert list(spec.labels) == [Label(key, value) for key, value in expected["labels"]]
