"""Every store against the obvious model: a dictionary, and one function that says what a transaction does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipam.store import Compare, Delete, Event, Get, KeyValue, Put, Store, Txn, TxnResult, read_prefix

KEYS = "abcdef"


class Wish(NamedTuple):
    """A compare, before it is known which revisions there are."""

    key: str
    kind: str
    end: str


@dataclass
class Model:
    """``keys`` at ``revision``; ``history`` has every revision since the start."""

    revision: int
    keys: dict[str, KeyValue] = field(default_factory=dict)
    history: dict[int, dict[str, KeyValue]] = field(default_factory=dict)

    def txn(self, txn: Txn) -> TxnResult:
        before = dict(self.keys)
        changed = self._ops_change(before, txn)
        revision = self.revision + changed
        result = self._run(before, txn, revision)
        self.revision = revision
        self.history[revision] = dict(self.keys)
        return result

    def _holds(self, before: dict[str, KeyValue], compare: Compare) -> bool:
        if compare.range_end is not None:
            return not any(compare.key <= key < compare.range_end for key in before)
        return (before[compare.key].mod_revision if compare.key in before else 0) == compare.mod_revision

    def _chosen(self, before: dict[str, KeyValue], txn: Txn) -> tuple[bool, tuple]:
        held = all(self._holds(before, compare) for compare in txn.compares)
        return held, txn.then if held else txn.orelse

    def _ops_change(self, before: dict[str, KeyValue], txn: Txn) -> bool:
        return any(
            isinstance(op, Put)
            or (isinstance(op, Delete) and op.key in before)
            or (isinstance(op, Txn) and self._ops_change(before, op))
            for op in self._chosen(before, txn)[1]
        )

    def _run(self, before: dict[str, KeyValue], txn: Txn, revision: int) -> TxnResult:
        held, ops = self._chosen(before, txn)
        results = []
        for op in ops:
            if isinstance(op, Txn):
                results.append(self._run(before, op, revision))
            elif isinstance(op, Get):
                results.append(self.keys.get(op.key))
            elif isinstance(op, Delete):
                results.append(int(self.keys.pop(op.key, None) is not None))
            else:
                old = self.keys.get(op.key)
                created = old.create_revision if old else revision
                self.keys[op.key] = KeyValue(op.key, op.value, created, revision)
                results.append(None)
        return TxnResult(held, revision, tuple(results))

    def events(self, since: int) -> Iterator[Event]:
        for revision in range(since, self.revision + 1):
            old, new = self.history[revision - 1], self.history[revision]
            for key in sorted(old.keys() | new.keys()):
                if old.get(key) != new.get(key):
                    yield Event(key, revision, new.get(key))


def could_write(txn: Txn) -> Iterator[list[str]]:
    """The keys written on each way through a transaction."""
    for ops in (txn.then, txn.orelse):
        ways = [
            list(could_write(op)) if isinstance(op, Txn) else [[] if isinstance(op, Get) else [op.key]]
            for op in ops
        ]
        for way in itertools.product(*ways):
            yield [key for keys in way for key in keys]


def writes_twice(txn: Txn) -> bool:
    return any(len(keys) != len(set(keys)) for keys in could_write(txn))


def resolve(txn: Txn, model: Model, prefix: str) -> Txn:
    """The transaction with real keys, and compares that are right or stale now."""

    def compare(wish: Wish) -> Compare:
        found = model.keys.get(prefix + wish.key)
        if wish.kind == "range":
            return Compare(prefix + wish.key, 0, prefix + wish.end)
        if wish.kind == "absent":
            return Compare(prefix + wish.key, 0)
        now = found.mod_revision if found else 0
        return Compare(prefix + wish.key, now if wish.kind == "current" else max(now - 1, 0))

    def op(one):
        if isinstance(one, Txn):
            return resolve(one, model, prefix)
        return Put(prefix + one.key, one.value) if isinstance(one, Put) else type(one)(prefix + one.key)

    return Txn(
        tuple(compare(wish) for wish in txn.compares),
        tuple(op(one) for one in txn.then),
        tuple(op(one) for one in txn.orelse),
    )


keys = st.sampled_from(KEYS)
wishes = st.builds(Wish, keys, st.sampled_from(["current", "current", "stale", "absent", "range"]), keys)
simple = st.one_of(st.builds(Put, keys, st.binary(max_size=3)), st.builds(Delete, keys), st.builds(Get, keys))


def transactions(ops: st.SearchStrategy) -> st.SearchStrategy[Txn]:
    branch = st.lists(ops, max_size=3).map(tuple)
    return st.builds(Txn, st.lists(wishes, max_size=2).map(tuple), branch, branch)


txns = transactions(st.recursive(simple, transactions, max_leaves=5))
examples = itertools.count()


@settings(
    max_examples=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(txns, min_size=1, max_size=12))
async def test_a_store_does_what_the_model_does(store: Store, steps: list[Txn]) -> None:
    prefix = f"{next(examples):06}/"  # one store for all examples, each in a place of its own
    start = (await store.txn(Txn())).revision
    model = Model(start, history={start: {}})
    for step in steps:
        txn = resolve(step, model, prefix)
        if writes_twice(txn):
            with pytest.raises(ValueError, match="written twice"):
                await store.txn(txn)
        else:
            assert await store.txn(txn) == model.txn(txn)
        items, revision = await read_prefix(store, prefix)
        assert (list(items), revision) == ([model.keys[key] for key in sorted(model.keys)], model.revision)
    for revision, then in model.history.items():
        page = await store.page(prefix, prefix[:-1] + "0", revision=revision)
        assert list(page.items) == [then[key] for key in sorted(then)]
    expected = list(model.events(start + 1))
    seen: list[Event] = []
    if expected:
        async for batch in store.watch(prefix, start + 1):
            seen += batch.events
            if len(seen) >= len(expected):
                break
    assert seen == expected
