"""One node's part in `moorage endpoint trace`: would a packet pass here, and if not, where does it end?

    out    container -> source -> veth -> (store ->) sending -> forwarding -> (firewall ->) route -> fabric -> underlay
           of the sender's node
    in     fabric -> forwarding -> (firewall ->) route -> policy -> veth -> container   of the receiver's node

The packet traced is one from a given address; ``source`` says what the container's kernel takes where nobody bound one.
Each hop is what the journal and the store say there should be, held against what the kernel has now. Nothing is sent
and nothing changed. Between two containers of one node the fabric's hops are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from shlex import quote
from typing import Any

from ipam.errors import InvalidInput, MoorageError
from isolator.drivers.base import CONTAINER_SIDE, UNSEEN
from isolator.endpoints import Endpoints
from isolator.fabric import VXLAN_DEVICE, Fabric
from isolator.fabric.plan import Route
from isolator.kernel import Kernel
from isolator.model import Endpoint, EndpointState, IPAddress
from isolator.netlink.lookup import Lookup
from isolator.policy.foreign import Blocked
from isolator.policy.sending import ICMP_ERROR, Drop, Packet
from isolator.unbound import Interface, unbound

_ENDS = {
    EndpointState.CONFLICT: "end the container",
    EndpointState.MISSING: "say whether it has ended: `moorage endpoint missing`",
}
"""What an endpoint that is not attached needs; any other state passes by itself."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One place that the packet passes. holds: None if it could not be looked at.

    says: what is there, or what is wrong. cure: what to do about it.
    """

    node: str
    at: str
    holds: bool | None
    says: str
    cure: str = ""

    def row(self) -> dict[str, Any]:
        """As an intent's answer has it."""
        return asdict(self)


def interface(endpoint: Endpoint) -> Interface:
    """An endpoint as its container's kernel routes by it."""
    return Interface(endpoint.key.ifname, endpoint.ips, endpoint.pools, endpoint.default_route)


class Tracer:
    """See the module's docstring. obstacles: chains of other firewalls that drop containers' traffic."""

    def __init__(
        self,
        node: str,
        kernel: Kernel,
        endpoints: Endpoints,
        fabric: Fabric,
        obstacles: Callable[[], Iterable[Blocked]] = lambda: (),
    ) -> None:
        self._node = node
        self._kernel = kernel
        self._endpoints = endpoints
        self._fabric = fabric
        self._obstacles = obstacles

    async def answer(self, evidence: dict[str, Any]) -> dict[str, Any]:
        """The answer to an intent of kind ``trace``: {"done": True, "hops": [...], "tunnel": what it was sent by,
        "unbound": the address that an unbound socket sends from, "" if that was not looked at}.

        evidence: {"part": "out" | "in", "src": IP or "" for the node itself, "dst": IP, "back": whether it is an
        answer, "tunnel": as the sender's node answered, "proto", "port": of the packet, or not there}. Raises
        InvalidInput.
        """
        try:
            dst = ip_address(str(evidence["dst"]))
            src = ip_address(str(evidence["src"])) if evidence.get("src") else None
            part = evidence["part"]
            port = evidence.get("port")
            packet = Packet(str(evidence.get("proto") or "tcp"), None if port is None else int(port))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"the request to trace makes no sense ({error}); ask again") from error
        unbound_source = ""
        if part == "out":
            hops, tunnel = await self._out(src, dst, packet if not evidence.get("back") else None)
            sender = self._endpoints.of_ip(src) if src is not None else None
            # Of answers only UDP's: those of a connection come from where it leads to.
            if sender is not None and (not evidence.get("back") or packet.protocol == "udp"):
                source, unbound_source = await self._source(
                    sender, src, dst, answers=bool(evidence.get("back"))
                )
                hops[1:1] = source
        elif part == "in":
            caller = None if evidence.get("back") else src
            hops, tunnel = await self._in(src, dst, caller, evidence.get("tunnel") or {}), {}
        else:
            raise InvalidInput(f"a trace has the parts out and in, not {part!r}; ask again")
        return {
            "done": True,
            "hops": [hop.row() for hop in hops],
            "tunnel": tunnel,
            "unbound": unbound_source,
        }

    # -- the sender's node

    async def _out(
        self, src: IPAddress | None, dst: IPAddress, packet: Packet | None
    ) -> tuple[list[Hop], dict[str, Any]]:
        """packet: what begins; None for an answer, which no limit of connections stops."""
        hops: list[Hop] = []
        sender = self._endpoints.of_ip(src) if src is not None else None
        if sender is not None and src is not None:
            container, veth = await self._ends(sender)
            hops += [container, veth, *self._known(sender, dst)]
            if packet is not None:
                hops.append(await self._sending(sender, src, dst, packet))
            hops.append(await self._forwarding(dst, sender.host_ifname))
            hops += self._firewall(dst)
        elif src is not None and src not in self._fabric.carried:
            hops.append(self._hop("container", False, f"no endpoint of this node has {src}", _LOOK_AT_IP))
        if self._endpoints.of_ip(dst) is not None or dst in self._fabric.carried:
            return hops, {}
        expected = self._fabric.way_to(dst)
        if isinstance(expected, str):
            hops.append(
                self._hop("route", False, expected, "see `moorage status` and `moorage network show`")
            )
            return hops, {}
        iif = sender.host_ifname if sender is not None else ""
        found = await self._kernel.look_up(dst, src, iif)
        hops.append(self._route(dst, src, iif, expected, found))
        if not expected.is_tunnelled:
            hops.append(await self._underlay(expected.via))
            return hops, {}
        fabric, tunnel = await self._tunnel(expected)
        hops.append(fabric)
        if tunnel:
            hops.append(await self._underlay(ip_address(tunnel["remote"])))
        return hops, tunnel

    async def _source(
        self, sender: Endpoint, src: IPAddress | None, dst: IPAddress, *, answers: bool
    ) -> tuple[list[Hop], str]:
        """What an unbound socket of the sender's container uses to reach ``dst``, and the address that this is."""
        container = sender.key.container_id
        there = [e for e in self._endpoints.all() if e.key.container_id == container and e.netns]
        expected = unbound([interface(endpoint) for endpoint in there], dst)
        if expected is None or any(dst in endpoint.ips for endpoint in there):
            return [], ""
        who = f"an unbound UDP server's answer to {dst}" if answers else f"an unbound connection to {dst}"
        try:
            found = await self._kernel.look_up_inside(sender, dst)
        except MoorageError as error:
            return [self._hop("source", None, f"what {who} comes from is not known: {error}")], ""
        if not found.device:
            cure = f"compare `ip route get {dst}` inside the container"
            return [self._hop("source", False, f"{who} goes nowhere: {found.why}", cure)], ""
        says = f"{who} leaves by {found.device} from {found.source}"
        if expected.on_network and (found.device, found.source) != (expected.ifname, expected.source):
            says += f", and should by {expected.ifname} from {expected.source}"
            cure = (
                f"a route of somebody else's comes first: compare `ip route get {dst}` inside the container"
            )
            return [self._hop("source", False, says, cure)], str(found.source)
        if found.source != src:
            says += f"; only what is bound to {src} comes from there"
        return [self._hop("source", True, says)], str(found.source)

    def _known(self, sender: Endpoint, dst: IPAddress) -> list[Hop]:
        """Whether other nodes know who sends, where they have to and it is not so."""
        unknown = self._endpoints.unknown_where(dst, sender)
        if not any(ip.version == dst.version for ip in unknown):
            return []
        ips = ", ".join(map(str, unknown))
        says = f"{ips} of {sender.key} is not known to other nodes yet: the store has not confirmed that it is assigned"
        return [
            self._hop(
                "store", False, says, f"see `moorage status` on {self._node} for what the store answers"
            )
        ]

    async def _sending(self, sender: Endpoint, src: IPAddress, dst: IPAddress, packet: Packet) -> Hop:
        """What the firewall says of a packet before it is judged whom it calls."""
        verdict = await self._kernel.may_send(src, dst, packet)
        if verdict.allowed and packet.protocol != ICMP_ERROR:
            verdict = await self._kernel.may_begin(sender.host_ifname, sender.ips)
        cure = _CURES.get(verdict.drop, "").replace("NETWORK", quote(sender.network))
        return self._hop("sending", verdict.allowed, verdict.why, cure)

    def _route(self, dst: IPAddress, src: IPAddress | None, iif: str, expected: Route, found: Lookup) -> Hop:
        wanted = f"via {expected.via}" + (f" on {expected.device}" if expected.device else "")
        if found.via == expected.via and expected.device in ("", found.device):
            return self._hop("route", True, f"{dst} is reached {wanted}")
        of = f" from {src} iif {iif}" if src is not None and iif else ""
        return self._hop(
            "route",
            False,
            f"{dst} should be reached {wanted}, and the kernel says: {found}",
            f"something that is not moorage's comes first: compare `ip rule` and `ip route get {dst}{of}`",
        )

    async def _tunnel(self, route: Route) -> tuple[Hop, dict[str, Any]]:
        held = await self._fabric.held_for(route)
        if held.remote is None:
            cure = "the agent restores it within seconds; if it does not, see its log"
            return self._hop("fabric", False, held.problem, cure), {}
        says = f"{route.device} leads to {held.mac} at {held.remote.ip}"
        return (
            self._hop("fabric", True, says),
            {
                "mac": held.mac,
                "remote": str(held.remote.ip),
                "port": held.remote.port,
                "local": self._fabric.tunnel_source(route),
            },
        )

    async def _underlay(self, remote: IPAddress | None) -> Hop:
        assert remote is not None, "routes that drop lead to no other node"
        found = await self._kernel.look_up(remote, None, "")
        if not found.device:
            cure = "give the node a route to the others, or its agent another --underlay"
            return self._hop("underlay", False, f"there is no way to {remote}: {found}", cure)
        state = await self._kernel.neighbour_state(found.via or remote, found.device)
        if state in ("failed", "incomplete"):
            return self._hop(
                "underlay",
                False,
                f"{found.via or remote} does not answer on {found.device} (neighbour {state})",
                "see that the machine is up and that nothing between the two cuts them off",
            )
        return self._hop("underlay", True, f"{remote} is reached on {found.device}")

    # -- the receiver's node

    async def _in(
        self, src: IPAddress | None, dst: IPAddress, caller: IPAddress | None, tunnel: dict[str, Any]
    ) -> list[Hop]:
        hops = [await self._arrives(tunnel)] if tunnel else []
        if dst in self._fabric.carried:
            return [*hops, self._hop("container", True, f"{dst} is the node's own, on {VXLAN_DEVICE}")]
        receiver = self._endpoints.of_ip(dst)
        if receiver is None:
            return [*hops, self._hop("container", False, f"no endpoint of this node has {dst}", _LOOK_AT_IP)]
        if src is not None or tunnel:
            by, _ = self._fabric.receives(str(tunnel.get("mac")), str(tunnel.get("remote")))
            hops.append(await self._forwarding(dst, by if tunnel else ""))
            hops += self._firewall(dst)
        found = await self._kernel.look_up(dst, None, "")
        if found.device == receiver.host_ifname:
            hops.append(self._hop("route", True, f"{dst} is reached on {found.device}"))
        else:
            hops.append(
                self._hop(
                    "route",
                    False,
                    f"{dst} should be reached on {receiver.host_ifname}, and the kernel says: {found}",
                    f"compare `ip rule` and `ip route get {dst}`; a route of somebody else's comes first",
                )
            )
        hops.append(await self._policy(receiver, dst, caller))
        container, veth = await self._ends(receiver)
        return [*hops, veth, container]

    async def _arrives(self, tunnel: dict[str, Any]) -> Hop:
        cure = "the agents agree within seconds; if they do not, see both logs"
        device, problem = self._fabric.receives(str(tunnel.get("mac")), str(tunnel.get("remote")))
        if problem:
            return self._hop("fabric", False, problem, cure)
        if local := tunnel.get("local"):  # an agent of an earlier version does not say it
            verdict = await self._kernel.may_tunnel(ip_address(str(local)))
            if not verdict.allowed:
                return self._hop("fabric", False, verdict.why, cure)
        return self._hop("fabric", True, f"{device} takes what is sent to {tunnel.get('mac')}")

    async def _policy(self, receiver: Endpoint, dst: IPAddress, caller: IPAddress | None) -> Hop:
        """caller: who begins; None for an answer, or the node itself, which need not be allowed to."""
        if caller is not None:
            verdict = await self._kernel.may_call(caller, receiver.host_ifname)
            if verdict is not None and not verdict.allowed:
                why = f"the firewall does not let {caller} call {dst}: {verdict.why}"
                return self._hop("policy", False, why, f"see `moorage policy show {dst}`")
        if (receiver.host_ifname, dst) in await self._kernel.elements():
            return self._hop("policy", True, f"the firewall lets {dst} have packets")
        cure = "the agent restores it within seconds; if it does not, see its log"
        return self._hop("policy", False, f"the firewall has no element for {dst}", cure)

    # -- either

    async def _ends(self, endpoint: Endpoint) -> tuple[Hop, Hop]:
        """The container's end, and the node's."""
        if endpoint.state is not EndpointState.ATTACHED:
            cure = _ENDS.get(endpoint.state, "wait for it")
            hop = self._hop("container", False, f"{endpoint.key} is {endpoint.state.value}", cure)
            return hop, self._hop("veth", None, f"{endpoint.host_ifname} is not looked at")
        found = await self._kernel.differences(endpoint)
        inside = [text for text in found if text.startswith(CONTAINER_SIDE)]
        outside = [text for text in found if text not in inside]
        cure = "restart the container, or find out what in it changes its network"
        holds = None if any(text.startswith(UNSEEN) for text in inside) else not inside
        container = self._hop(
            "container", holds, "; ".join(inside) or f"{endpoint.key} has its addresses and routes", cure
        )
        cure = "the agent restores it within seconds; if it does not, see its log"
        says = "; ".join(outside) or f"{endpoint.host_ifname} is up"
        return container, self._hop("veth", not outside, says, cure)

    async def _forwarding(self, dst: IPAddress, device: str) -> Hop:
        """device: what the packet comes in by, as far as that is known."""
        names = ["net/ipv4/ip_forward" if dst.version == 4 else "net/ipv6/conf/all/forwarding"]
        if device and dst.version == 4:
            names.append(f"net/ipv4/conf/{device}/forwarding")
        for name in names:
            if await self._kernel.setting(name) == "0":
                dotted = name.replace("/", ".")
                return self._hop(
                    "forwarding",
                    False,
                    f"the node does not forward IPv{dst.version}: {dotted} is not 1",
                    f"find what switched it off; the agent does `sysctl -w {dotted}=1` within seconds",
                )
        return self._hop("forwarding", True, f"the node forwards IPv{dst.version}")

    def _firewall(self, dst: IPAddress) -> list[Hop]:
        """What other firewalls of the node drop."""
        return [
            self._hop(
                "firewall",
                False,
                f"{one.chain} drops containers' traffic: {one.why}",
                "; ".join(f"`{command}`" for command in one.commands),
            )
            for one in self._obstacles()
            if one.chain.family in ("inet", "ip" if dst.version == 4 else "ip6")
        ]

    def _hop(self, at: str, holds: bool | None, says: str, cure: str = "") -> Hop:
        return Hop(self._node, at, holds, says, "" if holds else cure)


_CURES = {
    Drop.TUNNEL_PORT.value: "no container sends to that port; have the other side listen on another one",
    Drop.STORE.value: "allow it to the whole network with `moorage network set NETWORK --to-node store`",
    Drop.CONNECTIONS.value: "end some of its connections, or give it more: `moorage network set NETWORK "
    "--max-connections N`",
}

_LOOK_AT_IP = "see `moorage ip list` for who has it"
