"""One reconciliation, for an operator: what the listener does all the time, done once and told."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from ipam.errors import TryAgain
from ipam.store.base import Store
from marathon.actions import Actions
from marathon.book import Book
from marathon.client import Marathon
from marathon.leader import Leadership
from marathon.listener import first_of, whereabouts
from marathon.mesos import Master
from marathon.passes import Passes
from marathon.reconcile import Timing

LOOK = 0.5
"""Seconds between looks at nodes that are waited for."""


async def look(store: Store, marathon: Marathon, master: Master | None, timing: Timing) -> dict[str, Any]:
    """Judge everything and change nothing; also while a listener leads. Raises MoorageError.

    Returns the report of passes.py. Of nodes that Mesos calls gone it cannot say more than that their agents do not
    run now.
    """
    leadership = await _candidate(store, marathon)
    book = Book(store)
    passes = Passes(store, book, marathon, master, leadership.framework, Actions(store, leadership), timing)
    await book.load()
    await passes.full_pass(act=False)
    return passes.report()


async def reconcile(
    store: Store, marathon: Marathon, master: Master | None, timing: Timing
) -> dict[str, Any]:
    """Judge everything, wait for the grace, act, and judge again. Raises TryAgain while a listener leads.

    A node that Mesos calls gone is waited for as well: for as long as its agent has to be away, and a grace.

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
        deadline = time.monotonic() + timing.gone_after + timing.grace + LOOK
        while passes.awaits_nodes and time.monotonic() < deadline:
            await asyncio.sleep(LOOK)
            await passes.event_pass(())
        await actions.idle()
        await book.refresh()
        await passes.full_pass(act=False)
        told.update(passes.report())

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
