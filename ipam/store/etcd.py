"""The store of a cluster: etcd v3 over gRPC, tried with 3.4.

    EtcdStore --> Calls      retried or sent once, token       etcd_calls.py
                    Link     which member, connections         etcd_link.py, etcd_channel.py
              --> Watch      resumes where it was              etcd_watch.py
              --> EtcdLease  renewed by a task                 etcd_lease.py
    pure:         etcd_url.py, etcd_codec.py, etcd_errors.py, etcd_proto.py (the wire protocol)

All reads are linearizable: etcd asks its quorum. Nothing connects before the first call, so that an agent
starts while etcd is away. Every call ends within a bound: etcd_calls.py and etcd_link.py have the numbers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from ipam.store import etcd_proto as pb
from ipam.store import etcd_url, rules
from ipam.store.base import KeyValue, Page, Standing, Txn, TxnResult, WatchBatch
from ipam.store.etcd_calls import Calls, Gone, TooLarge
from ipam.store.etcd_codec import Codec
from ipam.store.etcd_lease import EtcdLease
from ipam.store.etcd_watch import Watch, compacted, oldest_revision
from ipam.supervision import Supervision


class EtcdStore:
    """See ipam.store.base.Store for what it promises."""

    def __init__(self, calls: Calls, codec: Codec, supervision: Supervision) -> None:
        self._supervision = supervision
        self._calls = calls
        self._codec = codec
        self._watches: set[Watch] = set()
        self._leases: set[EtcdLease] = set()

    @classmethod
    async def open(cls, url: str, supervision: Supervision | None = None) -> EtcdStore:
        """Reads the files that the URL names, and connects nowhere; see open_store. Raises InvalidInput."""
        parsed = etcd_url.parse(url)
        etcd_url.certificates(parsed)
        etcd_url.login(parsed)
        return cls(Calls(parsed), Codec(parsed.prefix), supervision or Supervision())

    async def get(self, key: str) -> KeyValue | None:
        rules.check_key(key)
        reply = await self._calls.ask(pb.RANGE, pb.RangeRequest(key=self._codec.key(key)))
        return self._codec.key_value(reply.kvs[0]) if reply.kvs else None

    async def page(
        self, start: str, end: str, *, limit: int = 1000, revision: int = 0, keys_only: bool = False
    ) -> Page:
        if limit < 1:
            raise ValueError(f"a page of {limit} keys never ends; ask for at least 1")
        request = pb.RangeRequest(
            key=self._codec.key(start),
            range_end=self._codec.key(end),
            limit=limit,
            revision=revision,
            keys_only=keys_only,
        )
        while True:
            try:
                return self._codec.page(await self._calls.ask(pb.RANGE, request), revision)
            except TooLarge:
                if request.limit == 1:
                    raise
                request.limit //= 2
            except Gone:
                raise compacted(revision, await oldest_revision(self._calls, self._codec)) from None

    async def txn(self, txn: Txn) -> TxnResult:
        rules.check(txn)
        request = self._codec.txn(txn)
        # What writes nothing may be asked twice, and has no outcome that could be in doubt.
        send = self._calls.once if rules.writes(txn) else self._calls.ask
        return self._codec.result(txn, await send(pb.TXN, request))

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[WatchBatch]:
        if from_revision < 1:
            raise ValueError(f"a watch from revision {from_revision}; revisions start at 1")
        return Watch(self._calls, self._codec, prefix, from_revision, self._watches).batches()

    async def lease(self, ttl: float) -> EtcdLease:
        if ttl <= 0:
            raise ValueError(f"a lease of {ttl} s is over before it began")
        return await EtcdLease.grant(self._calls, ttl, self._leases, self._supervision)

    async def standing(self) -> Standing:
        before = await self._calls.ask(pb.STATUS, pb.StatusRequest())
        at = await self._calls.ask(pb.RANGE, pb.RangeRequest(key=self._codec.key(""), keys_only=True))
        after = await self._calls.ask(pb.STATUS, pb.StatusRequest())
        revision = at.header.revision
        return Standing(
            cluster=f"{at.header.cluster_id:x}",
            term=after.raftTerm,
            revision=revision,
            surplus=before.raftIndex - revision,
            surplus_at_most=after.raftIndex - revision,
        )

    def verify_with(self, verify: Callable[[], Awaitable[None]]) -> None:
        self._calls.gate.verify_with(verify)

    def reconnect(self) -> None:
        self._calls.renew()

    async def close(self) -> None:
        for watch in list(self._watches):
            watch.end()
        for lease in list(self._leases):
            await lease.abandon()
        await self._calls.close()
