"""The fence: one writer a node, and every write exactly once, whatever happens to requests and replies."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
from pathlib import Path

import pytest

import ipam.writer
from ipam import keys
from ipam.errors import Fenced, StoreError, StoreUnavailable
from ipam.records import Alive, Fence
from ipam.store import Delete, Put, Store, Txn, absent, open_store, read_prefix
from ipam.writer import GROUP, Outcome, StoreRewound, Write, Writer
from tests.ipam.faulty import FaultyStore, eventually


def writer(store: Store, instance: str = "a", boot_id: str = "boot") -> Writer:
    return Writer(store, "n1", instance, boot_id)


def put(key: str, value: str, base: int = 0) -> Write:
    return Write(f"x/{key}", value.encode(), base)


async def values(store: Store) -> dict[str, str]:
    items, _ = await read_prefix(store, "x/")
    return {kv.key: kv.value.decode() for kv in items}


async def test_each_write_of_a_group_has_its_own_verdict(store: Store) -> None:
    await store.txn(Txn(then=(Put("x/theirs", b"1"),)))
    w = writer(store)
    await w.claim(0)
    done, refused, gone = await w.commit([put("mine", "1"), put("theirs", "2"), Write("x/never", None, 0)])
    assert (done.done, refused.done, gone.done) == (True, False, True)
    assert refused.found is not None
    assert refused.found.value == b"1"
    assert await values(store) == {"x/mine": "1", "x/theirs": "1"}


async def test_a_guard_that_fails_refuses_only_its_own_write(store: Store) -> None:
    await store.txn(Txn(then=(Put("guard", b"1"),)))
    w = writer(store)
    await w.claim(0)
    guarded = Write("x/a", b"1", 0, (absent("guard"),))
    assert [o.done for o in await w.commit([guarded, put("b", "1")])] == [False, True]


async def test_a_full_group_fits_one_transaction(store: Store) -> None:
    w = writer(store)
    await w.claim(0)
    writes = [Write(f"x/{i}", b"1", 0, (absent(f"y/{i}"),)) for i in range(GROUP)]
    assert all(outcome.done for outcome in await w.commit(writes))


async def test_nothing_is_written_before_the_fence_is_claimed(store: Store) -> None:
    with pytest.raises(StoreError, match="claimed first"):
        await writer(store).commit([put("a", "1")])


@pytest.mark.parametrize("fault", ["refused", "reply lost", "late"])
async def test_a_write_whose_reply_is_lost_takes_effect_once_and_the_verdict_is_right(
    faulty: FaultyStore, fault: str
) -> None:
    w = writer(faulty)
    await w.claim(0)
    await faulty.store.txn(Txn(then=(Put("x/theirs", b"1"),)))
    faulty.faults(fault, fault)
    done, refused = await w.commit([put("a", "1"), put("theirs", "2")])
    assert (done.done, refused.done) == (True, False)
    seq = w.seq
    await faulty.deliver()
    assert await values(faulty.store) == {"x/a": "1", "x/theirs": "1"}
    kv = await faulty.store.get(keys.WRITERS + "n1")
    assert kv is not None
    assert Fence.decode(kv.key, kv.value).seq == seq


@pytest.mark.parametrize("fault", ["reply lost", "late"])
async def test_a_claim_whose_reply_is_lost_is_held(faulty: FaultyStore, fault: str) -> None:
    faulty.faults(fault)
    w = writer(faulty)
    assert await w.claim(0)
    await faulty.deliver()
    assert [o.done for o in await w.commit([put("a", "1")])] == [True]


async def test_an_instance_whose_fence_was_taken_can_never_write_again(store: Store) -> None:
    old, new = writer(store, "old"), writer(store, "new")
    await old.claim(0)
    await new.claim(0)
    with pytest.raises(Fenced, match="took over node n1"):
        await old.commit([put("a", "old")])
    await new.commit([put("a", "new")])
    with pytest.raises(StoreError):
        await old.commit([put("b", "old")])
    assert await values(store) == {"x/a": "new"}


async def test_what_a_fenced_instance_had_sent_cannot_land_later(faulty: FaultyStore) -> None:
    old, new = writer(faulty, "old"), writer(faulty.store, "new")
    await old.claim(0)
    faulty.fault = lambda _: "late"
    sending = asyncio.create_task(old.commit([put("a", "old")]))
    await eventually(lambda: faulty.late)
    await new.claim(0)
    faulty.fault = lambda _: ""
    with pytest.raises(Fenced):
        await sending
    assert not any(result.succeeded for result in await faulty.deliver())
    assert await values(faulty.store) == {}


async def test_after_a_cancelled_commit_the_next_one_needs_a_new_claim(faulty: FaultyStore) -> None:
    w = writer(faulty)
    await w.claim(0)
    faulty.fault = lambda _: "late"
    sending = asyncio.create_task(w.commit([put("a", "first")]))
    await eventually(lambda: faulty.late)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    faulty.fault = lambda _: ""
    with pytest.raises(StoreError, match="claimed first"):
        await w.commit([put("a", "second")])
    assert await w.claim(w.seq)
    await faulty.deliver()
    assert [o.done for o in await w.commit([put("a", "second")])] == [True]
    assert await values(faulty.store) == {"x/a": "second"}


async def test_a_new_claim_of_the_same_instance_is_no_rewound_store(store: Store) -> None:
    w = writer(store)
    await w.claim(0)
    await w.commit([put("a", "1")])
    assert await w.claim(w.seq)


async def test_a_node_that_was_removed_is_fenced_and_has_to_assert_anew(store: Store) -> None:
    w = writer(store)
    await w.claim(0)
    await w.commit([put("a", "1")])
    await store.txn(Txn(then=(Delete(keys.WRITERS + "n1"),)))
    with pytest.raises(Fenced, match="removed from the store"):
        await w.commit([put("b", "1")])
    assert not await w.claim(w.seq)


async def test_who_lost_the_fence_leaves_the_new_agent_time_to_say_that_it_lives(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = writer(store, "old"), writer(store, "new")
    await old.claim(0)
    await new.claim(0)
    with pytest.raises(Fenced, match="instance new"):
        await old.claim(old.seq)
    assert [outcome.done for outcome in await new.commit([put("a", "1")])] == [True]
    # It never did: it is dead, and the old one goes on.
    monkeypatch.setattr(ipam.writer, "SHOWS_WITHIN", 0.0)
    await old.claim(old.seq)
    assert [outcome.done for outcome in await old.commit([put("b", "1")])] == [True]


async def test_an_agent_alive_on_another_boot_keeps_the_fence(store: Store) -> None:
    alive = Alive(instance="other", boot_id="other-boot").encode()
    await store.txn(Txn(then=(Put(keys.ALIVE + "n1", alive),)))
    with pytest.raises(Fenced, match=r"another agent runs as node n1 \(instance other\)"):
        await writer(store).claim(0)


async def test_an_agent_of_the_same_boot_takes_over_at_once(store: Store) -> None:
    await store.txn(Txn(then=(Put(keys.ALIVE + "n1", Alive(instance="other", boot_id="boot").encode()),)))
    assert await writer(store).claim(0)


async def restored(tmp_path: Path, writes: int) -> tuple[Store, Writer, int]:
    """A store restored to before the last ``writes``, a writer on it that knows nothing, the last seq."""
    store = await open_store(f"sqlite://{tmp_path}/live.db")
    w = writer(store)
    await w.claim(0)
    await w.commit([put("before", "1")])
    await store.close()
    shutil.copy(tmp_path / "live.db", tmp_path / "backup.db")
    store = await open_store(f"sqlite://{tmp_path}/live.db")
    w = writer(store, "b")
    await w.claim(w.seq)
    for i in range(writes):
        await w.commit([put(f"after-{i}", "1")])
    await store.close()
    return await open_store(f"sqlite://{tmp_path}/backup.db"), w, w.seq


async def test_a_restored_backup_is_noticed_by_the_next_commit(tmp_path: Path) -> None:
    store, w, _ = await restored(tmp_path, 3)
    w._store = store
    with pytest.raises((StoreRewound, Fenced)):
        await w.commit([put("x", "1")])
    assert "x/x" not in await values(store)
    await store.close()


async def test_a_restored_backup_is_noticed_by_the_next_claim(tmp_path: Path) -> None:
    store, _, seq = await restored(tmp_path, 3)
    assert not await writer(store, "c").claim(seq)
    await store.close()


async def test_a_restored_backup_is_noticed_again_until_a_sync_was_completed(tmp_path: Path) -> None:
    store, _, seq = await restored(tmp_path, 1)
    faulty = FaultyStore(store)
    for instance in "cdefgh":
        faulty.faults(random.choice(["", "reply lost"]))
        assert not await writer(faulty, instance).claim(seq)
    await store.close()


class Model:
    """What should stand under each key, told by the verdicts alone."""

    def __init__(self) -> None:
        self.value: dict[str, str] = {}
        self.base: dict[str, int] = {}

    def learn(self, write: Write, outcome: Outcome) -> None:
        if outcome.done and write.value is not None:
            self.value[write.key] = write.value.decode()
        elif outcome.done or outcome.found is None:
            self.value.pop(write.key, None)
        else:
            self.value[write.key] = outcome.found.value.decode()
        self.base[write.key] = outcome.revision


@pytest.mark.parametrize("seed", range(20))
async def test_every_write_takes_effect_exactly_once_whatever_is_lost_delayed_or_stolen(
    store: Store, seed: int
) -> None:
    print(f"seed {seed}")
    dice = random.Random(seed)
    faulty = FaultyStore(store)
    model, instances, fenced = Model(), 1, []
    w = writer(faulty, "i0")
    w_claimed = False
    faulty.fault = lambda _: dice.choices(["", "refused", "reply lost", "late"], [6, 1, 2, 2])[0]
    for step in range(40):
        if dice.random() < 0.2:
            await faulty.deliver()
        if not w_claimed:
            while not w_claimed:
                with contextlib.suppress(StoreUnavailable):
                    w_claimed = await w.claim(w.seq)
            # What a claim ends is final: the truth is what stands there now.
            items, _ = await read_prefix(store, "x/")
            model.value = {kv.key: kv.value.decode() for kv in items}
            model.base = {kv.key: kv.mod_revision for kv in items}
        if dice.random() < 0.1:
            fenced.append(w)
            w = writer(faulty, f"i{instances}")
            instances, w_claimed = instances + 1, False
            continue
        keys_written = dice.sample([f"x/{c}" for c in "abcdef"], dice.randint(1, 4))
        writes = []
        for key in keys_written:
            base = model.base.get(key, 0) if dice.random() < 0.8 else 999_999
            writes.append(Write(key, None if dice.random() < 0.3 else f"{seed}.{step}.{key}".encode(), base))
        before = dict(model.value)
        for write, outcome in zip(writes, await w.commit(writes), strict=True):
            should = write.base == model.base.get(write.key, 0) or (
                write.value is None and write.key not in before
            )
            assert outcome.done == should, (seed, step, write, outcome)
            model.learn(write, outcome)
        assert await values(store) == model.value, (seed, step)
        if fenced and dice.random() < 0.3:
            # It holds the fence no more, so it is told so, and nothing it sent lands.
            with pytest.raises((Fenced, StoreError)):
                await dice.choice(fenced).commit([put("zombie", "1")])
    await faulty.deliver()
    assert await values(store) == model.value


async def test_a_predecessor_that_a_restored_store_brings_back_is_told_from_another_agent_by_its_state(
    store: Store,
) -> None:
    one = Writer(store, "n1", "now", "boot", state_id="s1")
    await one.claim(0)
    await one.commit([put("a", "1")])
    back = Fence(instance="before", boot_id="boot", seq=0).encode()
    await store.txn(Txn(then=(Put(keys.WRITERS + "n1", back),)))
    for state, refused in (("s2", True), ("", True), ("s1", False)):
        alive = Alive(instance="before", boot_id="boot", state_id=state).encode()
        await store.txn(Txn(then=(Put(keys.ALIVE + "n1", alive),)))
        with pytest.raises(Fenced) if refused else contextlib.nullcontext():
            await one.claim(1)
