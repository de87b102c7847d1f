"""What this node's agent answers when others ask it for something: one method for each kind of intent.

Others never write this node's records; they ask (ipam/intents.py), and the agent acts only if what they saw still
is so.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from ipaddress import ip_address
from typing import Any

from ipam.holder import Holder
from ipam.netgroups import MOST_NETGROUPS, parse_netgroup
from ipam.records import Address, AddressState, Intent, IntentKind
from ipam.shelf import Held
from isolator.audit import audit
from isolator.endpoints import Endpoints
from isolator.fabric import VXLAN_DEVICE, Fabric
from isolator.kernel import Kernel
from isolator.mending import Mending
from isolator.model import EndpointState
from isolator.neighbours import Neighbours
from isolator.policy.foreign import Blocked
from isolator.trace import Tracer

DRAIN_WITHIN = 2.0
"""Seconds a drain has before it is answered with what is left; who asked asks again."""


class Answers:
    """See the module's docstring. tell: writes the node's facts to the store."""

    def __init__(
        self,
        node: str,
        kernel: Kernel,
        endpoints: Endpoints,
        mending: Mending,
        holder: Holder,
        fabric: Fabric,
        neighbours: Neighbours,
        tell: Callable[[], Awaitable[None]],
        obstacles: Callable[[], Iterable[Blocked]],
    ) -> None:
        self._node = node
        self._kernel = kernel
        self._endpoints = endpoints
        self._mending = mending
        self._holder = holder
        self._fabric = fabric
        self._neighbours = neighbours
        self._tell = tell
        self._tracer = Tracer(node, kernel, endpoints, fabric, obstacles)

    async def answer(self, intent: Intent) -> dict[str, Any]:
        """What the asker is told. Raises MoorageError, which is an answer too."""
        match intent.kind:
            case IntentKind.CHECK:
                return await audit(
                    self._kernel,
                    self._endpoints,
                    self._mending,
                    self._holder,
                    dict.fromkeys(self._fabric.carried, VXLAN_DEVICE),
                    repair=bool(intent.evidence.get("repair")),
                )
            case IntentKind.VERIFY | IntentKind.RELEASE:
                return await self._answer_release(intent)
            case IntentKind.GIVE_BACK:
                return await self._holder.give_back(intent)
            case IntentKind.RETURN_BLOCK:
                return await self._holder.return_block(intent, self._fabric.addresses_changed)
            case IntentKind.LABELS:
                return await self._answer_labels(intent)
            case IntentKind.TRACE:
                return await self._tracer.answer(intent.evidence)
            case IntentKind.DRAIN:
                return await self._answer_drain(undo=bool(intent.evidence.get("undo")))
            case _:
                return {"done": False, "why": f"this agent does not know the request {intent.kind.value!r}"}

    async def _answer_drain(self, *, undo: bool) -> dict[str, Any]:
        drain = self._holder.drain
        if undo and drain.is_on:
            drain.withdraw()
            await self._tell()
            drain.end()
        elif not undo:
            drain.begin()
            await drain.settle(DRAIN_WITHIN)
            await self._tell()
        self._fabric.addresses_changed()
        return drain.report()

    async def _answer_labels(self, intent: Intent) -> dict[str, Any]:
        """Gives the endpoint that has an address other netgroups."""
        ip = ip_address(intent.ip)
        held = self._holder.held(ip)
        endpoint = self._endpoints.of_ip(ip)
        if held is None or held.record is None or endpoint is None:
            return {
                "done": False,
                "changed": True,
                "why": f"{ip} is not held by an endpoint of this node any more; look again",
            }
        if self._has_changed(held, held.record, intent):
            return {"done": False, "changed": True, "why": f"{ip} changed since it was looked at; look again"}
        asked = intent.evidence.get("netgroups")
        if not isinstance(asked, list) or len(asked) > MOST_NETGROUPS:
            return {"done": False, "why": f"the request names no list of at most {MOST_NETGROUPS} netgroups"}
        netgroups = [parse_netgroup("a netgroup", str(name)) for name in dict.fromkeys(asked)]
        if await self._endpoints.set_netgroups(endpoint.key, netgroups):
            self._neighbours.left(endpoint.ips)
        return {"done": True, "why": ""}

    @staticmethod
    def _has_changed(held: Held, record: Address, intent: Intent) -> bool:
        """Whether an address is not what the asker saw."""
        return record.id != intent.id or (not held.dirty and held.revision != intent.mod_revision)

    async def _answer_release(self, intent: Intent) -> dict[str, Any]:
        """VERIFY releases what nobody uses; RELEASE ends the endpoint that uses it."""
        ip = ip_address(intent.ip)
        held = self._holder.held(ip)
        if held is None or held.record is None:
            return {"done": True, "why": f"{ip} is not held by this node any more"}
        if held.record.state is AddressState.ALLOCATED:
            return self._answer_release_of_allocated(held, held.record, intent)
        if held.record.state is not AddressState.ASSIGNED:
            return {"done": True, "why": f"{ip} is {held.record.state.value} already"}
        if held.record.is_nodes_own:
            why = f"{ip} is node {self._node}'s own, on its device {VXLAN_DEVICE}; it goes with the last vxlan network"
            return {"done": False, "why": why}
        if self._has_changed(held, held.record, intent):
            return {"done": False, "changed": True, "why": f"{ip} changed since it was looked at; look again"}
        endpoint = self._endpoints.of_ip(ip)
        if endpoint is None:
            self._holder.accept(self._holder.plan_release([ip]))
            return {"done": True, "why": f"{ip} had no endpoint and is released"}
        try:
            ended = await self._endpoints.end(endpoint.key, only_if_gone=intent.kind is IntentKind.VERIFY)
        except TimeoutError:
            return {
                "done": False,
                "why": f"{endpoint.key} is cut off, but its interface is not removed yet; look again",
            }
        if not ended and endpoint.state is EndpointState.MISSING:
            return {
                "done": False,
                "live": True,
                "why": f"nobody knows whether {endpoint.key}, which has {ip}, has ended: its interface was gone with "
                "all others when the agent started; see `moorage endpoint missing` there, or use --force",
            }
        if not ended:
            return {
                "done": False,
                "live": True,
                "why": f"{ip} is carried by the live container {endpoint.key.container_id} ({endpoint.key.ifname}); "
                "end the container, or use --force to cut it off",
            }
        return {"done": True, "why": f"{endpoint.key} is gone and {ip} is released"}

    def _answer_release_of_allocated(self, held: Held, record: Address, intent: Intent) -> dict[str, Any]:
        """There is no endpoint to look at: its uid was told that it has the address, until its time is over."""
        if self._has_changed(held, record, intent):
            return {
                "done": False,
                "changed": True,
                "why": f"{held.ip} changed since it was looked at; look again",
            }
        if held.lent:
            return {
                "done": False,
                "live": True,
                "why": f"{held.ip} is just being given to a container; look again",
            }
        if intent.kind is IntentKind.VERIFY:
            return {
                "done": False,
                "live": True,
                "why": f"{held.ip} is allocated to {record.uid}, which may still use it; it is released by itself if "
                "that does not happen in time, or use --force to take it away",
            }
        self._holder.accept(self._holder.allocations.plan_release([held]))
        return {"done": True, "why": f"{held.ip} was allocated to {record.uid} and is released"}
