"""The catalogue against a store that changes while it is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import pytest

from ipam import keys
from ipam.catalogue import FOLLOWED, Catalogue
from ipam.errors import Compacted, NotFound, StoreError, TryAgain
from ipam.networks import delete_network
from ipam.records import Network, Reservation
from ipam.reservations import reserve, unreserve
from ipam.store import Delete, Page, Put, Store, Txn, WatchBatch
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import network

IP = ip_address("10.64.0.7")


class Cache:
    """A catalogue cache in memory."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[bytes, int]] = {}

    def load_cache(self) -> list[tuple[str, bytes, int]]:
        return [(key, value, revision) for key, (value, revision) in self.rows.items()]

    def save_cache(self, changed: Iterable[tuple[str, bytes, int]], gone: Iterable[str]) -> None:
        self.rows |= {key: (value, revision) for key, value, revision in changed}
        for key in gone:
            self.rows.pop(key, None)


def catalogue(store: Store, cache: Cache | None = None) -> Catalogue:
    return Catalogue(store, cache or Cache(), lambda: None)


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, StoreError):
        await task


async def test_changes_are_followed(store: Store) -> None:
    known = catalogue(store)
    following = asyncio.create_task(known.follow())
    await network(store, "10.64.0.0/24")
    await eventually(lambda: known.names() == ["prod"] and known.pools())
    await reserve(store, IP, "db")
    await eventually(lambda: known.reserved(IP))
    await unreserve(store, IP)
    await eventually(lambda: not known.reserved(IP))
    await delete_network(store, "prod")
    await eventually(lambda: not known.names() and not known.pools())
    await stop(following)


async def test_a_change_between_snapshot_and_watch_is_not_missed(faulty: FaultyStore) -> None:
    known = catalogue(faulty)
    await network(faulty.store, "10.64.0.0/24")
    real = faulty.watch

    def watch(prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        async def late() -> AsyncIterator[WatchBatch]:
            await asyncio.sleep(0.05)
            async for batch in real(prefix, from_revision):
                yield batch

        return late()

    faulty.watch = watch
    following = asyncio.create_task(known.follow())
    await eventually(lambda: known.names() == ["prod"])
    await reserve(faulty.store, IP, "db")
    await eventually(lambda: known.reserved(IP))
    await stop(following)


async def test_a_snapshot_that_the_watch_has_overtaken_takes_nothing_back(faulty: FaultyStore) -> None:
    known = catalogue(faulty)
    await network(faulty.store, "10.64.0.0/24")
    following = asyncio.create_task(known.follow())
    await eventually(lambda: known.names() == ["prod"])
    await reserve(faulty.store, IP, "db")
    await eventually(lambda: known.reserved(IP))
    other, real = ip_address("10.64.0.8"), faulty.page

    async def page(start: str, end: str, **options: object) -> Page:
        answer = await real(start, end, **options)
        if start == keys.RESERVATIONS:
            # While the answer is on its way, one reservation ends and another begins, and the watch tells.
            await unreserve(faulty.store, IP)
            await reserve(faulty.store, other, "web")
            await eventually(lambda: known.reserved(other) and not known.reserved(IP))
        return answer

    faulty.page = page
    await known.refresh()
    assert known.reserved(other)
    assert not known.reserved(IP)
    await stop(following)


async def test_a_key_deleted_and_written_again_within_one_batch_is_there(faulty: FaultyStore) -> None:
    known = catalogue(faulty)
    await network(faulty.store, "10.64.0.0/24")
    await reserve(faulty.store, IP, "db")
    real, go = faulty.watch, asyncio.Event()

    def watch(prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        async def held_back() -> AsyncIterator[WatchBatch]:
            await go.wait()
            async for batch in real(prefix, from_revision):
                yield batch

        return held_back()

    faulty.watch = watch
    following = asyncio.create_task(known.follow())
    await eventually(lambda: known.reserved(IP))
    await unreserve(faulty.store, IP)
    await reserve(faulty.store, IP, "web")
    go.set()
    await eventually(lambda: (r := known.reserved(IP)) and r.reservation.key == "web")
    await stop(following)


async def test_a_network_whose_pools_were_not_heard_of_yet_is_looked_up_before_it_is_used(
    faulty: FaultyStore,
) -> None:
    known = catalogue(faulty)
    real = faulty.watch

    def watch(prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        return real("nothing/" if prefix == keys.POOLS else prefix, from_revision)

    faulty.watch = watch
    following = asyncio.create_task(known.follow())
    await eventually(lambda: known._heard.keys() >= set(FOLLOWED))
    await network(faulty.store, "10.64.0.0/24", "fd00:64::/64")
    await eventually(lambda: known.names() == ["prod"])
    assert known.pools() == []
    assert {p.family for p in known.pools_of(await known.network("prod"))} == {4, 6}
    await stop(following)


async def test_a_network_with_a_pool_that_cannot_be_read_is_refused_naming_it(store: Store) -> None:
    await network(store, "10.64.0.0/24")
    await store.txn(Txn(then=(Put(keys.POOLS + "10.64.0.0-24", b"garbage"),)))
    with pytest.raises(StoreError, match=r"pools that cannot be read: 10\.64\.0\.0-24"):
        await catalogue(store).network("prod")


async def test_an_unknown_network_is_looked_for_in_the_store_and_then_named_with_the_known_ones(
    store: Store,
) -> None:
    await network(store, "10.64.0.0/24")
    with pytest.raises(NotFound, match="known: prod"):
        await catalogue(store).network("nope")


async def test_of_a_network_that_is_not_known_here_nothing_is_said_while_the_store_is_away(
    faulty: FaultyStore,
) -> None:
    await network(faulty.store, "10.64.0.0/24")
    known = catalogue(faulty)
    faulty.down = True
    with pytest.raises(TryAgain, match="'prod' is not known here, and the store, which may have it"):
        await known.network("prod")
    faulty.down = False
    assert (await known.network("prod")).name == "prod"
    faulty.down = True
    assert (await known.network("prod")).name == "prod"
    with pytest.raises(TryAgain, match="'nope'"):
        await known.network("nope")


async def test_entries_that_make_no_sense_are_ignored_and_the_others_followed(store: Store) -> None:
    known = catalogue(store)
    following = asyncio.create_task(known.follow())
    bad = {
        keys.NETWORKS + "bad": b"garbage",
        keys.POOLS + "bad": b'{"name":"bad","cidr":"x","network":"bad","block_size":26}',
        keys.RESERVATIONS + "4/no-ip": Reservation(key="k", network="n").encode(),
    }
    await network(store, "10.64.0.0/24")
    await store.txn(Txn(then=tuple(Put(key, value) for key, value in bad.items())))
    await eventually(lambda: known.names() == ["prod"] and bad.keys() <= known._revisions.keys())
    await store.txn(Txn(then=tuple(Delete(key) for key in bad)))
    await reserve(store, IP, "db")
    await eventually(lambda: known.reserved(IP))
    assert not following.done()
    await stop(following)


async def test_a_compacted_watch_is_followed_from_a_new_snapshot(faulty: FaultyStore) -> None:
    known = catalogue(faulty)
    real, compacted = faulty.watch, [True] * 4

    def watch(prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        async def failing() -> AsyncIterator[WatchBatch]:
            if compacted:
                compacted.pop()
                raise Compacted("gone (test)", 1)
            async for batch in real(prefix, from_revision):
                yield batch

        return failing()

    faulty.watch = watch
    following = asyncio.create_task(known.follow())
    await network(faulty.store, "10.64.0.0/24")
    await eventually(lambda: known.names() == ["prod"])
    await stop(following)


async def test_a_store_that_fails_while_it_is_followed_is_a_store_error_and_no_group(
    faulty: FaultyStore,
) -> None:
    def watch(prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        async def failing() -> AsyncIterator[WatchBatch]:
            raise StoreError(f"{prefix} cannot be watched (test)")
            yield

        return failing()

    faulty.watch = watch
    with pytest.raises(StoreError, match="cannot be watched"):
        await catalogue(faulty).follow()


async def test_it_is_known_again_after_a_restart_while_the_store_is_away(faulty: FaultyStore) -> None:
    cache = Cache()
    await network(faulty.store, "10.64.0.0/24")
    await catalogue(faulty, cache).refresh()
    faulty.down = True
    again = catalogue(faulty, cache)
    again.load()
    assert isinstance(await again.network("prod"), Network)


async def test_what_the_journal_remembers_of_a_newer_store_does_not_win_over_a_restored_one(
    store: Store,
) -> None:
    await network(store, "10.64.0.0/24")
    cache = Cache()
    await catalogue(store, cache).refresh()
    key = keys.NETWORKS + "prod"
    cache.rows[key] = (Network(name="prod", pools=[], warm=99).encode(), 10_000)
    known = catalogue(store, cache)
    known.load()
    await known.refresh()
    assert [net.warm for net in known.networks()] == [4]


async def test_a_refresh_does_not_put_what_it_read_before_over_what_was_told_meanwhile(
    faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = catalogue(faulty)
    real = faulty.page
    read: dict[str, int] = {}

    async def page(start: str, end: str, **options: Any) -> Page:
        if start == FOLLOWED[1]:
            # What was read first is deleted while the next prefix is, and the watch says so at once.
            monkeypatch.setattr(faulty, "page", real)
            await delete_network(faulty.store, "prod")
            async for batch in faulty.watch(FOLLOWED[0], read[FOLLOWED[0]] + 1):
                known._deliver(FOLLOWED[0], batch)
                break
        answer = await real(start, end, **options)
        read[start] = answer.revision
        return answer

    await known.refresh()
    await network(faulty.store, "10.64.0.0/24")
    monkeypatch.setattr(faulty, "page", page)
    await known.refresh()
    assert known.names() == []
