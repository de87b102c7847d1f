"""One reconciliation, for an operator: what the listener does all the time, done once and told."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import asdict
from typing import Any

from ipam.errors import TryAgain
from ipam.store.base import Store
from marathon.actions import Actions
from marathon.book import Book
from marathon.client import Marathon
from marathon.leader import Leadership
from marathon.listener import first_of, whereabouts
from marathon.mesos import Master
from marathon.passes import Passes, Timing
from marathon.reconcile import Judgement


async def look(store: Store, marathon: Marathon, master: Master | None, timing: Timing) -> dict[str, Any]:
    """Judge everything and change nothing; also while a listener leads. Raises MoorageError.

    Returns the report of passes.py, and ``gone``: nodes that would be freed, and why.
    """
    leadership = await _candidate(store, marathon)
    book = Book(store)
    passes = Passes(store, book, marathon, master, leadership.framework, Actions(store, leadership), timing)
    await book.load()
    return _told(passes, await passes.full_pass(act=False))


async def reconcile(
    store: Store, marathon: Marathon, master: Master | None, timing: Timing
) -> dict[str, Any]:
    """Judge everything, wait for the grace, act, and judge again. Raises TryAgain while a listener leads.

    Returns what ``look`` does, as it stands in the end.
    """
    leadership = await _candidate(store, marathon)
    if not await leadership.take():
        leader = await leadership.leader()
        raise TryAgain(
            f"a listener reconciles for framework {leadership.framework} already "
            f"({leader.where if leader else 'its leader changes just now'}); see `moorage marathon status`, look with "
            "--dry-run, or stop it first"
        )
    book = Book(store)
    actions = Actions(store, leadership)
    passes = Passes(store, book, marathon, master, leadership.framework, actions, timing)
    told: dict[str, Any] = {}

    async def work() -> None:
        await book.listed.wait()
        await passes.full_pass()
        await asyncio.sleep(timing.grace)
        await passes.event_pass(())
        await actions.idle()
        await book.refresh()
        told.update(_told(passes, await passes.full_pass(act=False)))

    try:
        await first_of(work(), book.follow(), actions.run(), leadership.lost())
    finally:
        await leadership.resign()
    if not told:
        raise TryAgain("another process took over meanwhile; see `moorage marathon status`")
    return told


async def _candidate(store: Store, marathon: Marathon) -> Leadership:
    info = await asyncio.to_thread(marathon.info)
    return Leadership(store, info.framework_id or "", uuid.uuid4().hex, whereabouts())


def _told(passes: Passes, found: Judgement) -> dict[str, Any]:
    return {**passes.report(), "gone": [asdict(node) for node in found.gone]}
