"""What etcd's and gRPC's errors mean to a caller of the store.

What matters is whether a transaction can have been applied. Only the refusals listed here, which etcd gives
before it applies anything (3.4: etcdserver/api/v3rpc/rpctypes/error.go, and tried against a running one),
prove that it was not; "database space exceeded" is listed for its advice and proves nothing. Everything else,
a lost connection, a deadline, "request timed out", "no leader", "leader changed", an unknown text, leaves it open, also
when it looks harmless.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from ipam.errors import RequestTooLarge, StoreError, StoreUnavailable


class AuthenticationOff(StoreError):
    """This etcd has no users, or does not use them."""


class LeaseOver(StoreError):
    """A lease that has expired or was revoked."""


class Kind(Enum):
    """What to do about a failed call."""

    REFUSED = "not applied; asking again the same way will not help"
    BUSY = "not applied; may be asked again at once"
    LOGIN = "not applied; log in again, then ask again"
    COMPACTED = "not applied; the revision asked for is gone"
    FULL = "nobody knows; the member is well, and asking again helps only once there is space"
    UNKNOWN = "nobody knows; reads may be asked again, of another member"


class Failure(NamedTuple):
    """A call that failed at ``endpoint``, with gRPC's status code and text."""

    endpoint: str
    code: str
    details: str

    @property
    def kind(self) -> Kind:
        return self._refusal().kind

    @property
    def too_large(self) -> bool:
        """The reply, not the request, was too large (of a request, Go's "grpc: received message larger")."""
        return self.code == "RESOURCE_EXHAUSTED" and "Received message larger" in self.details

    @property
    def deadline(self) -> bool:
        """There was no answer at all in time."""
        return self.code == "DEADLINE_EXCEEDED"

    def error(self) -> StoreError:
        """What etcd said and what to do about it; whether the request was applied is up to ``kind``."""
        return self._refusal().make(f"etcd at {self.endpoint} {self._refusal().says.format(self.details)}")

    def __str__(self) -> str:
        if self.deadline:
            return f"etcd at {self.endpoint} did not answer in time"
        return f"etcd at {self.endpoint} failed ({self.details or self.code})"

    def _refusal(self) -> _Refusal:
        for refusal in _REFUSALS:
            if refusal.text in self.details:
                return refusal
        return _Refusal("", Kind.UNKNOWN, "failed ({0}); check `etcdctl endpoint health`", StoreUnavailable)


class _Refusal(NamedTuple):
    text: str
    kind: Kind
    says: str
    make: Callable[[str], StoreError]


_NO_LOGIN = "wants a user and password; name a file that holds user:password with user-file= in the store URL"

# StoreUnavailable where an operator can cure it without a change to what was asked: callers try again.
_REFUSALS = (
    _Refusal(
        "required revision has been compacted",
        Kind.COMPACTED,
        "has compacted the revision asked for; list again",
        StoreUnavailable,
    ),
    _Refusal(
        "required revision is a future revision",
        Kind.REFUSED,
        "has not reached the revision asked for; if it was restored from a backup, list again",
        StoreError,
    ),
    _Refusal(
        "requested lease not found", Kind.REFUSED, "knows no such lease; it is over, take another", LeaseOver
    ),
    _Refusal(
        # Said also of the transaction that crosses the quota, which was applied (3.4: etcdserver/apply.go,
        # quotaApplierV3.Txn; with 3.4 and 3.5, 11 of 11).
        "database space exceeded",
        Kind.FULL,
        "is out of space and takes no writes; compact and defragment it or raise --quota-backend-bytes, then "
        "run `etcdctl alarm disarm`",
        StoreUnavailable,
    ),
    _Refusal(
        "too many requests", Kind.BUSY, "is overloaded; it catches up or needs faster disks", StoreUnavailable
    ),
    _Refusal(
        "request is too large",
        Kind.REFUSED,
        "refuses so large a transaction; split it or raise --max-request-bytes",
        RequestTooLarge,
    ),
    _Refusal(
        "grpc: received message larger than max",
        Kind.REFUSED,
        "refuses so large a transaction; split it or raise --max-request-bytes",
        RequestTooLarge,
    ),
    _Refusal(
        "too many operations in txn request",
        Kind.REFUSED,
        "refuses so many operations in one transaction; set its --max-txn-ops to 128 or more",
        StoreError,
    ),
    _Refusal(
        "permission denied",
        Kind.REFUSED,
        "denies this user the keys of moorage; grant them: etcdctl role grant-permission ROLE "
        "--prefix=true readwrite PREFIX/",
        StoreUnavailable,
    ),
    _Refusal("invalid auth token", Kind.LOGIN, _NO_LOGIN, StoreUnavailable),
    _Refusal("revision of auth store is old", Kind.LOGIN, "changes its users just now", StoreUnavailable),
    _Refusal("user name is empty", Kind.LOGIN, _NO_LOGIN, StoreUnavailable),
    _Refusal("authentication is not enabled", Kind.REFUSED, "asks nobody who they are", AuthenticationOff),
    _Refusal(
        "authentication failed",
        Kind.REFUSED,
        "does not know this user or password; correct the user-file of the store URL",
        StoreUnavailable,
    ),
    _Refusal(
        "corrupt cluster",
        Kind.REFUSED,
        "found its data corrupt and refuses to work; restore that member",
        StoreUnavailable,
    ),
    _Refusal(
        "rpc not supported for learner",
        Kind.BUSY,
        "is a learner and serves nobody; name voting members in the store URL",
        StoreUnavailable,
    ),
)
