"""The agent: everything composed from the configuration, started, served and ended in order.

    claim the network namespace -> open store and journal -> recover -> drain the spool -> serve

SIGTERM and SIGINT end it: requests in flight are finished, endpoints stay as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from ipam.errors import InvalidInput, MoorageError, TryAgain
from ipam.store import ending_certificates, endpoints, open_store
from ipam.supervision import Supervision
from isolator.claim import Claim
from isolator.isolator import Isolator, Settings
from isolator.model import Endpoint, EndpointKey
from moorage import __version__
from moorage.config import AgentConfig
from moorage.notify import READY, STOPPING, notify
from netmodules.cni.handler import CniHandler
from netmodules.modules.handler import KIND, ModulesHandler
from netmodules.request import Reply, Request
from netmodules.server import CALLERS, Server
from netmodules.spool import NETMODULES, Entry, Spool, SpoolWatcher

if TYPE_CHECKING:
    from moorage.mesos import MesosFacts

log = structlog.get_logger(__name__)

STOP_WITHIN = 55.0
"""Seconds for requests in flight when the agent ends: as long as a hook waits for its answer."""

DESCRIPTORS = 65536
"""Most that the agent asks for."""

OWN_DESCRIPTORS = 64
"""What it has open while it serves nobody, and some. Half of the others are for callers, half for what these want."""

LEAST_CALLERS = 8
"""With hardly any descriptors at all."""

SWITCH_INTERVAL = 0.0005
"""Seconds a thread keeps the interpreter when another wants it. Python's 5 ms is longer than a whole ADD, which
the store's threads would then hold up."""


_M_ARENA_MAX = -8
"""Of mallopt(3)."""


def run(config: AgentConfig) -> int:
    """Run the agent until it is told to end; returns the exit code."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    _share_memory()
    descriptors = _raise_descriptors()
    if os.geteuid() != 0:
        log.error("agent cannot run", why="it needs root, for namespaces and netlink; run it with sudo")
        return 1
    try:
        asyncio.run(_serve(config, _callers(descriptors)))
    except MoorageError as error:
        log.error("agent cannot run", why=str(error))
        return 1
    except OSError as error:
        places = f"{config.socket.parent} and {config.state_dir}"
        log.error("agent cannot run", why=f"{error}; see that {places} can be used")
        return 1
    return 0


def _share_memory() -> None:
    """One heap for all threads. glibc would give each its own, where what a thread once needed is lost to the others:
    25 MB of an agent that follows 100,000 addresses. They take turns in the interpreter anyway."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _raise_descriptors() -> int:
    """As many as the hard limit allows: the soft one is often 1,024, for programs that use select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return most
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def _callers(descriptors: int) -> int:
    """How many may be served at a time."""
    return max(LEAST_CALLERS, min(CALLERS, (descriptors - OWN_DESCRIPTORS) // 2))


async def _serve(config: AgentConfig, callers: int) -> None:
    """callers: connections that may be served at a time."""
    ending = asyncio.Event()
    supervision = Supervision()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    with Claim():
        store = await open_store(config.store, supervision=supervision)
        try:
            isolator = Isolator(
                Settings(
                    node=config.node,
                    node_given=config.node_given,
                    state_dir=config.state_dir,
                    version=__version__,
                    underlay=config.underlay,
                    vxlan_port=config.vxlan_port,
                    gateway=config.gateway,
                    manage_docker_user=config.manage_docker_user,
                    asks_mesos=config.mesos_agent_url is not None,
                    store_endpoints=endpoints(config.store),
                    ending_certificates=functools.partial(ending_certificates, config.store),
                ),
                store,
                supervision,
            )
            node = isolator.node
            try:
                await isolator.start()
                await _serve_until(ending, config, isolator, supervision, callers)
            finally:
                await isolator.stop()
        finally:
            await store.close()
    log.info("agent ended", node=node)


async def _serve_until(
    ending: asyncio.Event,
    config: AgentConfig,
    isolator: Isolator,
    supervision: Supervision,
    callers: int,
) -> None:
    """Nothing that goes on beside serving ends it, whatever becomes of that."""
    beside = [supervision.start("isolator", isolator.run)]
    if config.mesos_agent_url is not None:
        beside.append(supervision.start("mesos", _mesos_facts(config.mesos_agent_url, config, isolator).run))
    spool = Spool(config.socket.parent / "spool")

    async def carry_out(entry: Entry) -> None:
        if entry.request.call == KIND:
            await modules.carry_out(entry.request)
        else:
            await isolator.detach(entry.key, entry.request.asked)

    watcher = SpoolWatcher(spool, carry_out, supervision)
    cni = CniHandler(isolator, drain=watcher.drain)
    modules = ModulesHandler(
        isolator.allocated,
        default_network=config.default_network,
        drain=functools.partial(watcher.drain, NETMODULES),
    )
    admin = AdminHandler(isolator, spool)

    async def undo(request: Request) -> None:
        await (modules if request.call == KIND else cni).undo(request)

    server = Server(
        config.socket, {"cni": cni, KIND: modules, "admin": admin}, undo, supervision, callers=callers
    )
    try:
        try:
            await watcher.drain()
        except MoorageError as error:
            log.warning("a spooled call is left for later", why=str(error))
        await watcher.start()
        await server.start()
        log.info("agent serves", node=isolator.node, socket=str(config.socket), instance=isolator.instance)
        notify(READY)
        await ending.wait()
        notify(STOPPING)
    finally:
        await server.stop(STOP_WITHIN)
        await watcher.stop()
        for task in beside:
            task.cancel()
        await asyncio.wait(beside)


def _mesos_facts(url: str, config: AgentConfig, isolator: Isolator) -> MesosFacts:
    # Imported only now: requests costs 10 MB, which an agent without Mesos need not pay.
    from marathon.http import Access
    from marathon.mesos import Agent
    from moorage.mesos import MesosFacts

    access = Access(user_file=config.mesos_credentials, ca=config.mesos_ca)
    return MesosFacts(isolator, Agent(url, access))


class AdminHandler:
    """Answers the command line's questions to this node's agent; see moorage/admin.py."""

    def __init__(self, isolator: Isolator, spool: Spool) -> None:
        self._isolator = isolator
        self._spool = spool
        self._calls: dict[str, Callable[[dict[str, Any]], Awaitable[Any]]] = {
            "status": self._status,
            "endpoints": self._endpoints,
            "missing": self._missing,
        }

    async def __call__(self, request: Request) -> Reply:
        """Never raises but for cancellation."""
        try:
            return Reply(0, msgspec.json.encode(await self._answer(request.stdin), enc_hook=str))
        except MoorageError as error:
            return Reply(1, msgspec.json.encode({"error": str(error)}))

    async def _answer(self, stdin: bytes) -> Any:
        try:
            arguments = msgspec.json.decode(stdin, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise InvalidInput(f"the request is no JSON object ({error})") from error
        call = self._calls.get(str(arguments.get("call")))
        if call is None:
            raise InvalidInput(
                f"the agent answers {', '.join(sorted(self._calls))}, not {arguments.get('call')!r}"
            )
        return await call(arguments)

    async def _status(self, _: dict[str, Any]) -> dict[str, Any]:
        try:
            spooled = len(self._spool.entries())
        except OSError:
            spooled = None  # which the task that carries them out tells of
        return {**self._isolator.status(), "spool": spooled}

    async def _endpoints(self, _: dict[str, Any]) -> list[dict[str, Any]]:
        return self._rows(self._isolator.endpoints())

    async def _missing(self, arguments: dict[str, Any]) -> list[dict[str, Any]]:
        """Those that are missing; with ``answer`` those of ``keys`` that it was given for, or all."""
        answer = arguments.get("answer")
        try:
            keys = msgspec.convert(arguments.get("keys", []), list[EndpointKey])
        except msgspec.ValidationError as error:
            raise InvalidInput(f"keys are no pairs of container id and interface ({error})") from error
        try:
            match answer:
                case "release":
                    return self._rows(await self._isolator.release_missing(keys))
                case "keep":
                    return self._rows(self._isolator.keep_missing(keys))
        except TimeoutError:
            raise TryAgain(
                "the kernel does not let go of what is left of them yet; see the agent's log, then try again"
            ) from None
        return self._rows(self._isolator.missing())

    def _rows(self, endpoints: Iterable[Endpoint]) -> list[dict[str, Any]]:
        return [_row(endpoint, self._isolator.node) for endpoint in endpoints]


def _row(endpoint: Endpoint, node: str) -> dict[str, Any]:
    return {
        "container_id": endpoint.key.container_id,
        "ifname": endpoint.key.ifname,
        "state": endpoint.state,
        "node": node,
        "network": endpoint.network,
        "engine": endpoint.engine,
        "engine_network": endpoint.engine_network,
        "addresses": [str(ip) for ip in endpoint.ips],
        "mac": endpoint.mac,
        "mtu": endpoint.mtu,
        "host_ifname": endpoint.host_ifname,
        "next_hop": [
            str(endpoint.gateway(family)) for family in dict.fromkeys(ip.version for ip in endpoint.ips)
        ],
        "pools": [str(pool) for pool in endpoint.pools],
        "netns": endpoint.netns,
        "netgroups": list(endpoint.netgroups),
        "labels": [msgspec.to_builtins(label) for label in endpoint.labels],
        "bandwidth": msgspec.to_builtins(endpoint.bandwidth),
        "port_mappings": [msgspec.to_builtins(mapping, enc_hook=str) for mapping in endpoint.port_mappings],
        "since": endpoint.since,
    }
