"""The node's one way to write to the store: in groups, behind the fence, exactly once.

Every transaction of a node has this form (docs/design.md, section 4):

    if   writers/<node> unchanged                       nobody else writes for this node
         incarnation unchanged                          nobody doubts the store (continuity.py)
    then put writers/<node> {seq + 1}                   says how far we got
         txn(key 1 unchanged -> write it, else get it)  each request has a verdict of its own
         txn(key 2 ...)
    else get writers/<node>, get key 1, get key 2 ...   what stands there instead

A reply that never came says nothing: the transaction may still land. It is sent again, word for word,
until the fence shows that it landed or it lands now; it cannot land twice, because it moves the fence
that it compares. All keys of one transaction carry the fence's revision, which is how the verdicts of
one that had landed unseen are read back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from ipam import keys
from ipam.errors import ANEW, Ambiguous, Fenced, RequestTooLarge, StoreError, StoreUnavailable
from ipam.outage import Outage
from ipam.records import Alive, Fence
from ipam.store.base import (
    MAX_OPS,
    Compare,
    Delete,
    Get,
    KeyValue,
    Op,
    Put,
    Store,
    Txn,
    TxnResult,
    absent,
    unchanged,
)

log = structlog.get_logger(__name__)

GROUP = MAX_OPS - 3
"""Requests in one transaction. The fence is one operation more, and a nested transaction, which has what its parent
left (store/rules.py), compares two keys at most: its own and a guard."""

GROUP_BYTES = 1024 * 1024
"""Bytes in one transaction: etcd takes 1.5 MiB unless its operator said otherwise."""

WRITE_BYTES = 256
"""Bytes of a request besides its value and what stands its key takes: compares, the tags of the encoding."""

RETRY_AT_MOST = 1.0
"""Seconds between two tries of a transaction whose outcome is unknown: several fit outage.GRACE."""

SHOWS_WITHIN = 15.0
"""Seconds that who took the fence from this agent has to show a sign of life: it registers only after that."""

CLAIM_RETRY = 0.05
"""Seconds before a claim whose outcome is unknown is looked for."""


class StoreRewound(StoreError):
    """The fence is older than what the store had confirmed: somebody restored a backup."""


class IncarnationMoved(StoreError):
    """Another node doubts the store; nothing was written."""


@dataclass(frozen=True, slots=True)
class Write:
    """One request: put (or with value None delete) ``key`` if it still is at ``base`` (0: absent).

    guards: what must hold besides.
    """

    key: str
    value: bytes | None
    base: int
    guards: tuple[Compare, ...] = ()

    @property
    def size(self) -> int:
        """Bytes that it takes in a transaction, at most. Its key is in up to five messages."""
        keys_named = 5 * len(self.key) + sum(len(g.key) + len(g.range_end or "") for g in self.guards)
        return len(self.value or b"") + keys_named + WRITE_BYTES

    def as_txn(self) -> Txn:
        write: Op = Delete(self.key) if self.value is None else Put(self.key, self.value)
        return Txn((Compare(self.key, self.base), *self.guards), (write,), (Get(self.key),))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a Write.

    done: it stands in the store.
    revision: the key's mod_revision now, 0 if it is absent.
    found: what stood there instead, if not done.
    refused: why the store takes it at no time, "" if it does: the transaction would be too large with it alone.
    """

    done: bool
    revision: int
    found: KeyValue | None = None
    refused: str = ""


def fitting(writes: Sequence[Write]) -> int:
    """How many of the first ones go into one transaction, by number and by bytes; at least one if there is one."""
    size = 0
    for number, write in enumerate(writes[:GROUP]):
        size += write.size
        if size > GROUP_BYTES and number:
            return number
    return min(len(writes), GROUP)


class Writer:
    """See the module's docstring. One per agent; ``commit`` runs one transaction at a time.

    was_removed: whether the last ``claim`` found no fence of an agent, because an operator removed the node.
    """

    def __init__(
        self,
        store: Store,
        node: str,
        instance: str,
        boot_id: str,
        outage: Outage | None = None,
        guard: Callable[[], Compare] = lambda: absent(keys.INCARNATION),
        state_id: str = "",
    ) -> None:
        """outage: told of every transaction that has to be sent again, and of every answer. guard: what each compares
        besides the fence. state_id: of the agent's state directory, "" if it is not known."""
        self._store = store
        self._node = node
        self._key = keys.WRITERS + node
        self._instance = instance
        self._boot_id = boot_id
        self._state_id = state_id
        self._outage = outage or Outage()
        self._guard = guard
        self._revision = 0
        self._claimed = False
        self._had_fence = False
        self._usurper = "", 0.0
        self._lock = asyncio.Lock()
        self.seq = 0
        self.transactions = 0
        self.was_removed = False

    @property
    def has_claimed(self) -> bool:
        """Whether this agent has held the fence since it started."""
        return self._had_fence

    async def claim(self, confirmed_seq: int) -> bool:
        """Take the fence, so that nobody else, and nothing sent before, can write for this node any more.

        confirmed_seq: what the journal says was confirmed last, 0 if it knows nothing.
        Returns whether the store is as new as the journal; False means that it went back in time, or
        that the node was removed: what the journal holds has to be asserted anew.
        Raises Fenced while an agent of that name is alive on another boot, or after another took the fence
        from this one and is alive: of two agents under one name the newer one has it. StoreUnavailable.
        """
        async with self._lock:
            self._claimed = False
            sent, base, fresh = b"", 0, True
            while True:
                alive = await self._store.get(keys.ALIVE + self._node)
                found = await self._store.get(self._key)
                stood = Fence.decode(found.key, found.value) if found else None
                if alive is not None:
                    self._refuse_other(Alive.decode(alive.key, alive.value), stood)
                self.was_removed = stood is None or not stood.boot_id
                if stood is not None and stood.vacant and self._had_fence:
                    raise Fenced(
                        f"node {self._node} was taken from this agent by `moorage node adopt`: the next agent that "
                        "starts under this name has it; restart this one to have it back, or give it another --node "
                        f"name, {ANEW}"
                    )
                if stood is not None:
                    self._leave_time_to(stood)
                if (
                    found is not None
                    and stood is not None
                    and found.value == sent
                    and found.mod_revision != base
                ):
                    # The try whose reply was lost had landed; what it was decided on still counts.
                    return self._hold(found.mod_revision, stood.seq, fresh)
                fresh = confirmed_seq == 0 or (stood is not None and stood.seq >= confirmed_seq)
                # A store that went back in time keeps showing it until a sync was completed: not counted up.
                seq = (stood.seq if stood else 0) + fresh
                base = found.mod_revision if found else 0
                sent = Fence(instance=self._instance, boot_id=self._boot_id, seq=seq).encode()
                guard = unchanged(found) if found else absent(self._key)
                try:
                    result = await self._store.txn(Txn((guard,), (Put(self._key, sent),)))
                except Ambiguous:
                    await asyncio.sleep(CLAIM_RETRY)
                    continue
                if result.succeeded:
                    return self._hold(result.revision, seq, fresh)

    def _refuse_other(self, lease: Alive, stood: Fence | None) -> None:
        """Raises Fenced if who is alive under the node's name is neither this agent nor one that it follows."""
        is_of_this_boot = lease.boot_id == self._boot_id
        if lease.instance == self._instance or (is_of_this_boot and not self._had_fence):
            return
        if is_of_this_boot and stood is not None:
            # Nobody is alive without having held the fence: who is, while this agent holds it, lived before.
            followed = stood.instance == self._instance
            # A store that went back in time has the sign of life of a predecessor again, and its fence.
            back = self._state_id and lease.state_id == self._state_id and stood.seq <= self.seq
            if followed or back:
                return
        raise Fenced(
            f"another agent runs as node {self._node} (instance {lease.instance}); "
            f"stop it or wait until its lease expires, or give this node another --node name, {ANEW}"
        )

    def _leave_time_to(self, stood: Fence) -> None:
        """Raises Fenced while somebody who took the fence from this agent may be about to say that it lives."""
        # A fence that is behind what was confirmed is no usurper's: the store went back in time.
        if not self._had_fence or stood.instance == self._instance or stood.seq <= self.seq:
            return
        now = time.monotonic()
        if self._usurper[0] != stood.instance:
            self._usurper = stood.instance, now
        if now < self._usurper[1] + SHOWS_WITHIN:
            raise Fenced(
                f"another agent (instance {stood.instance}) took over node {self._node}; stop one of the two, "
                f"or give this one another --node name, {ANEW}"
            )

    def _hold(self, revision: int, seq: int, fresh: bool) -> bool:
        self._revision, self.seq = revision, seq
        self._claimed = self._had_fence = True
        self._outage.answered()
        return fresh

    async def commit(self, writes: Sequence[Write]) -> list[Outcome]:
        """Write a group of at most GROUP different keys; one outcome each, in order.

        Returns only when every outcome is certain, however long the store is away. Raises Fenced,
        StoreRewound, IncarnationMoved, StoreError. After any of them, or when it was cancelled, the outcome is not
        known and the fence has to be claimed before the next commit; then what stands in the store is final.

        A group that the store calls too large is halved: its operator may have set a limit below etcd's default.
        """
        try:
            return await self._commit(writes)
        except RequestTooLarge as error:
            if len(writes) <= 1:
                return [Outcome(False, write.base, refused=str(error)) for write in writes]
            half = len(writes) // 2
            return [*await self.commit(writes[:half]), *await self.commit(writes[half:])]

    async def _commit(self, writes: Sequence[Write]) -> list[Outcome]:
        if len(writes) > GROUP:
            raise ValueError(f"{len(writes)} writes in one group; at most {GROUP} fit a transaction")
        async with self._lock:
            if not self._claimed:
                raise StoreError(f"the fence of node {self._node} is not held; it has to be claimed first")
            fence = Fence(instance=self._instance, boot_id=self._boot_id, seq=self.seq + 1)
            txn = Txn(
                (Compare(self._key, self._revision), self._guard()),
                (Put(self._key, fence.encode()), *(write.as_txn() for write in writes)),
                (Get(self._key), *(Get(write.key) for write in writes)),
            )
            self._claimed = False
            try:
                result = await self._send(txn)
            except RequestTooLarge:
                # Nothing was applied. Had an earlier try landed at a member with a higher limit, the next transaction
                # finds the fence moved by it, and the keys with the fence's revision.
                self._claimed = True
                raise
            self.transactions += 1
            outcomes = self._landed(result, writes) if result.succeeded else self._read_back(result, writes)
            self.seq += 1
            self._claimed = True
            return outcomes

    async def _send(self, txn: Txn) -> TxnResult:
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(StoreUnavailable),
            wait=wait_random_exponential(multiplier=0.05, max=RETRY_AT_MOST),
            reraise=True,
        ):
            with attempt:
                try:
                    result = await self._store.txn(txn)
                except StoreUnavailable as error:
                    self._outage.failed(str(error))
                    raise
                self._outage.answered()
                return result
        raise AssertionError("unreachable: retries without end")

    def _landed(self, result: TxnResult, writes: Sequence[Write]) -> list[Outcome]:
        self._revision = result.revision
        outcomes = []
        for write, verdict in zip(writes, result.results[1:], strict=True):
            assert isinstance(verdict, TxnResult)
            if verdict.succeeded:
                outcomes.append(Outcome(True, 0 if write.value is None else result.revision))
            else:
                found = verdict.results[0]
                assert found is None or isinstance(found, KeyValue)
                # To delete what is gone already is as good as deleting it.
                gone = write.value is None and found is None
                outcomes.append(Outcome(gone, found.mod_revision if found else 0, found))
        return outcomes

    def _read_back(self, result: TxnResult, writes: Sequence[Write]) -> list[Outcome]:
        """The fence had moved: by this very transaction, or by somebody else."""
        stood, *values = result.results
        if stood is None:
            raise Fenced(f"node {self._node} was removed from the store; this agent registers it anew")
        assert isinstance(stood, KeyValue)
        fence = Fence.decode(stood.key, stood.value)
        if fence.instance != self._instance:
            raise Fenced(
                f"node {self._node} was removed, or taken from this agent, by an operator"
                if not fence.boot_id
                else f"another agent (instance {fence.instance}) took over node {self._node}; "
                f"stop one of the two, or give this one another --node name, {ANEW}"
            )
        if stood.mod_revision == self._revision:
            raise IncarnationMoved("a node doubts the store; what this node holds is asserted anew")
        if fence.seq != self.seq + 1:
            raise StoreRewound(
                f"the store's record of node {self._node} is at write {fence.seq} and {self.seq} were confirmed: "
                "the store was restored from a backup; what this node holds is asserted anew"
            )
        self._revision = stood.mod_revision
        outcomes = []
        for write, found in zip(writes, values, strict=True):
            assert found is None or isinstance(found, KeyValue)
            revision = found.mod_revision if found else 0
            done = found is None if write.value is None else revision == stood.mod_revision
            outcomes.append(Outcome(done, revision, None if done else found))
        return outcomes
