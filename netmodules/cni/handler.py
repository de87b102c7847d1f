"""The handler of CNI calls: environment and stdin in, one call of the isolator, result or error out.

    ADD     validate -> drain the spool for this key -> isolator.attach -> result
    DEL     key only -> isolator.detach -> nothing on stdout
    CHECK   prevResult against the endpoint, and the endpoint against the kernel (isolator.check)
    STATUS  isolator.ready; error 50 or 51 with the reason
    GC      the list of what the engine has -> isolator.collect_garbage

Whatever happens, the engine gets a result or a CNI error of one sentence, never a traceback.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Protocol

import structlog

from ipam.errors import Fenced, InvalidInput, MoorageError, NotFound
from isolator.errors import NotAttached
from isolator.model import Asked, AttachSpec, Endpoint, EndpointKey, ValidAttachments
from netmodules.cni.config import Config, parse_config, version_at_least, version_for_errors
from netmodules.cni.environment import read_environment, read_key
from netmodules.cni.errors import BadEnvironment, IncompatibleVersion, LimitedConnectivity, NotAvailable
from netmodules.cni.results import differences, render_result
from netmodules.cni.spec import attach_spec, network_of, valid_attachments
from netmodules.request import Reply, Request, refusal

log = structlog.get_logger(__name__)


class Isolator(Protocol):
    """What this handler needs of the isolator."""

    async def attach(self, spec: AttachSpec) -> Endpoint:
        """Raises MoorageError."""
        ...

    async def detach(self, key: EndpointKey, asked: Asked) -> None:
        """Succeeds for an endpoint that is not there."""
        ...

    async def check(self, key: EndpointKey, netns: str) -> Endpoint:
        """The endpoint, if it is there, in ``netns``, and as it should be. Raises MoorageError."""
        ...

    async def ready(self, network: str | None) -> None:
        """Raises MoorageError when an ADD could not work now: Fenced if what runs may be cut off, NotFound."""
        ...

    async def collect_garbage(self, valid: ValidAttachments) -> None:
        """Detach all that the engine has on that network and does not list. Raises TryAgain for what is left."""
        ...

    def known_networks(self) -> list[str]:
        """Names, for error messages."""
        ...


class CniHandler:
    """A ``Handler`` for calls of the kind "cni"; see the module's docstring.

    drain: carries out the spooled DELs of a key.
    """

    def __init__(
        self,
        isolator: Isolator,
        *,
        drain: Callable[[EndpointKey], Awaitable[None]] | None = None,
    ) -> None:
        self._isolator = isolator
        self._drain = drain
        self._commands: Mapping[str, Callable[[Request], Awaitable[bytes]]] = {
            "ADD": self._add,
            "DEL": self._del,
            "CHECK": self._check,
            "STATUS": self._status,
            "GC": self._gc,
        }

    async def __call__(self, request: Request) -> Reply:
        """Never raises but for cancellation."""
        try:
            stdout = await self._command(request)(request)
        except MoorageError as error:
            log.warning(
                "refused", code=error.code, error=str(error), details=error.details, **request.names()
            )
            return _error(request, error.code, str(error), error.details)
        except Exception:
            log.exception("failed", **request.names())
            return _error(request, MoorageError.code, "moorage failed unexpectedly; the agent's log says why")
        log.debug("done", **request.names())
        return Reply(0, stdout)

    async def undo(self, request: Request) -> None:
        """Take back an ADD whose caller is gone.

        It is a DEL asked for just after the ADD, not now: the engine may have deleted and added the same
        endpoint again since, and a later ADD is not this one's to undo.
        """
        asked = replace(request.asked, at=request.asked.at + 1)
        await self._isolator.detach(read_key(request.env), asked)

    def _command(self, request: Request) -> Callable[[Request], Awaitable[bytes]]:
        name = request.env.get("CNI_COMMAND", "")
        if not name:
            raise BadEnvironment("CNI_COMMAND is missing")
        if name not in self._commands:
            raise BadEnvironment(
                f"CNI_COMMAND {name!r:.40} is not known to this version; it knows {', '.join(self._commands)}"
            )
        return self._commands[name]

    async def _add(self, request: Request) -> bytes:
        environment = read_environment(request.env, netns_required=True)
        config = parse_config(request.stdin)
        spec = attach_spec(config, environment, request)
        if self._drain is not None:
            await self._drain(spec.key)
        try:
            endpoint = await self._isolator.attach(spec)
        except NotFound as error:
            raise self._with_known_networks(spec.network, error) from error
        return render_result(endpoint, config)

    async def _del(self, request: Request) -> bytes:
        await self._isolator.detach(read_key(request.env), request.asked)
        return b""

    async def _check(self, request: Request) -> bytes:
        environment = read_environment(request.env, netns_required=True)
        config = parse_config(request.stdin)
        _require_version(config, "CHECK", "0.4.0")
        if config.prev_result is None:
            raise InvalidInput('CHECK needs the result of ADD as "prevResult" in the configuration')
        endpoint = await self._isolator.check(environment.key, environment.netns)
        found = differences(endpoint, config.prev_result)
        if found:
            raise NotAttached(f"{environment.key} is not what ADD returned: {'; '.join(found)}")
        return b""

    async def _status(self, request: Request) -> bytes:
        config = parse_config(request.stdin)
        _require_version(config, "STATUS", "1.1.0")
        network = network_of(config)
        try:
            await self._isolator.ready(network)
        except NotFound as error:
            raise self._with_known_networks(network, error) from error
        except Fenced as error:
            raise LimitedConnectivity(str(error), details=error.details) from error
        except MoorageError as error:
            raise NotAvailable(str(error), details=error.details) from error
        return b""

    async def _gc(self, request: Request) -> bytes:
        config = parse_config(request.stdin)
        _require_version(config, "GC", "1.1.0")
        await self._isolator.collect_garbage(valid_attachments(config, request))
        return b""

    def _with_known_networks(self, network: str, error: NotFound) -> NotFound:
        known = sorted(self._isolator.known_networks())
        if network in known or error.details:
            return error
        return NotFound(str(error), details=f"known networks: {', '.join(known) or 'none'}")


def _require_version(config: Config, command: str, version: str) -> None:
    if not version_at_least(config.version, version):
        raise IncompatibleVersion(f"{command} needs cniVersion {version} or later, not {config.version}")


def _error(request: Request, code: int, message: str, details: str = "") -> Reply:
    return refusal(code, message, details=details, version=version_for_errors(request.stdin))
