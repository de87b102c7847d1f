"""What the isolator is asked, and what the caller reads: one document, whatever came in."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.errors import InvalidInput, MoorageError, TryAgain
from ipam.keys import IPAddress
from ipam.records import Label
from isolator.allocated import AllocateSpec, IsolateSpec
from isolator.model import Asked, Bandwidth, Limit
from netmodules.modules.handler import KIND, ModulesHandler
from netmodules.request import Reply, Request
from tests.netmodules.fakes import ASKED

_ids = itertools.count(1)


@dataclass
class Recorder:
    """An isolator that remembers what it was asked, and raises ``failure`` instead if there is one."""

    asked: list[Any] = field(default_factory=list)
    failure: Exception | None = None
    labels: tuple[Label, ...] = ()

    def _note(self, what: Any) -> None:
        if self.failure is not None:
            raise self.failure
        self.asked.append(what)

    async def allocate(self, spec: AllocateSpec) -> list[IPAddress]:
        self._note(spec)
        return [ip_address("10.0.0.5"), ip_address("fd00::5")]

    def promised(self, _: Sequence[IPAddress]) -> tuple[Label, ...]:
        return self.labels

    async def release(self, uid: str, ips: Sequence[IPAddress], _: Asked) -> None:
        self._note(("release", uid, tuple(ips)))

    async def isolate(self, spec: IsolateSpec) -> None:
        self._note(spec)

    async def cleanup(self, container_id: str, _: Asked) -> None:
        self._note(("cleanup", container_id))

    async def take_back(self, call: str, _: Asked) -> None:
        self._note(("take back", call))


def request(document: Any, network: str = "") -> Request:
    stdin = document if isinstance(document, bytes) else json.dumps(document).encode()
    env = {"NETMODULES_NETWORK": network} if network else {}
    return Request(KIND, f"{next(_ids):032x}", ASKED, env, stdin)


def ask(
    recorder: Recorder, document: Any, network: str = "web", default: str | None = None
) -> dict[str, Any]:
    """The document that the caller reads."""
    reply = asyncio.run(ModulesHandler(recorder, default_network=default)(request(document, network)))
    return read(reply)


def read(reply: Reply) -> dict[str, Any]:
    assert len(reply.stdout) < 40_000
    answer: dict[str, Any] = json.loads(reply.stdout)
    error = answer["error"]
    assert error is None or (isinstance(error, str) and error)
    assert reply.exit == (error is not None)
    return answer


def allocate(**args: Any) -> dict[str, Any]:
    return {"command": "allocate", "args": {"num_ipv4": 1, "num_ipv6": 1, "uid": "u", **args}}


def isolate(**args: Any) -> dict[str, Any]:
    given = {"container_id": "c", "pid": 42, "ipv4_addrs": ["10.0.0.5"], "netgroups": ["a"]}
    return {"command": "isolate", "args": {**given, **args}}


def test_allocate_answers_with_addresses_by_family() -> None:
    assert ask(Recorder(), allocate()) == {"ipv4": ["10.0.0.5"], "ipv6": ["fd00::5"], "error": None}


def test_an_allocate_of_nothing_asks_nobody() -> None:
    recorder = Recorder()
    nothing = {"ipv4": [], "ipv6": [], "error": None}
    assert ask(recorder, allocate(num_ipv4=0, num_ipv6=0)) == nothing
    assert recorder.asked == []


@pytest.mark.parametrize(
    "document",
    [
        {"command": "reserve", "args": {"uid": "u", "ipv4_addrs": ["10.0.0.5"]}},
        {"command": "release", "args": {"uid": "u"}},
        isolate(),
        {"command": "cleanup", "args": {"container_id": "c"}},
    ],
)
def test_all_others_answer_with_no_error(document: dict[str, Any]) -> None:
    assert ask(Recorder(), document) == {"error": None}


def test_labels_ask_for_addresses_netgroups_and_more_as_with_every_engine() -> None:
    recorder = Recorder()
    labels = {
        "moorage.ip": "10.0.0.9",
        "moorage.netgroups": "b",
        "moorage.reservation": "key",
        "moorage.pool": "10.0.0.0/24",
        "moorage.mac": "02:00:00:00:00:01",
        "moorage.bandwidth.egress": "1M",
    }
    assert ask(recorder, allocate(netgroups=["a"], labels=labels))["error"] is None
    (spec,) = recorder.asked
    assert (spec.ips, spec.netgroups) == ((ip_address("10.0.0.9"),), ("a", "b"))
    assert (spec.reservation, spec.pool, spec.mac) == ("key", "10.0.0.0/24", "02:00:00:00:00:01")
    assert spec.bandwidth == Bandwidth(egress=Limit(10**6))
    assert len(spec.labels) == len(labels)


def test_a_container_has_the_labels_of_its_isolate_or_else_those_of_its_allocate() -> None:
    recorder = Recorder(labels=(Label("moorage.default-route", "true"),))
    ask(recorder, isolate())
    ask(recorder, isolate(labels=[]))
    assert [spec.default_route for spec in recorder.asked] == [True, False]


def test_labels_that_ask_for_another_address_than_isolate_names_are_refused() -> None:
    recorder = Recorder()
    assert "10.0.0.9" in ask(recorder, isolate(labels={"moorage.ip": "10.0.0.9"}))["error"]
    assert ask(recorder, isolate(labels={"moorage.ip": "10.0.0.5"}))["error"] is None


@pytest.mark.parametrize(
    "label",
    [
        {"moorage.netgroups": "__import__('os').system('id')"},
        {"moorage.ip": "10.0.0.9\0"},
        {"moorage.mac": "$(reboot)"},
        {"moorage.nonsense": "1"},
        {"moorage.bandwidth.ingress": "1" * 400},
        {"x": "y" * 20_000},
    ],
)
def test_hostile_labels_are_refused_in_a_sentence_or_only_recorded(label: dict[str, str]) -> None:
    recorder = Recorder()
    assert ask(recorder, allocate(labels=label))["error"]
    assert recorder.asked == []


def test_a_label_that_a_predecessor_evaluated_is_text() -> None:
    recorder = Recorder()
    value = "__import__('os').kill(1, 9)"
    assert ask(recorder, allocate(labels={"acl": value}))["error"] is None
    assert recorder.asked[0].labels == (Label("acl", value),)


def test_the_network_is_that_of_the_command_line_or_the_configured_one() -> None:
    recorder = Recorder()
    ask(recorder, allocate(), network="web", default="other")
    ask(recorder, allocate(), network="", default="other")
    assert [spec.network for spec in recorder.asked] == ["web", "other"]
    answer = ask(recorder, allocate(), network="")
    assert "--network NAME" in answer["error"]
    assert "default_network" in answer["error"]
    assert "--network must be" in ask(recorder, allocate(), network="no/network")["error"]


def test_isolate_release_and_cleanup_need_no_network() -> None:
    recorder = Recorder()
    for document in (isolate(), {"command": "release", "args": {"uid": "u"}}):
        assert ask(recorder, document, network="", default="other")["error"] is None
    assert recorder.asked[0].network is None, "the addresses' own counts"


@pytest.mark.parametrize(
    "failure",
    [TryAgain("x" * 10**6), InvalidInput("é\ud800" * 10**5), MoorageError(""), ZeroDivisionError("\0")],
)
def test_an_error_is_a_sentence_of_bounded_length_and_never_a_traceback(failure: Exception) -> None:
    error = ask(Recorder(failure=failure), allocate())["error"]
    assert "Traceback" not in error


@given(stdin=st.binary(max_size=300))
def test_whatever_comes_in_one_document_goes_out(stdin: bytes) -> None:
    read(asyncio.run(ModulesHandler(Recorder())(request(stdin))))


async def test_what_is_spooled_is_carried_out_before_anything_else() -> None:
    recorder = Recorder()

    async def drain() -> None:
        recorder.asked.append("drained")

    handler = ModulesHandler(recorder, drain=drain)
    for document in (allocate(), isolate(), {"command": "cleanup", "args": {"container_id": "c"}}):
        recorder.asked.clear()
        read(await handler(request(document, "web")))
        assert recorder.asked[0] == "drained"


async def test_what_is_spooled_and_fails_hinders_who_takes_and_nobody_who_gives_back() -> None:
    async def drain() -> None:
        raise TryAgain("later")

    handler = ModulesHandler(Recorder(), drain=drain)
    assert read(await handler(request(allocate(), "web")))["error"] == "later"
    assert read(await handler(request({"command": "release", "args": {"uid": "u"}})))["error"] is None


async def test_a_spooled_call_that_makes_no_sense_is_dropped_and_one_that_may_work_is_kept() -> None:
    recorder = Recorder()
    handler = ModulesHandler(recorder)
    await handler.carry_out(request(b"{"))
    recorder.failure = TryAgain("later")
    with pytest.raises(TryAgain):
        await handler.carry_out(request({"command": "release", "args": {"uid": "u"}}))


async def test_the_call_of_a_caller_that_is_gone_is_taken_back() -> None:
    recorder = Recorder()
    call = request(allocate())
    await ModulesHandler(recorder).undo(call)
    assert recorder.asked == [("take back", call.request_id)]
