"""The part of etcd's v3 wire protocol that a store needs: messages and methods.

Names and numbers are those of etcd's api/etcdserverpb/rpc.proto and api/mvccpb/kv.proto; fields that nobody
here uses are left out, which protobuf allows, and enums travel as the integers they are. The classes are
made at import, in a descriptor pool of their own: there is no generated code to fit to a version of
protobuf, and no clash with another etcd client in the process. docs/decisions/dependencies.md says more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Message: TypeAlias = Any
"""A message of protobuf, whose fields are made at run time."""

_PACKAGE = "etcdserverpb"

_MESSAGES = {
    "ResponseHeader": "uint64 cluster_id=1; uint64 member_id=2; int64 revision=3; uint64 raft_term=4",
    "KeyValue": "bytes key=1; int64 create_revision=2; int64 mod_revision=3; bytes value=5; int64 lease=6",
    "RangeRequest": "bytes key=1; bytes range_end=2; int64 limit=3; int64 revision=4; bool keys_only=8",
    "RangeResponse": "ResponseHeader header=1; repeated KeyValue kvs=2; bool more=3",
    "PutRequest": "bytes key=1; bytes value=2; int64 lease=3",
    "PutResponse": "ResponseHeader header=1",
    "DeleteRangeRequest": "bytes key=1",
    "DeleteRangeResponse": "ResponseHeader header=1; int64 deleted=2",
    "Compare": "int32 result=1; int32 target=2; bytes key=3; int64 mod_revision=6; bytes range_end=64",
    "RequestOp": (
        "RangeRequest request_range=1; PutRequest request_put=2; "
        "DeleteRangeRequest request_delete_range=3; TxnRequest request_txn=4"
    ),
    "ResponseOp": (
        "RangeResponse response_range=1; PutResponse response_put=2; "
        "DeleteRangeResponse response_delete_range=3; TxnResponse response_txn=4"
    ),
    "TxnRequest": "repeated Compare compare=1; repeated RequestOp success=2; repeated RequestOp failure=3",
    "TxnResponse": "ResponseHeader header=1; bool succeeded=2; repeated ResponseOp responses=3",
    "Event": "int32 type=1; KeyValue kv=2",
    "WatchCreateRequest": (
        "bytes key=1; bytes range_end=2; int64 start_revision=3; bool progress_notify=4; bool fragment=8"
    ),
    "WatchProgressRequest": "",
    "WatchRequest": "WatchCreateRequest create_request=1; WatchProgressRequest progress_request=3",
    "WatchResponse": (
        "ResponseHeader header=1; int64 watch_id=2; bool created=3; bool canceled=4; int64 compact_revision=5; "
        "string cancel_reason=6; bool fragment=7; repeated Event events=11"
    ),
    "StatusRequest": "",
    "StatusResponse": "ResponseHeader header=1; uint64 raftIndex=5; uint64 raftTerm=6; uint64 raftAppliedIndex=7",
    "LeaseGrantRequest": "int64 TTL=1",
    "LeaseGrantResponse": "ResponseHeader header=1; int64 ID=2; int64 TTL=3",
    "LeaseRevokeRequest": "int64 ID=1",
    "LeaseRevokeResponse": "ResponseHeader header=1",
    "LeaseKeepAliveRequest": "int64 ID=1",
    "LeaseKeepAliveResponse": "ResponseHeader header=1; int64 ID=2; int64 TTL=3",
    "AuthenticateRequest": "string name=1; string password=2",
    "AuthenticateResponse": "ResponseHeader header=1; string token=2",
}

COMPARE_MOD = 2
"""Compare.target: the key's mod_revision. (Compare.result 0 is EQUAL, the default.)"""

EVENT_DELETE = 1
"""Event.type; 0 is a put."""


@dataclass(frozen=True, slots=True)
class Method:
    """A remote procedure. ``streams``: requests and replies are streams, else there is one of each."""

    path: str
    request: Message
    reply: Message
    streams: bool = False


_FIELD = re.compile(r"(repeated )?(\w+) (\w+)=(\d+)")


def _describe(fields: str, message: descriptor_pb2.DescriptorProto) -> None:
    kinds = descriptor_pb2.FieldDescriptorProto
    for repeated, kind, name, number in _FIELD.findall(fields):
        field = message.field.add(name=name, number=int(number))
        field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
        if kind in _MESSAGES:
            field.type, field.type_name = kinds.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
        else:
            field.type = kinds.Type.Value(f"TYPE_{kind.upper()}")


def _classes() -> dict[str, Message]:
    file = descriptor_pb2.FileDescriptorProto(name="etcd.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        _describe(fields, file.message_type.add(name=name))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _MESSAGES
    }


_CLASSES = _classes()

RangeRequest = _CLASSES["RangeRequest"]
StatusRequest = _CLASSES["StatusRequest"]
PutRequest = _CLASSES["PutRequest"]
DeleteRangeRequest = _CLASSES["DeleteRangeRequest"]
Compare = _CLASSES["Compare"]
RequestOp = _CLASSES["RequestOp"]
TxnRequest = _CLASSES["TxnRequest"]
WatchRequest = _CLASSES["WatchRequest"]
WatchCreateRequest = _CLASSES["WatchCreateRequest"]
WatchProgressRequest = _CLASSES["WatchProgressRequest"]
LeaseGrantRequest = _CLASSES["LeaseGrantRequest"]
LeaseRevokeRequest = _CLASSES["LeaseRevokeRequest"]
LeaseKeepAliveRequest = _CLASSES["LeaseKeepAliveRequest"]
AuthenticateRequest = _CLASSES["AuthenticateRequest"]


def _method(service: str, name: str, message: str = "", *, streams: bool = False) -> Method:
    request, reply = (_CLASSES[f"{message or name}{suffix}"] for suffix in ("Request", "Response"))
    return Method(f"/{_PACKAGE}.{service}/{name}", request, reply, streams)


RANGE = _method("KV", "Range")
TXN = _method("KV", "Txn")
WATCH = _method("Watch", "Watch", streams=True)
LEASE_GRANT = _method("Lease", "LeaseGrant")
LEASE_REVOKE = _method("Lease", "LeaseRevoke")
LEASE_KEEP_ALIVE = _method("Lease", "LeaseKeepAlive", streams=True)
AUTHENTICATE = _method("Auth", "Authenticate")
STATUS = _method("Maintenance", "Status")
METHODS = (RANGE, TXN, WATCH, LEASE_GRANT, LEASE_REVOKE, LEASE_KEEP_ALIVE, AUTHENTICATE, STATUS)
