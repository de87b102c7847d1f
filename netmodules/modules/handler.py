"""The handler of net-modules' calls: one JSON document in, one call of the isolator, one JSON document out.

    allocate, reserve   isolator.allocate       addresses for a uid
    isolate             isolator.attach         those, on an interface in the namespace of a process
    release             isolator.release        what the uid has and no container carries
    cleanup             isolator.detach         the interface is gone, and its addresses cool down

The module sees only whether ``error`` is null: so it always is there, and says in one sentence what is wrong.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import msgspec
import structlog

from ipam.errors import InvalidInput, MoorageError, NotFound
from ipam.keys import IPAddress
from ipam.netgroups import Netgroup
from ipam.records import Address
from isolator.errors import NamespaceGone
from isolator.model import AllocateSpec, Asked, AttachSpec, Endpoint, EndpointKey
from netmodules.labels import read_labels, read_name
from netmodules.modules.call import (
    Allocate,
    Cleanup,
    Isolate,
    ModuleCall,
    Release,
    Reserve,
    command_of,
    describe,
    parse_call,
)
from netmodules.request import Reply, Request

log = structlog.get_logger(__name__)

ENGINE = "net-modules"
"""What its endpoints and allocated addresses are recorded as."""

NETWORK_VARIABLE = "MOORAGE_NETWORK"
"""In which a hook passes on its --network."""

LONGEST_ERROR = 4096
"""Characters. The module reads 40 KB, each character may be six bytes of JSON."""


class Isolator(Protocol):
    """What this handler needs of the isolator."""

    async def allocate(self, spec: AllocateSpec) -> tuple[IPAddress, ...]:
        """Raises MoorageError."""
        ...

    def allocated(self, ips: Collection[IPAddress]) -> Mapping[IPAddress, Address]:
        """What is recorded of those that are allocated here."""
        ...

    def release(self, uid: str, ips: Collection[IPAddress], asked: Asked) -> tuple[IPAddress, ...]:
        """Succeeds for what is not there."""
        ...

    async def attach(self, spec: AttachSpec) -> Endpoint:
        """Raises MoorageError."""
        ...

    async def detach(self, key: EndpointKey, asked: Asked) -> None:
        """Succeeds for an endpoint that is not there."""
        ...

    def known_networks(self) -> list[str]:
        """Names, for error messages."""
        ...


class ModulesHandler:
    """A ``Handler`` for calls of the kind "netmodules"; see the module's docstring.

    network: the one that is meant where a call names none; None if there is none.
    drain: carries out the spooled calls first.
    """

    def __init__(
        self,
        isolator: Isolator,
        *,
        network: str | None = None,
        drain: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._isolator = isolator
        self._network = network
        self._drain = drain

    async def __call__(self, request: Request) -> Reply:
        """Never raises but for cancellation."""
        try:
            answer = await self._carry_out(request)
        except MoorageError as error:
            details = f" ({error.details})" if error.details else ""
            log.warning("refused", code=error.code, error=f"{error}{details}", **request.names())
            return _reply(request, f"{error}{details}")
        except Exception:
            log.exception("failed", **request.names())
            return _reply(request, "moorage failed unexpectedly; the agent's log says why")
        log.debug("done", **request.names())
        return Reply(0, msgspec.json.encode({**answer, "error": None}))

    async def carry_out_spooled(self, request: Request) -> None:
        """A release or cleanup that waited for this agent. Raises MoorageError."""
        await self._perform(request, parse_call(request.stdin))

    async def _carry_out(self, request: Request) -> dict[str, Any]:
        call = parse_call(request.stdin)
        log.debug("called", **describe(call))
        if self._drain is not None:
            # What was asked for before, in the order it was: the same addresses, uid or container may be meant.
            await self._drain()
        return await self._perform(request, call)

    async def _perform(self, request: Request, call: ModuleCall) -> dict[str, Any]:
        match call:
            case Allocate() | Reserve():
                ips = await self._allocate(request, call)
                if isinstance(call, Reserve):
                    return {}
                return {f"ipv{family}": [str(ip) for ip in ips if ip.version == family] for family in (4, 6)}
            case Release(uid, ips):
                self._isolator.release(uid, ips, request.asked)
            case Isolate():
                await self._isolate(request, call)
            case Cleanup(key):
                await self._isolator.detach(key, request.asked)
        return {}

    async def _allocate(self, request: Request, call: Allocate | Reserve) -> tuple[IPAddress, ...]:
        network = self._network_of(request)
        spec = AllocateSpec(
            uid=call.uid,
            request_id=request.request_id,
            engine=ENGINE,
            network=network,
            ips=call.ips,
            counts=call.counts if isinstance(call, Allocate) else {},
            reservation=call.requested.reservation,
            pool=call.requested.pool,
            netgroups=call.netgroups,
            labels=call.labels,
        )
        try:
            return await self._isolator.allocate(spec)
        except NotFound as error:
            raise self._with_known_networks(network, error) from error

    async def _isolate(self, request: Request, call: Isolate) -> None:
        """What the call does not say of netgroups and labels was said when the addresses were allocated."""
        allocated = self._isolator.allocated(call.ips)
        first = next(iter(allocated.values()), None)
        labels = call.labels or (tuple(first.labels) if first else ())
        netgroups = call.netgroups or (tuple(map(Netgroup, first.netgroups)) if first else ())
        requested = read_labels(labels)
        netns = f"/proc/{call.pid}/ns/net"
        network = self._network_of(request, first.network if first else None)
        try:
            await self._isolator.attach(
                AttachSpec(
                    key=call.key,
                    request_id=_identity(call, netns),
                    asked=request.asked,
                    engine=ENGINE,
                    network=network,
                    netns=netns,
                    ips=call.ips,
                    allocated=True,
                    netgroups=netgroups,
                    labels=labels,
                    mac=requested.mac,
                    default_route=requested.default_route,
                    bandwidth=requested.bandwidth,
                )
            )
        except NotFound as error:
            raise self._with_known_networks(network, error) from error

    def _network_of(self, request: Request, allocated: str | None = None) -> str:
        """The call's, else that which the addresses were allocated on, else the configured one."""
        name = request.env.get(NETWORK_VARIABLE) or allocated or self._network
        if not name:
            raise InvalidInput(
                "no network is named; give moorage-netmodules --network NAME in the module's command, or the agent a "
                'default: network = "NAME" under [netmodules] in agent.toml'
            )
        return read_name("the network's name", name)

    def _with_known_networks(self, network: str, error: NotFound) -> NotFound:
        known = sorted(self._isolator.known_networks())
        if network in known or error.details:
            return error
        return NotFound(str(error), details=f"known networks: {', '.join(known) or 'none'}")


def _identity(call: Isolate, netns: str) -> str:
    """A request id that is the same for the same call: modules have no other way to ask once more.

    The namespace is told by its inode, since a pid may be another process's by then. Raises NamespaceGone.
    """
    try:
        status = os.stat(netns)
    except OSError as error:
        raise NamespaceGone(
            f"process {call.pid} has no network namespace ({error.strerror}); it has ended, start the container anew"
        ) from error
    parts = (call.key.container_id, str(status.st_dev), str(status.st_ino), *map(str, call.ips))
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _reply(request: Request, error: str) -> Reply:
    """A failure. Whoever asked for addresses may look for them before it looks for an error."""
    answer: dict[str, Sequence[str] | str] = {"error": _printable(error)[:LONGEST_ERROR]}
    if command_of(request.stdin) == "allocate":
        answer = {"ipv4": [], "ipv6": [], **answer}
    return Reply(1, msgspec.json.encode(answer))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode() or "it failed"
