"""Whether the store is the one that this node knows, and goes on from where it was.

A store that was restored from a backup forgot what was given out since, and looks like any other: its revision may be
as high as before, or higher. So before anything is sent over a new connection (store/gate.py) the agent compares where
the store's history stands with what it knows:

    of its own    cluster, term, revision and surplus (store/base.py `Standing`), and the newest change it saw: that
                  still has to stand in the history
    of others     the same as an agent that was in touch with the store all the time has left it there, at ``vouched``:
                  one that just started cannot tell by itself, and does not believe a store that nobody vouched for

If anything contradicts, this is doubt: the agent moves the key ``incarnation``, which every transaction of every node
compares (writer.py). So all of them hear of it before they take anything, begin a grace (grace.py) and assert anew what
they hold. Who has done so says it with its sign of life (`Alive.incarnation`).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable, Collection
from typing import Protocol

import msgspec
import structlog

from ipam import keys
from ipam.errors import Compacted, StoreError, TryAgain
from ipam.following import follow
from ipam.grace import Grace
from ipam.records import Incarnation, Vouched
from ipam.store.base import (
    Compare,
    KeyValue,
    Put,
    Standing,
    Store,
    Txn,
    WatchBatch,
    absent,
    unchanged,
)

log = structlog.get_logger(__name__)

TOUCH = 10.0
"""Seconds for which an agent that heard nothing of the store can still vouch for it; it asks every 5. Longer, and
others may have written what it never saw and a backup does not have."""

PAUSE = 5.0
"""Seconds in which these others come back, and say so; they try every 2."""

SAVE_EVERY = 5.0
"""Seconds between saves of what is known, while it changes."""

TRIES = 100
"""Each fails only because another node moved or vouched meanwhile."""


class Known(msgspec.Struct, frozen=True, omit_defaults=True):
    """What this node knows of the store's history.

    cluster, term, revision, surplus: as in Standing. incarnation: its id, "" if there was none.
    key, at, digest: the newest change that was seen, its revision, and the SHA-256 of its value; "" and 0 if none.
    doubted: what this node holds is not asserted anew yet.
    """

    cluster: str
    term: int
    revision: int
    surplus: int
    incarnation: str = ""
    key: str = ""
    at: int = 0
    digest: str = ""
    doubted: bool = False


class ContinuityMemory(Protocol):
    """Where it survives a restart; the journal."""

    def load_known(self) -> bytes | None: ...

    def save_known(self, known: bytes) -> None:
        """Raises TryAgain."""
        ...


class Continuity:
    """See the module's docstring.

    nodes: the names of all that were heard of. on_doubt: told why, when what this node holds has to be asserted anew.
    doubted: so until ``asserted``. is_new: nothing was known of the store when this began.
    """

    def __init__(
        self,
        store: Store,
        node: str,
        memory: ContinuityMemory,
        grace: Grace,
        on_doubt: Callable[[str], None] = lambda _: None,
        nodes: Callable[[], Collection[str]] = lambda: (),
    ) -> None:
        self._store = store
        self._node = node
        self._memory = memory
        self._on_doubt = on_doubt
        self._nodes = nodes
        self.grace = grace
        self._known = self._load()
        self.is_new = self._known is None
        self._revision = 0
        self._touched: float | None = None
        self._newest: KeyValue | None = None
        self._vouch_after = 0.0
        self._suspicion = ""
        self._moved = asyncio.Event()

    def _load(self) -> Known | None:
        raw = self._memory.load_known()
        try:
            return None if raw is None else msgspec.json.decode(raw, type=Known)
        except msgspec.MsgspecError as error:
            log.warning("what was known of the store cannot be read", why=str(error))
            return None

    @property
    def incarnation(self) -> str:
        """The id of the store's incarnation that this node goes by; "" if nobody ever doubted."""
        return self._known.incarnation if self._known is not None else ""

    @property
    def doubted(self) -> bool:
        return self._known is not None and self._known.doubted

    @property
    def guard(self) -> Compare:
        """What every transaction compares that writes for this node."""
        return Compare(keys.INCARNATION, self._revision)

    # -- before anything else over a new connection

    async def verify(self) -> None:
        """Compare the store with what is known of it; in doubt, say so to all. Raises StoreError, StoreUnavailable."""
        for _ in range(TRIES):
            incarnation = await self._store.get(keys.INCARNATION)
            vouched = await self._store.get(keys.VOUCHED)
            # Later than what others vouched for, of which it must not be behind.
            standing = await self._store.standing()
            if await self._judge(standing, incarnation, vouched):
                return
        raise TryAgain("other nodes look at the store at this moment, too; it is looked at again")

    async def _judge(
        self, standing: Standing, incarnation: KeyValue | None, vouched: KeyValue | None
    ) -> bool:
        """Whether it came to an end; else another node wrote meanwhile, or another look of this one."""
        known, id_ = self._known, _id_of(incarnation)
        is_vouched = vouched is not None and _stands(vouched, standing)
        is_other = known is not None and id_ != known.incarnation
        why = self._suspicion or await self._contradiction(standing, is_vouched=is_vouched)
        if not why and vouched is not None and not is_vouched and self._touched is None:
            why = "its servers began anew, and no node was in touch with it all the time"
        if why and not (is_other and is_vouched):
            moved = Incarnation(id=uuid.uuid4().hex, by=f"node {self._node}", why=why, since=time.time())
            revision = await self._say(standing, vouched, incarnation, moved)
            if revision:
                self._go_on(standing, moved.id, revision)
                self._doubt(f"node {self._node} found that {why}")
            return bool(revision)
        if not is_vouched and (vouched is None or (self._in_touch() and self._now() >= self._vouch_after)):
            if not await self._say(standing, vouched):
                return False
            self._vouch_after = 0.0
        elif not is_vouched and not self._vouch_after:
            self._vouch_after = self._now() + PAUSE
            self.grace.pause("the store's servers began anew while this node was not in touch with it", PAUSE)
        self._go_on(standing, id_, _revision(incarnation))
        if is_other:
            self._doubt(_said(incarnation))
        elif known is None and id_:
            # Somebody doubted once, just now perhaps: all have to have asserted what they hold.
            self.grace.begin(_said(incarnation), self._nodes())
        return True

    async def _contradiction(self, standing: Standing, *, is_vouched: bool) -> str:
        """What of the store is not as this node knows it; "" if nothing is."""
        known = self._known
        if known is None:
            return ""
        if standing.cluster != known.cluster:
            return "its servers are others"
        if standing.term < known.term or standing.surplus_at_most < known.surplus:
            return "its servers began anew with what they had before"
        if standing.revision < known.revision:
            return f"it is at revision {standing.revision} and was at {known.revision}"
        newest = self._newest
        key, at = (newest.key, newest.mod_revision) if newest else (known.key, known.at)
        if not key:
            return ""
        found = await self._change(key, at)
        if found is None:
            told = is_vouched or self._in_touch()
            return "" if told else "its history is compacted, and no node was in touch with it all the time"
        digest = _digest(newest.value) if newest else known.digest
        return "" if found == digest else f"it does not know a change that was made at revision {at}"

    async def _change(self, key: str, at: int) -> str | None:
        """The digest of what was written to a key at a revision, "" if nothing was, None if that cannot be told."""
        kv = await self._store.get(key)
        if kv is None or kv.mod_revision > at:
            try:
                page = await self._store.page(key, key + "\0", limit=1, revision=at)
            except Compacted:
                return None
            kv = page.items[0] if page.items else None
        return _digest(kv.value) if kv is not None and kv.mod_revision == at else ""

    def _in_touch(self) -> bool:
        return self._touched is not None and self._now() - self._touched < TOUCH

    @staticmethod
    def _now() -> float:
        return time.monotonic()

    async def _say(
        self,
        standing: Standing,
        vouched: KeyValue | None,
        incarnation: KeyValue | None = None,
        moved: Incarnation | None = None,
    ) -> int:
        """Vouch for the store, and move its incarnation if that is given. The revision, 0 if somebody was faster."""
        record = Vouched(
            cluster=standing.cluster, term=standing.term, surplus=standing.surplus, by=self._node
        )
        puts = [Put(keys.VOUCHED, record.encode())]
        guards = [absent(keys.VOUCHED) if vouched is None else unchanged(vouched)]
        if moved is not None:
            puts.append(Put(keys.INCARNATION, moved.encode()))
            guards.append(absent(keys.INCARNATION) if incarnation is None else unchanged(incarnation))
        result = await self._store.txn(Txn(tuple(guards), tuple(puts)))
        return result.revision if result.succeeded else 0

    def _go_on(self, standing: Standing, incarnation: str, revision: int) -> None:
        """This is what is known from now on. revision: that wrote the incarnation, 0 if there is none."""
        newest, before = self._newest, self._known
        self._known = Known(
            cluster=standing.cluster,
            term=standing.term,
            revision=standing.revision,
            surplus=standing.surplus,
            incarnation=incarnation,
            key=newest.key if newest else before.key if before else "",
            at=newest.mod_revision if newest else before.at if before else 0,
            digest=_digest(newest.value) if newest else before.digest if before else "",
            doubted=self.doubted,
        )
        self._revision = revision
        self.touch()
        self._moved.set()  # a watch may wait for a revision that this store reaches late
        self.save()

    # -- doubt

    def _doubt(self, why: str) -> None:
        """What this node holds may be unknown to the store, and other nodes' as well."""
        assert self._known is not None, "only what is known can be doubted"
        log.warning("store is in doubt: what this node holds is asserted anew", why=why)
        self._suspicion = ""
        self._forget_change()
        self._known = msgspec.structs.replace(self._known, doubted=True)
        self._moved.set()
        self.grace.begin(why, self._nodes())
        self.save()
        self._on_doubt(why)

    async def move(self, why: str) -> None:
        """Doubt, for a reason found elsewhere. Raises StoreError, StoreUnavailable."""
        # The look of a new connection may come first, and is as good.
        self._suspicion = why
        await self.verify()

    async def look(self) -> None:
        """Hear whether another node moved the incarnation. Raises StoreError, StoreUnavailable."""
        before = None
        while before != self._revision:  # a look of a new connection may have moved it meanwhile
            before = self._revision
            found = await self._store.get(keys.INCARNATION)
        self._revision = _revision(found)
        if self._known is not None and _id_of(found) != self._known.incarnation:
            self._known = msgspec.structs.replace(self._known, incarnation=_id_of(found))
            self._doubt(_said(found))

    def asserted(self) -> None:
        """The store has what this node holds."""
        if self._known is not None and self._known.doubted:
            self._known = msgspec.structs.replace(self._known, doubted=False)
            self.save()

    # -- while the connection stands

    async def follow(self) -> None:
        """Hear of other nodes' doubts at once, until cancelled. Raises StoreError; the caller runs it again."""
        while True:
            page = await self._store.page(keys.INCARNATION, keys.INCARNATION + "\0", limit=1)
            await self.look()
            self._moved.clear()
            await follow(self._store, {keys.INCARNATION: page.revision}, self._hear, self._moved)

    def _hear(self, *_: object) -> None:
        self._moved.set()

    def touch(self) -> None:
        """The store answered."""
        self._touched = self._now()

    def note(self, batch: WatchBatch) -> None:
        """What a watch told of: the newest change has to stand in the history from now on."""
        self.touch()
        if self._newest is None or batch.revision > self._newest.mod_revision:
            told = (event.kv for event in reversed(batch.events) if event.kv is not None)
            self._newest = next(told, self._newest)
        current = self._newest.key if self._newest else self._known.key if self._known else ""
        if any(event.kv is None and event.key == current for event in batch.events):
            self._forget_change()  # once that is compacted, nothing is left of it

    def _forget_change(self) -> None:
        self._newest = None
        if self._known is not None:
            self._known = msgspec.structs.replace(self._known, key="", at=0, digest="")

    async def keep(self) -> None:
        """Save what is known now and then, so that a restart knows it, and vouch when that was put off, until
        cancelled. Raises StoreError."""
        while True:
            await asyncio.sleep(SAVE_EVERY)
            if self._vouch_after:
                await self.verify()
            newest = self._newest
            if newest is not None and self._known is not None and newest.mod_revision > self._known.at:
                self._known = msgspec.structs.replace(
                    self._known,
                    revision=max(self._known.revision, newest.mod_revision),
                    key=newest.key,
                    at=newest.mod_revision,
                    digest=_digest(newest.value),
                )
                self.save()

    def save(self) -> None:
        """Have the journal remember what is known. What it does not take is tried again with the next."""
        if self._known is None:
            return
        try:
            self._memory.save_known(msgspec.json.encode(self._known))
        except TryAgain as error:
            log.warning("what is known of the store is not journalled", why=str(error))


def _stands(vouched: KeyValue, standing: Standing) -> bool:
    """Whether somebody vouched for just this history."""
    try:
        record = Vouched.decode(vouched.key, vouched.value)
    except StoreError as error:
        log.warning("record is written anew", why=str(error))
        return False
    return (record.cluster, record.term) == (standing.cluster, standing.term) and (
        record.surplus <= standing.surplus_at_most
    )


def _id_of(incarnation: KeyValue | None) -> str:
    if incarnation is None:
        return ""
    try:
        return Incarnation.decode(incarnation.key, incarnation.value).id
    except StoreError:
        return f"unreadable-{incarnation.mod_revision}"


def _revision(kv: KeyValue | None) -> int:
    return kv.mod_revision if kv is not None else 0


def _said(incarnation: KeyValue | None) -> str:
    """Why another node doubted."""
    if incarnation is None:
        return "the store has lost its incarnation"
    try:
        record = Incarnation.decode(incarnation.key, incarnation.value)
    except StoreError as error:
        return str(error)
    return f"{record.by} found that {record.why}"


def _digest(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()
