from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from ipam import intents, keys
from ipam.errors import InvalidInput, TryAgain
from ipam.intents import Answerer, IntentServer, ask
from ipam.records import Alive, Intent, IntentKind
from ipam.store import Put, Store, Txn, TxnResult, read_prefix
from tests.patience import PATIENCE

VERIFY = Intent(kind=IntentKind.VERIFY, ip="10.64.0.1")


async def alive(store: Store, node: str = "n1") -> None:
    await store.txn(Txn(then=(Put(keys.ALIVE + node, Alive(instance="i", boot_id="b").encode()),)))


@asynccontextmanager
async def answering(store: Store, answer: Answerer) -> AsyncIterator[None]:
    task = asyncio.create_task(IntentServer(store, "n1", answer).run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def echo(intent: Intent) -> dict[str, Any]:
    return {"done": True, "why": f"{intent.ip} seen"}


async def test_an_intent_is_answered_and_removed(store: Store) -> None:
    await alive(store)
    async with answering(store, echo):
        assert await ask(store, "n1", VERIFY) == {"done": True, "why": "10.64.0.1 seen"}
    assert (await read_prefix(store, keys.INTENTS))[0] == []


async def test_an_intent_that_was_left_before_the_agent_came_is_answered(store: Store) -> None:
    await alive(store)
    asking = asyncio.create_task(ask(store, "n1", VERIFY))
    await asyncio.sleep(0.05)
    async with answering(store, echo):
        assert (await asking)["done"]


async def test_a_node_whose_agent_is_not_running_is_not_asked(store: Store) -> None:
    with pytest.raises(TryAgain, match="agent of node n1 is not running"):
        await ask(store, "n1", VERIFY)


async def test_an_agent_that_does_not_answer_in_time_leaves_nothing_behind(store: Store) -> None:
    await alive(store)
    with pytest.raises(TryAgain, match=r"agent of node n1 did not answer"):
        await ask(store, "n1", VERIFY, timeout=0.1)
    assert (await read_prefix(store, keys.INTENTS))[0] == []


async def test_each_intent_is_answered_once(store: Store) -> None:
    seen: list[str] = []

    async def count(intent: Intent) -> dict[str, Any]:
        seen.append(intent.ip)
        return {}

    await alive(store)
    async with answering(store, count):
        await asyncio.gather(*(ask(store, "n1", VERIFY.with_(ip=f"10.64.0.{i}")) for i in range(20)))
    assert sorted(seen) == sorted(f"10.64.0.{i}" for i in range(20))


async def test_an_intent_that_nobody_waits_for_is_not_acted_upon(store: Store) -> None:
    late = VERIFY.with_(ip="10.64.0.99")
    seen: list[str] = []

    async def count(intent: Intent) -> dict[str, Any]:
        seen.append(intent.ip)
        return {}

    await alive(store)
    await store.txn(Txn(then=(Put(f"{keys.INTENTS}n1/late", late.encode()),)))
    async with answering(store, count):
        await ask(store, "n1", VERIFY)
    assert seen == ["10.64.0.1"]
    assert (await read_prefix(store, keys.INTENTS))[0] == []


async def test_an_intent_whose_asker_gave_up_while_others_were_answered_is_not_acted_upon(
    store: Store,
) -> None:
    seen: list[str] = []
    gave_up = asyncio.Event()

    async def slowly(intent: Intent) -> dict[str, Any]:
        seen.append(intent.ip)
        await gave_up.wait()
        return {}

    await alive(store)
    async with answering(store, slowly):
        first = asyncio.create_task(ask(store, "n1", VERIFY))
        async with asyncio.timeout(PATIENCE):
            while not seen:
                await asyncio.sleep(0.005)
        with pytest.raises(TryAgain, match="did not answer"):
            await ask(store, "n1", VERIFY.with_(ip="10.64.0.99"), timeout=0.1)
        gave_up.set()
        await first
        await ask(store, "n1", VERIFY)
    assert seen == ["10.64.0.1", "10.64.0.1"]


@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.parametrize("kind", IntentKind)
async def test_the_clocks_of_asker_and_answerer_may_be_an_hour_apart(
    store: Store, monkeypatch: pytest.MonkeyPatch, kind: IntentKind, hours: int
) -> None:
    """In one process: as soon as the intent stands in the store, the clock is the answerer's."""
    await alive(store)
    now = time.time
    sent = store.txn

    async def elsewhere(txn: Txn) -> TxnResult:
        monkeypatch.setattr(time, "time", lambda: now() + hours * 3600)
        return await sent(txn)

    monkeypatch.setattr(store, "txn", elsewhere)
    async with answering(store, echo):
        assert (await ask(store, "n1", Intent(kind=kind, ip="10.64.0.1"), timeout=PATIENCE))["done"]


@pytest.mark.parametrize("raw", [b"nonsense", b"{}", b'{"kind": "eat"}', b"[" * 5000])
async def test_a_malformed_intent_is_removed_and_the_next_one_answered(store: Store, raw: bytes) -> None:
    await alive(store)
    await store.txn(Txn(then=(Put(f"{keys.INTENTS}n1/bad", raw),)))
    async with answering(store, echo):
        assert (await ask(store, "n1", VERIFY))["done"]
    assert (await read_prefix(store, keys.INTENTS))[0] == []


@pytest.mark.parametrize("error", [InvalidInput("refused so"), ValueError("a bug")])
async def test_an_intent_that_fails_is_answered_and_the_next_one_too(store: Store, error: Exception) -> None:
    async def fail(intent: Intent) -> dict[str, Any]:
        if intent.ip == "bad":
            raise error
        return {"done": True}

    await alive(store)
    async with answering(store, fail):
        answer = await ask(store, "n1", VERIFY.with_(ip="bad"))
        assert not answer["done"]
        assert str(error) in answer["why"] or "its log says why" in answer["why"]
        assert (await ask(store, "n1", VERIFY))["done"]


async def test_an_answer_keeps_the_fields_that_a_newer_asker_wrote(store: Store) -> None:
    await alive(store)
    newer = VERIFY.with_(unknown={"colour": "red"})
    lease = await store.lease(PATIENCE)
    await store.txn(Txn(then=(Put(f"{keys.INTENTS}n1/x", newer.encode(), lease.id),)))
    async with answering(store, echo):
        async with asyncio.timeout(PATIENCE):
            while (kv := await store.get(f"{keys.INTENTS}n1/x")) and not Intent.decode(
                kv.key, kv.value
            ).answer:
                await asyncio.sleep(0.005)
    assert kv is not None
    assert Intent.decode(kv.key, kv.value).unknown == {"colour": "red"}
    assert Intent.decode(kv.key, kv.value).answer == {"done": True, "why": "10.64.0.1 seen"}


async def test_intents_are_listed_anew_now_and_then_because_a_watch_may_be_deaf(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intents, "RELIST", 0.05)
    await alive(store)

    async def deaf(prefix: str, from_revision: int) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    asking = store.watch
    served = asyncio.create_task(IntentServer(store, "n1", echo).run())
    with monkeypatch.context() as patch:
        patch.setattr(store, "watch", lambda p, r: (deaf if p.endswith("/") else asking)(p, r))
        assert (await ask(store, "n1", VERIFY, timeout=PATIENCE))["done"]
    served.cancel()
