"""What the book knows of nodes: who lives, and since when the others are away, without a break."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ipam import keys
from ipam.records import Alive, Node
from ipam.store import Delete, Page, Put, Store, Txn
from marathon.book import Book
from marathon.facts import NodeFacts


@pytest.fixture
async def book(store: Store) -> AsyncIterator[Book]:
    """One that follows the store, with n1 that lives and n2 that does not."""
    await write(store, record("n1"), sign_of("n1"), record("n2"))
    book = Book(store)
    following = asyncio.create_task(book.follow())
    await book.listed.wait()
    yield book
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


def record(name: str, mesos_agent: str = "S1") -> Put:
    return Put(keys.NODES + name, Node(name=name, version="1", mesos_agent=mesos_agent).encode())


def sign_of(name: str) -> Put:
    return Put(keys.ALIVE + name, Alive(instance="i", boot_id="b").encode())


async def write(store: Store, *operations: Put | Delete) -> None:
    await store.txn(Txn(then=operations))


async def until_it_knows(book: Book, name: str, *, alive: bool, mesos_agent: str = "S1") -> NodeFacts:
    async with asyncio.timeout(15):
        while True:
            known = book.nodes().get(name)
            if known is not None and (known.alive, known.mesos_agent) == (alive, mesos_agent):
                return known
            await asyncio.sleep(0.01)


async def test_a_node_is_away_since_its_sign_of_life_was_seen_to_end(store: Store, book: Book) -> None:
    before = time.monotonic()
    await write(store, Delete(keys.ALIVE + "n1"))
    left = (await until_it_knows(book, "n1", alive=False)).away_since
    assert left is not None
    assert before <= left <= time.monotonic()


async def test_one_that_was_never_seen_is_away_since_the_book_was_begun(store: Store, book: Book) -> None:
    begun = book.nodes()["n2"].away_since
    assert begun is not None
    assert begun <= time.monotonic()
    await book.refresh()
    assert book.nodes()["n2"].away_since == begun


async def test_listing_everything_anew_ends_no_absence_and_begins_none(store: Store, book: Book) -> None:
    await write(store, Delete(keys.ALIVE + "n1"), sign_of("n2"))
    left = await until_it_knows(book, "n1", alive=False)
    await until_it_knows(book, "n2", alive=True)
    await book.refresh()
    assert book.nodes()["n1"].away_since == left.away_since
    assert book.nodes()["n2"].alive


async def test_an_agent_that_was_back_so_briefly_that_nobody_saw_it_was_back(
    store: Store, book: Book
) -> None:
    before = book.nodes()["n2"]
    await write(store, record("n2", "S7"), sign_of("n2"))
    await write(store, Delete(keys.ALIVE + "n2"))
    after = await until_it_knows(book, "n2", alive=False, mesos_agent="S7")
    assert after.away_since is not None
    assert before.away_since is not None
    assert after.away_since > before.away_since
    assert after.revision > before.revision


async def test_while_it_is_listed_anew_nobody_who_lives_is_away(store: Store, book: Book) -> None:
    await write(store, *(sign_of(f"m{number}") for number in range(50)))
    await until_it_knows(book, "m49", alive=True, mesos_agent="")
    refreshing = asyncio.create_task(book.refresh())
    while not refreshing.done():
        assert sum(node.alive for node in book.nodes().values()) == 51
        await asyncio.sleep(0)


async def test_a_node_that_was_removed_is_not_known(store: Store, book: Book) -> None:
    await write(store, Delete(keys.NODES + "n2"))
    async with asyncio.timeout(15):
        while "n2" in book.nodes():
            await asyncio.sleep(0.01)


async def test_who_wants_everything_listed_anew_is_not_given_a_listing_that_began_before(
    store: Store, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store.page
    refreshing: list[asyncio.Task[None]] = []

    async def page(start: str, end: str, **options: Any) -> Page:
        read = await real(start, end, **options)
        if start == keys.ADDRESSES:
            # Nodes were listed a moment ago.
            monkeypatch.setattr(store, "page", real)
            await write(store, record("n3"))
            refreshing.append(asyncio.create_task(book.refresh()))
            await asyncio.sleep(0)
        return read

    monkeypatch.setattr(store, "page", page)
    await book.refresh()
    await refreshing[0]
    assert "n3" in book.nodes()
