"""gRPC as the etcd store uses it: imported quietly, and one channel to one endpoint with our options.

Importing this imports grpcio, 90 ms and 25 MB; only an etcd URL brings it in.
"""

from __future__ import annotations

import importlib
import os
from typing import Any, TypeAlias

from ipam.store.etcd_url import Address, Certificates

# Its C core writes to stderr otherwise; it looks at this once, when imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
grpc: Any = importlib.import_module("grpc")
aio: Any = importlib.import_module("grpc.aio")

Channel: TypeAlias = Any
"""A grpc.aio.Channel."""

MAX_RECEIVE = 32 * 1024 * 1024
"""Bytes of the largest reply taken. gRPC's 4 MiB would be met by a page of 1000 large values or by a member
with a raised --max-request-bytes; without any limit a page of those would be held in memory whole. A page
beyond it is asked for again in halves."""

KEEPALIVE_TIME = 7.0
"""Seconds of silence on a connection with a call on it, watches mostly, before it is pinged. Members hang up
on clients that ping more than every 5 s (--grpc-keepalive-min-time) or with no call open."""

KEEPALIVE_TIMEOUT = 3.0
"""Seconds a ping, and what was sent, may stay unacknowledged before the connection counts as dead."""

RECONNECT = (0.2, 1.0)
"""Seconds between two attempts to connect: at first, and at most."""

CONNECT_ATTEMPT = 3.0
"""Seconds one attempt to connect may take; gRPC's own is 20."""

RESOLVE = 1.0
"""Seconds before a name is looked up again after its addresses failed; gRPC's own is 30."""


def channel(address: Address, pem: Certificates | None) -> Channel:
    """A channel, not connected yet."""
    scheme = {4: "ipv4", 6: "ipv6", 0: "dns"}[address.family]
    target = f"dns:///{address}" if scheme == "dns" else f"{scheme}:{address}"
    options = _options(address)
    if pem is None:
        return aio.insecure_channel(target, options)
    return aio.secure_channel(target, grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert), options)


def _options(address: Address) -> list[tuple[str, int | str]]:
    return [
        # Never send anything twice by itself, not even what it believes unprocessed.
        ("grpc.enable_retries", 0),
        # A channel made anew is to be a connection made anew.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.default_authority", str(address)),
        ("grpc.max_receive_message_length", MAX_RECEIVE),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", _ms(KEEPALIVE_TIME)),
        ("grpc.keepalive_timeout_ms", _ms(KEEPALIVE_TIMEOUT)),
        # keepalive_timeout alone did nothing in gRPC 1.85: a ping to a paused member waited for these 60 s.
        ("grpc.http2.ping_timeout_ms", _ms(KEEPALIVE_TIMEOUT)),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", _ms(RECONNECT[0])),
        ("grpc.max_reconnect_backoff_ms", _ms(RECONNECT[1])),
        ("grpc.min_reconnect_backoff_ms", _ms(CONNECT_ATTEMPT)),
        ("grpc.dns_min_time_between_resolutions_ms", _ms(RESOLVE)),
    ]


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
