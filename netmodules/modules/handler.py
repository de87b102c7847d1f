"""The handler of net-modules calls: a document in, one call of the isolator, a document out.

    allocate, reserve   labels and arguments -> isolator.allocate -> {"ipv4": […], "ipv6": […], "error": null}
    isolate             labels of the call, else those of allocate -> isolator.isolate
    release, cleanup    isolator.release, isolator.cleanup; what is not known is done already

The caller reads at most 40 KB of one JSON document and looks at ``error`` alone: anything but null is a failure, and
then it is a sentence. The exit code follows it, for whoever tries by hand.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec
import structlog

from ipam.errors import InvalidInput, MoorageError
from ipam.keys import IPAddress
from ipam.records import Label
from isolator.allocated import AllocateSpec, IsolateSpec
from isolator.model import Asked
from netmodules.labels import Requested, read_labels, read_name, read_netgroups
from netmodules.modules.calls import Allocate, Call, Cleanup, Isolate, Release, parse_call
from netmodules.request import Reply, Request

log = structlog.get_logger(__name__)

KIND = "netmodules"
"""What such a request's ``call`` is."""

COMMAND = "NETMODULES_COMMAND"
NETWORK = "NETMODULES_NETWORK"
"""What the hook says of a request beside its stdin: the command, as far as it could be read, and --network."""

LONGEST_ERROR = 4000
"""Characters, of up to six bytes each as JSON has them: less than the 40 KB that the caller reads."""


class Isolator(Protocol):
    """What this handler needs of the isolator."""

    async def allocate(self, spec: AllocateSpec) -> list[IPAddress]:
        """Raises MoorageError."""
        ...

    def promised(self, ips: Sequence[IPAddress]) -> tuple[Label, ...]:
        """The labels that addresses were allocated with."""
        ...

    async def release(self, uid: str, ips: Sequence[IPAddress], asked: Asked) -> None:
        """Succeeds for what nobody has. Raises MoorageError."""
        ...

    async def isolate(self, spec: IsolateSpec) -> object:
        """Raises MoorageError. What it returns is not looked at: the protocol's answer says nothing of it."""
        ...

    async def cleanup(self, container_id: str, asked: Asked) -> None:
        """Succeeds for a container that is not there."""
        ...

    async def take_back(self, call: str, asked: Asked) -> None:
        """Undoes an allocate or isolate."""
        ...


class ModulesHandler:
    """A ``Handler`` for calls of the kind KIND; see the module's docstring.

    default_network: what a call means that names none; None if there is no such.
    drain: carries out what is spooled of this protocol.
    """

    def __init__(
        self,
        isolator: Isolator,
        *,
        default_network: str | None = None,
        drain: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._isolator = isolator
        self._default_network = default_network
        self._drain = drain

    async def __call__(self, request: Request) -> Reply:
        """Never raises but for cancellation."""
        try:
            call = parse_call(request.stdin)
            await self._drain_before(call)
            reply = await self._carry_out(call, request)
        except MoorageError as error:
            log.warning(
                "refused", code=error.code, error=str(error), details=error.details, **request.names()
            )
            return failure("; ".join(filter(None, (str(error), error.details))))
        except Exception:
            log.exception("failed", **request.names())
            return failure("moorage failed unexpectedly; the agent's log says why")
        log.debug("done", **request.names())
        return Reply(0, msgspec.json.encode({**reply, "error": None}, enc_hook=str))

    async def carry_out(self, request: Request) -> None:
        """A release or cleanup from the spool. Raises MoorageError if it may work later."""
        try:
            await self._carry_out(parse_call(request.stdin), request)
        except InvalidInput as error:
            # Nobody is there to be told, and another try would end no better.
            log.error("a spooled call is dropped", why=str(error), **request.names())

    async def undo(self, request: Request) -> None:
        """Take back what a call did whose caller is gone."""
        await self._isolator.take_back(request.request_id, request.asked)

    async def _drain_before(self, call: Call) -> None:
        """What was spooled was asked for before: a release before its cleanup, both before an isolate."""
        if self._drain is None:
            return
        try:
            await self._drain()
        except MoorageError as error:
            if isinstance(call, (Allocate, Isolate)):
                raise
            log.warning("spooled calls are left for later", why=str(error))

    async def _carry_out(self, call: Call, request: Request) -> dict[str, Any]:
        match call:
            case Allocate():
                return await self._allocate(call, request)
            case Isolate():
                await self._isolator.isolate(self._isolate_spec(call, request))
            case Release():
                await self._isolator.release(call.uid, call.ips, request.asked)
            case Cleanup():
                await self._isolator.cleanup(call.container_id, request.asked)
        return {}

    async def _allocate(self, call: Allocate, request: Request) -> dict[str, Any]:
        spec = self._allocate_spec(call, request)
        ips = await self._isolator.allocate(spec) if any(spec.counts.values()) else []
        if call.is_reserve:
            return {}
        return {f"ipv{family}": [str(ip) for ip in ips if ip.version == family] for family in (4, 6)}

    def _allocate_spec(self, call: Allocate, request: Request) -> AllocateSpec:
        requested = read_labels(call.labels)
        return AllocateSpec(
            uid=call.uid,
            call=request.request_id,
            network=self._network(request),
            counts=call.counts,
            ips=_named(call, requested),
            reservation=requested.reservation,
            pool=requested.pool,
            netgroups=read_netgroups("netgroups and labels", (*call.netgroups, *requested.netgroups)),
            labels=call.labels,
            mac=requested.mac,
            bandwidth=requested.bandwidth,
        )

    def _isolate_spec(self, call: Isolate, request: Request) -> IsolateSpec:
        labels = self._isolator.promised(call.ips) if call.labels is None else call.labels
        requested = read_labels(labels)
        for ip in filter(None, (requested.ip, requested.ip6)):
            if ip not in call.ips:
                raise InvalidInput(
                    f"the labels ask for {ip}, and the container is to have {', '.join(map(str, call.ips))}; such "
                    "labels belong into allocate"
                )
        return IsolateSpec(
            container_id=call.container_id,
            request_id=request.request_id,
            asked=request.asked,
            pid=call.pid,
            ips=call.ips,
            network=self._named_network(request),
            netgroups=read_netgroups("netgroups and labels", (*call.netgroups, *requested.netgroups)),
            labels=labels,
            mac=requested.mac,
            default_route=requested.default_route,
            bandwidth=requested.bandwidth,
        )

    def _network(self, request: Request) -> str:
        network = self._named_network(request) or self._default_network
        if network is None:
            raise InvalidInput(
                "the call names no network; write moorage-netmodules --network NAME into the module's commands, or set "
                "default_network in the agent's configuration"
            )
        return network

    @staticmethod
    def _named_network(request: Request) -> str | None:
        """What --network says. Raises InvalidInput."""
        named = request.env.get(NETWORK, "")
        return read_name("--network", named) if named else None


def failure(message: str) -> Reply:
    """A document with an error, of bounded size; bytes that were no text arrive as lone surrogates."""
    text = (
        message.encode("utf-8", "backslashreplace").decode()
        or "moorage failed without saying why; see its log"
    )
    if len(text) > LONGEST_ERROR:
        text = text[: LONGEST_ERROR - 1] + "…"
    return Reply(1, msgspec.json.encode({"error": text}))


def _named(call: Allocate, requested: Requested) -> tuple[IPAddress, ...]:
    """The addresses asked for, by the call and by its labels."""
    by_label = [ip for ip in (requested.ip, requested.ip6) if ip is not None]
    return tuple(dict.fromkeys((*call.ips, *by_label)))
