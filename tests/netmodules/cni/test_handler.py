"""CNI calls through the handler, with an isolator that only remembers."""

import json
from typing import Any

import pytest

from ipam.errors import Exhausted, Fenced, InvalidInput, StoreError, StoreUnavailable, TryAgain
from isolator.errors import JournalUnwritable, NamespaceGone
from isolator.model import EndpointKey, ValidAttachments
from netmodules.request import Reply
from tests.netmodules.fakes import (
    ASKED,
    MAC,
    FakeIsolator,
    assert_cni_error,
    body,
    cni_env,
    cni_request,
    handler_for,
    labels_config,
)

KEY = EndpointKey("c0ffee", "eth0")
NO_ENDPOINT: dict[str, str | None] = {"CNI_CONTAINERID": None, "CNI_IFNAME": None, "CNI_NETNS": None}


@pytest.fixture
def isolator() -> FakeIsolator:
    return FakeIsolator()


async def call(isolator: FakeIsolator, command: str, config: Any = None, **env: str | None) -> Reply:
    return await handler_for(isolator)(cni_request(command, config, cni_env(command, **env)))


async def test_add_answers_the_result(isolator: FakeIsolator) -> None:
    reply = await call(isolator, "ADD", {"name": "web", "cniVersion": "1.0.0"})
    assert (reply.exit, body(reply)["interfaces"][1]["mac"]) == (0, MAC)


async def test_add_names_all_missing_variables_before_it_looks_at_stdin(isolator: FakeIsolator) -> None:
    reply = await call(isolator, "ADD", b"garbage", CNI_CONTAINERID=None, CNI_NETNS=None)
    assert_cni_error(reply, 4, "CNI_CONTAINERID", "CNI_NETNS")


@pytest.mark.parametrize("command", ["", "VERSION", "gc", "add"])
async def test_an_unknown_command_is_an_error_of_the_environment(
    isolator: FakeIsolator, command: str
) -> None:
    assert_cni_error(await call(isolator, command), 4, "CNI_COMMAND")


async def test_errors_of_the_isolator_keep_their_code_words_and_details(isolator: FakeIsolator) -> None:
    isolator.failure = Exhausted("no address is left in web", details="node1: 62 assigned")
    reply = await call(isolator, "ADD", {"name": "web", "cniVersion": "0.4.0"})
    assert body(reply) == {
        "cniVersion": "0.4.0",
        "code": 11,
        "msg": "no address is left in web",
        "details": "node1: 62 assigned",
    }
    isolator.failure = NamespaceGone("gone")
    assert_cni_error(await call(isolator, "ADD"), 3, "gone")


async def test_an_unknown_network_lists_the_known_ones(isolator: FakeIsolator) -> None:
    reply = await call(isolator, "ADD", {"name": "wbe"})
    assert_cni_error(reply, 7, "wbe")
    assert body(reply)["details"] == "known networks: dual, web"


async def test_an_unexpected_failure_is_one_sentence(isolator: FakeIsolator) -> None:
    isolator.failure = ZeroDivisionError("secret")
    for command in ("ADD", "DEL"):
        reply = await call(isolator, command)
        assert_cni_error(reply, 100, "the agent's log")
        assert b"secret" not in reply.stdout


async def test_del_answers_nothing_for_what_is_there_and_what_is_not(isolator: FakeIsolator) -> None:
    await call(isolator, "ADD")
    for _ in range(2):
        assert await call(isolator, "DEL", CNI_NETNS=None) == Reply(0, b"")
    assert isolator.detached == [(KEY, ASKED)] * 2


@pytest.mark.parametrize("stdin", [b"\xff", b"[" * 100_000, b"{}", b"x" * (1 << 21), b'{"cniVersion":"9"}'])
async def test_del_works_by_its_key_whatever_stdin_holds(isolator: FakeIsolator, stdin: bytes) -> None:
    assert await call(isolator, "DEL", stdin) == Reply(0, b"")


async def test_the_spooled_dels_of_a_key_go_before_its_add(isolator: FakeIsolator) -> None:
    seen: list[tuple[EndpointKey, int]] = []

    async def drain(key: EndpointKey) -> None:
        seen.append((key, len(isolator.specs)))

    handler = handler_for(isolator, drain=drain)
    await handler(cni_request("ADD"))
    await handler(cni_request("DEL"))
    assert seen == [(KEY, 0)]


async def test_undo_is_a_del_asked_for_between_the_add_and_any_later_one(isolator: FakeIsolator) -> None:
    request = cni_request("ADD")
    await handler_for(isolator).undo(request)
    [(key, asked)] = isolator.detached
    assert (key, asked.boot_id, asked.at) == (KEY, request.asked.boot_id, request.asked.at + 1)


async def test_check_compares_with_what_add_returned(isolator: FakeIsolator) -> None:
    config = {"name": "web", "cniVersion": "0.4.0"}
    previous = body(await call(isolator, "ADD", config))
    assert await call(isolator, "CHECK", {**config, "prevResult": previous}) == Reply(0, b"")
    previous["ips"][0]["address"] = "10.1.0.200/32"
    reply = await call(isolator, "CHECK", {**config, "prevResult": previous})
    assert_cni_error(reply, 104, "10.1.0.200, which the endpoint lacks")


async def test_check_needs_prev_result_and_a_version_that_has_it(isolator: FakeIsolator) -> None:
    assert_cni_error(await call(isolator, "CHECK", {"name": "web", "cniVersion": "0.4.0"}), 7, "prevResult")
    assert_cni_error(await call(isolator, "CHECK", {"name": "web", "cniVersion": "0.3.1"}), 1, "0.4.0")


async def test_check_of_an_unknown_endpoint_fails(isolator: FakeIsolator) -> None:
    config = {"name": "web", "cniVersion": "1.0.0", "prevResult": {}}
    assert_cni_error(await call(isolator, "CHECK", config), 104, "c0ffee/eth0 is not attached")


async def test_status_says_50_and_why_while_add_cannot_work(isolator: FakeIsolator) -> None:
    config = {"name": "web", "cniVersion": "1.1.0"}
    assert await call(isolator, "STATUS", config, **NO_ENDPOINT) == Reply(0, b"")
    for error in (
        StoreUnavailable("etcd is down"),
        JournalUnwritable("the disk is full"),
        Exhausted("no address is left"),
        StoreError("a pool cannot be read"),
        InvalidInput("the node is a gateway"),
    ):
        isolator.failure = error
        assert_cni_error(await call(isolator, "STATUS", config, **NO_ENDPOINT), 50, str(error))


async def test_status_says_51_while_others_may_have_what_runs_here(isolator: FakeIsolator) -> None:
    isolator.failure = Fenced("another agent writes for this node")
    config = {"name": "web", "cniVersion": "1.1.0"}
    assert_cni_error(await call(isolator, "STATUS", config, **NO_ENDPOINT), 51, "another agent")


async def test_status_of_an_unknown_network_says_what_add_would(isolator: FakeIsolator) -> None:
    reply = await call(isolator, "STATUS", {"name": "wbe", "cniVersion": "1.1.0"}, **NO_ENDPOINT)
    assert_cni_error(reply, 7, "wbe")
    assert body(reply)["details"] == "known networks: dual, web"


GC: dict[str, Any] = {"name": "web", "cniVersion": "1.1.0", "cni.dev/valid-attachments": []}


async def test_gc_hands_on_what_the_engine_has_on_the_network_as_it_calls_it(isolator: FakeIsolator) -> None:
    listed = [{"containerID": "c0ffee", "ifname": "eth0"}, {"containerID": "decaf", "ifname": "net1"}]
    config = {**GC, "name": "pods", "network": "web", "cni.dev/valid-attachments": listed}
    assert await call(isolator, "GC", config, **NO_ENDPOINT) == Reply(0, b"")
    assert await call(isolator, "GC", GC, **NO_ENDPOINT) == Reply(0, b"")
    assert isolator.collected == [
        ValidAttachments("cni", "pods", frozenset({KEY, EndpointKey("decaf", "net1")}), ASKED),
        ValidAttachments("cni", "web", frozenset(), ASKED),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"cni.dev/valid-attachments": None},
        {"cni.dev/valid-attachments": {}},
        {"cni.dev/valid-attachments": "c0ffee"},
        {"cni.dev/valid-attachments": [None]},
        {"cni.dev/valid-attachments": ["c0ffee"]},
        {"cni.dev/valid-attachments": [{"containerID": "c0ffee"}]},
        {"cni.dev/valid-attachments": [{"containerID": "c0ffee", "ifname": ""}]},
        {"cni.dev/valid-attachments": [{"containerID": "c0ffee", "ifname": 0}]},
        {"cni.dev/valid-attachments": [{"containerID": "../c", "ifname": "eth0"}]},
        {"cni.dev/valid-attachments": [{"containerID": "c0ffee", "ifname": "eth0"}, {}]},
        {"name": ""},
        {"name": None},
        {"name": "web\n"},
        {"name": "x" * 256},
    ],
)
async def test_gc_without_a_list_beyond_doubt_removes_nothing(
    isolator: FakeIsolator, change: dict[str, Any]
) -> None:
    assert_cni_error(await call(isolator, "GC", {**GC, **change}, **NO_ENDPOINT), 7)
    missing = {key: value for key, value in GC.items() if key not in change}
    assert_cni_error(await call(isolator, "GC", missing, **NO_ENDPOINT), 7)
    assert isolator.collected == []


async def test_gc_needs_a_version_that_has_it(isolator: FakeIsolator) -> None:
    reply = await call(isolator, "GC", {**GC, "cniVersion": "1.0.0"}, **NO_ENDPOINT)
    assert_cni_error(reply, 1, "GC needs cniVersion 1.1.0")


async def test_gc_tells_of_all_that_is_left(isolator: FakeIsolator) -> None:
    isolator.failure = TryAgain("2 of 3 endpoints are not removed yet: a/eth0, b/eth0")
    assert_cni_error(await call(isolator, "GC", GC, **NO_ENDPOINT), 11, "a/eth0, b/eth0")


async def test_label_errors_reach_the_user(isolator: FakeIsolator) -> None:
    reply = await call(isolator, "ADD", labels_config(("moorage.netgroup", "x")))
    assert_cni_error(reply, 7, "did you mean moorage.netgroups?")


async def test_messages_with_undecodable_bytes_are_still_json(isolator: FakeIsolator) -> None:
    isolator.failure = InvalidInput("bad \udcff path")
    assert body(await call(isolator, "ADD"))["msg"] == "bad \\udcff path"
    assert_cni_error(await call(isolator, "ADD", CNI_NETNS="/x\udcff"), 4, "CNI_NETNS")


async def test_no_error_is_longer_than_a_screen(isolator: FakeIsolator) -> None:
    long = "x" * 5000
    for config in (
        {"name": long},
        {"name": "web", "cniVersion": long},
        labels_config(("moorage." + long, "")),
        labels_config(("moorage.pool", long)),
        labels_config(("moorage.ip", long)),
    ):
        reply = await call(isolator, "ADD", config)
        assert reply.exit == 1
        assert len(json.loads(reply.stdout)["msg"]) < 500
