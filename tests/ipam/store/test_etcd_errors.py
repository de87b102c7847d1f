"""Which failures prove that a transaction was not applied. Pure."""

from __future__ import annotations

import pytest

from ipam.errors import StoreError, StoreUnavailable
from ipam.store.etcd_errors import Failure, Kind


@pytest.mark.parametrize(
    ("code", "details"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses; last error: Connection refused"),
        ("UNAVAILABLE", "Socket closed"),
        ("UNAVAILABLE", "etcdserver: no leader"),
        ("UNAVAILABLE", "etcdserver: leader changed"),
        ("UNAVAILABLE", "etcdserver: server stopped"),
        ("UNAVAILABLE", "etcdserver: request timed out"),
        ("UNAVAILABLE", "etcdserver: request timed out, possibly due to previous leader failure"),
        ("UNAVAILABLE", "keepalive watchdog timeout"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded"),
        ("CANCELLED", ""),
        ("INTERNAL", "Received RST_STREAM with error code 2"),
        ("UNKNOWN", "a text that no etcd we know has"),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (5 vs. 4)"),
    ],
)
def test_what_is_not_provably_refused_leaves_it_open(code: str, details: str) -> None:
    assert Failure("a:1", code, details).kind is Kind.UNKNOWN


@pytest.mark.parametrize(
    ("details", "kind", "error", "says"),
    [
        ("etcdserver: mvcc: database space exceeded", Kind.FULL, StoreUnavailable, "alarm disarm"),
        ("etcdserver: too many requests", Kind.BUSY, StoreUnavailable, "overloaded"),
        ("etcdserver: permission denied", Kind.REFUSED, StoreUnavailable, "grant-permission"),
        ("etcdserver: invalid auth token", Kind.LOGIN, StoreUnavailable, "user-file="),
        ("etcdserver: user name is empty", Kind.LOGIN, StoreUnavailable, "user-file="),
        (
            "etcdserver: authentication failed, invalid user ID or password",
            Kind.REFUSED,
            StoreUnavailable,
            "correct the user-file",
        ),
        ("etcdserver: requested lease not found", Kind.REFUSED, StoreError, "take another"),
        ("etcdserver: request is too large", Kind.REFUSED, StoreError, "--max-request-bytes"),
        ("grpc: received message larger than max (3 vs. 2)", Kind.REFUSED, StoreError, "--max-request-bytes"),
        ("etcdserver: too many operations in txn request", Kind.REFUSED, StoreError, "--max-txn-ops"),
    ],
)
def test_a_refusal_names_the_member_the_cause_and_the_next_step(
    details: str, kind: Kind, error: type[StoreError], says: str
) -> None:
    failure = Failure("10.0.0.1:2379", "ANY", details)
    assert failure.kind is kind
    assert isinstance(failure.error(), error)
    assert str(failure.error()).startswith("etcd at 10.0.0.1:2379 ")
    assert says in str(failure.error())


def test_only_a_reply_that_is_too_large_may_be_asked_for_in_parts() -> None:
    assert Failure(
        "a:1", "RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (5 vs. 4)"
    ).too_large
    assert not Failure(
        "a:1", "RESOURCE_EXHAUSTED", "grpc: received message larger than max (5 vs. 4)"
    ).too_large
