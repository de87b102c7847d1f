"""What a transaction may look like, whatever store runs it: checked before anything is sent.

The rules are etcd's own (3.4, `etcdserver/api/v3rpc/key.go`, and tried against a running one), with one
that is stricter, so that a transaction which one implementation takes is taken by all:

- Operations: the largest of compares, ``then`` and ``orelse`` counts against MAX_OPS, and a nested
  transaction has what its parent left. So 64 nested ones with 64 operations each pass (64 + 64 = 128),
  100 with one each pass (100 + 1), 65 with 64 do not (129).
- Keys: no two operations that may both run write the same key. ``then`` and ``orelse`` of one
  transaction exclude each other and may share keys; those of siblings do not.
  (etcd would let the same key be *deleted* twice.)
- Keys are ASCII and not empty; a compare over a range asks for absence.
"""

from __future__ import annotations

from collections.abc import Iterator

from ipam.store.base import MAX_OPS, Compare, Delete, Get, Op, Put, Txn


def check(txn: Txn) -> None:
    """Raises ValueError, naming the key or the number, if a rule is broken."""
    _check_size(txn, MAX_OPS)
    _written(txn)


def check_key(key: str) -> None:
    """Raises ValueError unless ``key`` can name something."""
    if not key or not key.isascii():
        raise ValueError(f"{key!r} is no key: keys are ASCII and not empty")


def writes(txn: Txn) -> bool:
    """Whether some branch of it could write."""
    return any(not isinstance(op, Get) for op in _leaves(txn))


def written(txn: Txn) -> frozenset[str]:
    """The keys that some branch of it could write."""
    return frozenset(op.key for op in _leaves(txn) if not isinstance(op, Get))


def _leaves(txn: Txn) -> Iterator[Put | Delete | Get]:
    for op in (*txn.then, *txn.orelse):
        if isinstance(op, Txn):
            yield from _leaves(op)
        else:
            yield op


def _check_size(txn: Txn, budget: int) -> None:
    size = max(len(txn.compares), len(txn.then), len(txn.orelse))
    if size > budget:
        raise ValueError(
            f"{size} compares or operations where {budget} are left: one transaction takes {MAX_OPS}, "
            "those of each nested one added to its parent's; split it"
        )
    for compare in txn.compares:
        _check_compare(compare)
    for op in (*txn.then, *txn.orelse):
        if isinstance(op, Txn):
            _check_size(op, budget - size)
        else:
            check_key(op.key)


def _check_compare(compare: Compare) -> None:
    check_key(compare.key)
    if compare.range_end is not None:
        check_key(compare.range_end)
        if compare.mod_revision != 0:
            raise ValueError(f"a compare over the range from {compare.key} can only ask for absence")


def _written(txn: Txn) -> set[str]:
    """Keys it may write."""
    return _written_together(txn.then) | _written_together(txn.orelse)


def _written_together(ops: tuple[Op, ...]) -> set[str]:
    """Keys these may write, all of them running. Raises ValueError if one would be written twice."""
    keys: set[str] = set()
    for op in ops:
        if isinstance(op, Get):
            continue
        mine = _written(op) if isinstance(op, Txn) else {op.key}
        if twice := keys & mine:
            raise ValueError(f"key {min(twice)} would be written twice in one transaction; keep one")
        keys |= mine
    return keys
