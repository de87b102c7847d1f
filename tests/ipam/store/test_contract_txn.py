"""Every store: transactions, revisions and compares."""

from __future__ import annotations

import asyncio

import pytest

from ipam.errors import StoreError, StoreUnavailable
from ipam.store import (
    MAX_OPS,
    Compare,
    Delete,
    Get,
    KeyValue,
    Put,
    Store,
    Txn,
    TxnResult,
    absent,
    none_between,
    prefix_end,
    unchanged,
)


async def put(store: Store, key: str, value: bytes = b"") -> int:
    return (await store.txn(Txn(then=(Put(key, value),)))).revision


async def revision_of(store: Store) -> int:
    return (await store.txn(Txn())).revision


async def held(store: Store, *compares: Compare) -> bool:
    return (await store.txn(Txn(compares))).succeeded


# --- revisions


async def test_a_store_is_empty_and_has_a_revision_that_can_be_watched_from(store: Store) -> None:
    page = await store.page("", "\x7f")
    assert page.items == ()
    assert page.next_key is None
    assert page.revision >= 1


async def test_a_written_key_carries_the_revision_that_wrote_it(store: Store) -> None:
    first = await put(store, "a", b"1")
    second = await put(store, "a", b"2")
    assert second == first + 1
    assert await store.get("a") == KeyValue("a", b"2", first, second)


async def test_all_keys_of_a_transaction_share_one_revision(store: Store) -> None:
    before = await revision_of(store)
    nested = Txn(then=(Put("b", b""), Txn(then=(Put("c", b""),))))
    result = await store.txn(Txn(then=(Put("a", b""), nested)))
    assert result.revision == before + 1
    assert [(await store.get(key)).mod_revision for key in "abc"] == [before + 1] * 3
    assert result.results[1].revision == result.results[1].results[1].revision == before + 1


async def test_a_transaction_that_writes_nothing_does_not_raise_the_revision(store: Store) -> None:
    await put(store, "a")
    before = await revision_of(store)
    for txn in (
        Txn(),
        Txn(then=(Get("a"),)),
        Txn(then=(Delete("nobody"),)),
        Txn((absent("a"),), (Put("a", b""),), (Get("a"),)),
        Txn(then=(Txn((absent("a"),), (Put("a", b""),)),)),
    ):
        assert (await store.txn(txn)).revision == before
    assert await revision_of(store) == before


async def test_a_key_written_anew_after_its_deletion_starts_a_new_life(store: Store) -> None:
    await put(store, "a", b"old")
    await store.txn(Txn(then=(Delete("a"),)))
    assert await store.get("a") is None
    revision = await put(store, "a", b"new")
    assert await store.get("a") == KeyValue("a", b"new", revision, revision)


async def test_delete_says_how_many_keys_it_deleted(store: Store) -> None:
    await put(store, "a")
    assert (await store.txn(Txn(then=(Delete("a"), Delete("b"))))).results == (1, 0)


async def test_values_are_bytes_of_any_kind(store: Store) -> None:
    for value in (b"", b"\0\xff\n", bytes(range(256)) * 400):
        await put(store, "a", value)
        assert (await store.get("a")).value == value


# --- compares


async def test_unchanged_holds_until_somebody_writes(store: Store) -> None:
    await put(store, "a")
    read = await store.get("a")
    assert await held(store, unchanged(read))
    await put(store, "a")
    assert not await held(store, unchanged(read))


async def test_unchanged_fails_for_a_key_deleted_and_written_anew(store: Store) -> None:
    await put(store, "a")
    read = await store.get("a")
    await store.txn(Txn(then=(Delete("a"),)))
    assert not await held(store, unchanged(read))
    await put(store, "a", read.value)
    assert not await held(store, unchanged(read))


async def test_absent_holds_only_without_the_key(store: Store) -> None:
    await put(store, "ab")
    assert await held(store, absent("a"), absent("abc"))
    assert not await held(store, absent("ab"))
    assert not await held(store, absent("a"), absent("ab"))


async def test_none_between_looks_at_start_but_not_at_end(store: Store) -> None:
    await put(store, "b")
    assert await held(store, none_between("a", "b"))
    assert not await held(store, none_between("b", "c"))
    assert not await held(store, none_between("a", "c"))
    assert await held(store, none_between("b0", "c"))
    await store.txn(Txn(then=(Delete("b"),)))
    assert await held(store, none_between("a", "c"))


async def test_a_block_is_given_back_only_without_an_address_in_its_range(store: Store) -> None:
    await put(store, "blocks/4/0a000000", b"mine")
    await put(store, "addresses/4/0a00003f")
    block = await store.get("blocks/4/0a000000")
    give_back = Txn(
        (unchanged(block), none_between("addresses/4/0a000000", "addresses/4/0a000040")),
        (Delete(block.key),),
    )
    assert not (await store.txn(give_back)).succeeded
    await store.txn(Txn(then=(Delete("addresses/4/0a00003f"), Put("addresses/4/0a000040", b""))))
    assert (await store.txn(give_back)).succeeded
    assert await store.get(block.key) is None


async def test_a_compare_over_a_range_can_only_ask_for_absence(store: Store) -> None:
    with pytest.raises(ValueError, match="absence"):
        await store.txn(Txn((Compare("a", 1, "b"),)))


async def test_a_failed_compare_runs_orelse_and_shows_who_was_faster(store: Store) -> None:
    await put(store, "a", b"faster")
    result = await store.txn(Txn((absent("a"),), (Put("a", b"slower"),), (Get("a"), Get("b"))))
    assert not result.succeeded
    assert result.results == (await store.get("a"), None)


# --- nested


async def test_one_stale_among_a_hundred_leaves_ninety_nine_committed(store: Store) -> None:
    await put(store, "k042", b"somebody else's")
    requests = tuple(
        Txn((absent(f"k{i:03}"),), (Put(f"k{i:03}", b"mine"),), (Get(f"k{i:03}"),)) for i in range(100)
    )
    result = await store.txn(Txn(then=requests))
    verdicts = [nested.succeeded for nested in result.results if isinstance(nested, TxnResult)]
    assert verdicts == [i != 42 for i in range(100)]
    assert result.results[42].results[0].value == b"somebody else's"
    page = await store.page("k", "l")
    assert [kv.value for kv in page.items].count(b"mine") == 99


async def test_an_outer_compare_that_fails_runs_nothing_nested(store: Store) -> None:
    await put(store, "fence")
    result = await store.txn(Txn((absent("fence"),), (Put("fence", b""), Txn(then=(Put("a", b""),)))))
    assert result == TxnResult(False, await revision_of(store), ())
    assert await store.get("a") is None


async def test_compares_see_the_state_before_the_transaction(store: Store) -> None:
    second = Txn((absent("a"),), (Put("saw", b"nothing"),), (Put("saw", b"the put"),))
    await store.txn(Txn(then=(Put("a", b""), second)))
    assert (await store.get("saw")).value == b"nothing"


async def test_a_get_sees_what_was_written_before_it(store: Store) -> None:
    await put(store, "a", b"old")
    result = await store.txn(
        Txn(then=(Get("a"), Put("a", b"new"), Get("a"), Txn(then=(Delete("b"), Get("a")))))
    )
    assert result.results[0].value == b"old"
    assert result.results[2].value == result.results[3].results[1].value == b"new"
    assert result.results[2].mod_revision == result.revision


# --- refused


@pytest.mark.parametrize(
    "txn",
    [
        Txn(then=(Put("a", b""), Put("a", b""))),
        Txn(then=(Put("a", b""), Delete("a"))),
        Txn(then=(Delete("a"), Delete("a"))),
        Txn(then=(Put("a", b""), Txn(then=(Put("a", b""),)))),
        Txn(then=(Txn(then=(Put("a", b""),)), Txn((absent("b"),), (), (Delete("a"),)))),
        Txn((absent("b"),), (), (Put("a", b""), Put("a", b""))),
        Txn(then=(Txn(then=(Txn(then=(Put("a", b""),)), Delete("a"))),)),
    ],
)
async def test_a_key_that_could_be_written_twice_is_refused(store: Store, txn: Txn) -> None:
    before = await revision_of(store)
    with pytest.raises(ValueError, match="key a would be written twice"):
        await store.txn(txn)
    assert await revision_of(store) == before


async def test_then_and_orelse_may_write_the_same_key(store: Store) -> None:
    txn = Txn((absent("a"),), (Put("a", b"then"),), (Put("a", b"orelse"),))
    assert (await store.txn(Txn(then=(txn,)))).succeeded
    await store.txn(Txn(then=(txn,)))
    assert (await store.get("a")).value == b"orelse"


def puts(count: int, prefix: str = "k") -> tuple[Put, ...]:
    return tuple(Put(f"{prefix}{i}", b"") for i in range(count))


@pytest.mark.parametrize(
    "txn",
    [
        Txn(then=puts(MAX_OPS)),
        Txn(then=(Txn(then=puts(MAX_OPS - 1)),)),
        Txn(then=tuple(Txn(then=puts(1, f"{i}-")) for i in range(64))),
        Txn(then=tuple(Txn(then=puts(64, f"{i}-")) for i in range(64))),
        Txn(tuple(absent(f"k{i}") for i in range(MAX_OPS)), puts(MAX_OPS)),
    ],
    ids=["flat", "nested", "64x1", "64x64", "compares"],
)
async def test_a_transaction_at_the_limit_is_taken(store: Store, txn: Txn) -> None:
    assert (await store.txn(txn)).succeeded


@pytest.mark.parametrize(
    "txn",
    [
        Txn(then=puts(MAX_OPS + 1)),
        Txn(orelse=puts(MAX_OPS + 1)),
        Txn(then=(Txn(then=puts(MAX_OPS)),)),
        Txn(then=tuple(Txn(then=puts(64, f"{i}-")) for i in range(65))),
        Txn(tuple(absent(f"k{i}") for i in range(MAX_OPS + 1))),
    ],
    ids=["flat", "orelse", "nested", "65x64", "compares"],
)
async def test_a_transaction_beyond_the_limit_is_refused(store: Store, txn: Txn) -> None:
    before = await revision_of(store)
    with pytest.raises(ValueError, match="128"):
        await store.txn(txn)
    assert await revision_of(store) == before


@pytest.mark.parametrize("key", ["", "münchen"])
async def test_a_key_is_ascii_and_not_empty(store: Store, key: str) -> None:
    for attempt in (
        store.get(key),
        store.txn(Txn(then=(Put(key, b""),))),
        store.txn(Txn((absent(key),))),
    ):
        with pytest.raises(ValueError, match="no key"):
            await attempt


async def test_a_put_on_an_unknown_lease_applies_nothing(store: Store) -> None:
    before = await revision_of(store)
    with pytest.raises(StoreError, match="lease"):
        await store.txn(Txn(then=(Put("a", b""), Txn(then=(Put("b", b"", 4711),)))))
    assert await store.get("a") is None
    assert await revision_of(store) == before


async def test_a_closed_store_says_so(store: Store) -> None:
    await store.close()
    await store.close()
    for attempt in (store.get("a"), store.page("a", "b"), store.txn(Txn()), store.lease(1)):
        with pytest.raises(StoreUnavailable, match="closed"):
            await attempt


async def test_a_cancelled_caller_harms_nobody(store: Store) -> None:
    for i in range(20):
        task = asyncio.create_task(put(store, f"k{i:02}"))
        await asyncio.sleep(0 if i % 2 else 0.0003)
        task.cancel()
    await put(store, "last")
    page = await store.page("k", prefix_end("k"))
    assert [kv.key for kv in page.items] == sorted(kv.key for kv in page.items)
    assert await store.get("last") is not None
