"""What a container may not send, whoever would let it call: drops that no netgroup decides, each with a name.

The rules are in ruleset.py (chains ``guarded``, ``errors4``, ``tunnel``, ``claimed``, ``counted``); here they are told,
for `moorage policy test` and `moorage endpoint trace`. Pure.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass

from ipam.keys import IPAddress
from isolator.policy.callers import Verdict

ICMP_ERROR = "icmp-error"
"""In place of a protocol: an ICMP or ICMPv6 error, such as "port unreachable" or "packet too big"."""


class Drop(enum.StrEnum):
    """Why a packet is dropped.

    TUNNEL_PORT: a container sends to a tunnel. TUNNEL_SOURCE: somebody who is no node does. STORE: a container sends
    to the store. ICMP_ERROR: about a packet that was not sent to the container. UNUSED_ADDRESS: its source is of a
    pool, and no container has it. CONNECTIONS: the container has as many connections as it may.
    """

    TUNNEL_PORT = "tunnel-port"
    TUNNEL_SOURCE = "tunnel-source"
    STORE = "store"
    ICMP_ERROR = "icmp-error"
    UNUSED_ADDRESS = "unused-address"
    CONNECTIONS = "connections"


@dataclass(frozen=True, slots=True)
class Packet:
    """What of a packet matters besides its addresses. protocol: tcp, udp, sctp, or ICMP_ERROR. port: None for any."""

    protocol: str = "tcp"
    port: int | None = None


def may_send(
    target: IPAddress,
    packet: Packet,
    tunnels: Collection[int],
    stores: Collection[tuple[IPAddress, int]],
    *,
    reaches_store: bool,
) -> Verdict:
    """Whether a container may send such a packet.

    tunnels: UDP ports of the nodes' tunnels. stores: the store's endpoints. reaches_store: whether its network lets it.
    """
    if packet.protocol == ICMP_ERROR:
        return Verdict(
            True,
            "an ICMP error about a packet that was sent to the container passes, too-big ones to containers alone; any "
            "other is dropped (icmp-error)",
        )
    if packet.protocol == "udp" and packet.port in tunnels:
        why = f"UDP port {packet.port} is a tunnel's between nodes, which no container sends to, whatever the address"
        return _dropped(Drop.TUNNEL_PORT, why)
    # As the firewall does: every port of the store, at every address that it may listen on.
    is_store = target in {ip for ip, _ in stores} and packet.port in {port for _, port in stores}
    if packet.protocol == "tcp" and is_store and not reaches_store:
        why = (
            f"{target} port {packet.port} is the store's, and the container's network has no --to-node store"
        )
        return _dropped(Drop.STORE, why)
    return Verdict(True, "the firewall lets the container send it")


def may_tunnel(
    source: IPAddress, packet: Packet, tunnels: Collection[int], underlays: Collection[IPAddress]
) -> Verdict:
    """Whether a machine under the containers may send such a packet to a node. underlays: of registered nodes."""
    if packet.protocol == "udp" and packet.port in tunnels and source not in underlays:
        why = f"UDP port {packet.port} is a tunnel's, and {source} is no registered node's underlay address"
        return _dropped(Drop.TUNNEL_SOURCE, why)
    return Verdict(True, "the firewall lets it in")


def at_limit(count: int, limit: int) -> Verdict:
    """Whether a container may begin another connection. count: that it has tracked. limit: the most it may have."""
    if count >= limit:
        why = f"the container has {count} tracked connections and may have {limit}, so it begins no more"
        return _dropped(Drop.CONNECTIONS, why)
    return Verdict(True, f"the container has {count} tracked connections and may have {limit}")


def _dropped(drop: Drop, why: str) -> Verdict:
    return Verdict(False, f"{why} ({drop.value})", drop.value)
