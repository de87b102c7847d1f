"""Connections to the members: one at a time in use, another one found when it fails.

Each endpoint has a gRPC channel of its own, so that we and not gRPC decide where a request goes and know
whether it left. ``Link.ready`` gives an endpoint whose connection stands: the one used last, else whichever
of the others connects first. A connection counts only when the member's HTTP/2 settings arrived, which a
paused process does not send although its kernel accepts the connection.

A member that failed is *suspect* for a while and only used if no other can be. If it did not answer at all
its connection is replaced, and closed when the last call on it is over; a new one looks its name up again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeAlias

from ipam.errors import InvalidInput, StoreUnavailable
from ipam.store import etcd_proto as pb
from ipam.store.etcd_errors import Failure
from ipam.store.etcd_url import Address, EtcdUrl, certificates

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its C core writes to stderr; it reads this when imported
