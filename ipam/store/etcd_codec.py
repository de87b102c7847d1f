"""Our transactions, keys and events as etcd's messages and back.

A key ``addresses/4/0a400001`` is etcd's ``<prefix>/addresses/4/0a400001``.
"""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from ipam.store import etcd_proto as pb
from ipam.store.base import Compare, Delete, Event, Get, KeyValue, Op, OpResult, Page, Put, Txn, TxnResult

log = structlog.get_logger(__name__)


class Codec:
    """Translates for the keys below one prefix."""

    def __init__(self, prefix: str) -> None:
        self._root = f"{prefix}/".encode()
        self._foreign: set[bytes] = set()

    def key(self, key: str) -> bytes:
        """etcd's name of a key, or of the start or end of a range."""
        return self._root + key.encode("ascii", "surrogateescape")

    def prefix_range(self, prefix: str) -> tuple[bytes, bytes]:
        """Start and end (exclusive) of what is below a prefix, which may be empty."""
        start = self.key(prefix)
        return start, start[:-1] + bytes([start[-1] + 1])

    def txn(self, txn: Txn) -> pb.Message:
        request = pb.TxnRequest()
        self._fill(request, txn)
        return request

    def result(self, txn: Txn, reply: pb.Message) -> TxnResult:
        """The reply to ``txn``."""
        return self._result(txn, reply, reply.header.revision)

    def key_value(self, kv: pb.Message) -> KeyValue:
        return KeyValue(self._name(kv.key), kv.value, kv.create_revision, kv.mod_revision, kv.lease)

    def page(self, reply: pb.Message, revision: int) -> Page:
        """The reply to a range that was asked for at ``revision``, 0 meaning now."""
        items = tuple(self.key_value(kv) for kv in reply.kvs if self._is_ours(kv.key))
        # The smallest key after the last one of this page.
        after = self._name(reply.kvs[-1].key) + "\0" if reply.more else None
        return Page(items, revision or reply.header.revision, after)

    def events(self, events: Iterable[pb.Message]) -> tuple[Event, ...]:
        """In order of revision, and of key within one: etcd's own order there is that of the operations."""
        ours = (self._event(event) for event in events if self._is_ours(event.kv.key))
        return tuple(sorted(ours, key=lambda event: (event.revision, event.key)))

    def _name(self, raw: bytes) -> str:
        """The key below the prefix; what is no ASCII of it comes through ``key`` as it was."""
        return raw[len(self._root) :].decode("ascii", "surrogateescape")

    def _is_ours(self, raw: bytes) -> bool:
        """All of moorage's keys are ASCII. What others write below the prefix is left as it is, and nobody sees it."""
        if raw.isascii():
            return True
        if raw not in self._foreign:
            self._foreign.add(raw)
            log.warning(
                "key is passed over: moorage did not write it, its bytes are no ASCII; delete it",
                key=repr(raw),
            )
        return False

    # Messages are filled where they stand: one made outside is copied into its parent, at every level anew.

    def _fill(self, request: pb.Message, txn: Txn) -> None:
        for compare in txn.compares:
            self._fill_compare(request.compare.add(), compare)
        for op in txn.then:
            self._fill_op(request.success.add(), op)
        for op in txn.orelse:
            self._fill_op(request.failure.add(), op)

    def _fill_compare(self, message: pb.Message, compare: Compare) -> None:
        message.target = pb.COMPARE_MOD
        message.key = self.key(compare.key)
        message.mod_revision = compare.mod_revision
        if compare.range_end is not None:
            message.range_end = self.key(compare.range_end)

    def _fill_op(self, message: pb.Message, op: Op) -> None:
        match op:
            case Put(key, value, lease):
                put = message.request_put
                put.key, put.value, put.lease = self.key(key), value, lease
            case Delete(key):
                message.request_delete_range.key = self.key(key)
            case Get(key):
                message.request_range.key = self.key(key)
            case Txn():
                message.request_txn.SetInParent()  # it may be empty
                self._fill(message.request_txn, op)

    def _result(self, txn: Txn, reply: pb.Message, revision: int) -> TxnResult:
        # A nested reply's own header says nothing: all of it happened at the outermost one's revision.
        ops = txn.then if reply.succeeded else txn.orelse
        results = (
            self._op_result(op, response, revision) for op, response in zip(ops, reply.responses, strict=True)
        )
        return TxnResult(reply.succeeded, revision, tuple(results))

    def _op_result(self, op: Op, response: pb.Message, revision: int) -> OpResult:
        match op:
            case Put():
                return None
            case Delete():
                return int(response.response_delete_range.deleted)
            case Get():
                found = response.response_range.kvs
                return self.key_value(found[0]) if found else None
            case Txn():
                return self._result(op, response.response_txn, revision)

    def _event(self, event: pb.Message) -> Event:
        kv = self.key_value(event.kv)
        return Event(kv.key, kv.mod_revision, None if event.type == pb.EVENT_DELETE else kv)
