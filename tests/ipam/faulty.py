"""A store whose network is bad in ways that a test chooses; behind it is a real one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from ipam.errors import Ambiguous, StoreError, StoreUnavailable
from ipam.store import KeyValue, Lease, Page, Store, Txn, TxnResult, WatchBatch
from ipam.store.base import Standing
from tests.patience import PATIENCE

T = TypeVar("T")

Fault = Callable[[Txn], str]
"""What happens to a transaction: "" (nothing), "refused" (it never arrives), "reply lost" (it lands, the
asker is not told) or "late" (the asker is not told, and it lands when the test says so)."""


class FaultyStore:
    """See ipam.store.base.Store. down: nothing is answered. late: transactions still on their way."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.down = False
        self.fault: Fault = lambda _: ""
        self.late: list[Txn] = []

    def faults(self, *kinds: str) -> None:
        """The next transactions meet these, one each; those after them nothing."""
        coming = list(kinds)
        self.fault = lambda _: coming.pop(0) if coming else ""

    async def deliver(self) -> list[TxnResult]:
        """What was on its way arrives now."""
        late, self.late = self.late, []
        results = []
        for txn in late:
            with contextlib.suppress(StoreError):  # refused: its lease is over, say; nobody hears of it
                results.append(await self.store.txn(txn))
        return results

    def _check(self) -> None:
        if self.down:
            raise StoreUnavailable("the store does not answer (test)")

    async def get(self, key: str) -> KeyValue | None:
        self._check()
        return await self.store.get(key)

    async def page(
        self, start: str, end: str, *, limit: int = 1000, revision: int = 0, keys_only: bool = False
    ) -> Page:
        self._check()
        return await self.store.page(start, end, limit=limit, revision=revision, keys_only=keys_only)

    async def txn(self, txn: Txn) -> TxnResult:
        self._check()
        match self.fault(txn):
            case "refused":
                raise StoreUnavailable("the store refused it (test)")
            case "reply lost":
                await self.store.txn(txn)
                raise Ambiguous("the reply was lost (test)")
            case "late":
                self.late.append(txn)
                raise Ambiguous("no reply yet (test)")
            case "broken":
                raise StoreError("the store is broken (test)")
            case _:
                return await self.store.txn(txn)

    async def standing(self) -> Standing:
        self._check()
        return await self.store.standing()

    def verify_with(self, verify: Callable[[], Awaitable[None]]) -> None:
        self.store.verify_with(verify)

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        return self.store.watch(prefix, from_revision)

    async def lease(self, ttl: float) -> Lease:
        self._check()
        return await self.store.lease(ttl)

    def reconnect(self) -> None:
        self.store.reconnect()

    async def close(self) -> None:
        await self.store.close()


async def eventually(condition: Callable[[], T], timeout: float = PATIENCE) -> T:
    """What ``condition`` returns, as soon as it is true. Raises AssertionError with what it returned last."""
    last: object = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            while not (value := condition()):
                last = value
                await asyncio.sleep(0.002)
            return value
    raise AssertionError(f"still {last!r} after {timeout} s")
