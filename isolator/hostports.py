"""Ports of the node that are to be mapped: what makes a mapping dead, and from whom it would take the port.

    the endpoint        has no address of the hostIP's family       InvalidInput
    the node            does not have the hostIP                    InvalidInput
                        tunnels by the port, or listens there       PortTaken, naming the process
    another endpoint    has the port                                PortTaken, naming the container

A mapped port leads away from the node before the kernel looks for a socket, so whoever listens there would hear no more
of it. A process that begins to listen after this look is for ``moorage doctor`` to find
(docs/decisions/a-listener-keeps-its-port.md).
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable
from typing import NamedTuple

import structlog

from ipam.errors import InvalidInput
from isolator.errors import KernelRefused, PortTaken
from isolator.holders import holders
from isolator.model import AttachSpec, Endpoint, PortMapping, can_be_mapped
from isolator.netlink.inventory import tunnel_ports
from isolator.netlink.lookup import is_local
from isolator.netlink.node import Node
from isolator.netlink.sockdiag import Listener, listeners

log = structlog.get_logger(__name__)


class Collision(NamedTuple):
    """A mapping, and a socket of the node that hears no more when it is in place."""

    mapping: PortMapping
    listener: Listener


class Look(NamedTuple):
    """collisions: all that were found. unknown: protocol -> why this kernel cannot tell who listens."""

    collisions: list[Collision]
    unknown: dict[str, str]


def takes(mapping: PortMapping, families: Collection[int], listener: Listener) -> bool:
    """Whether a mapping leads away what a socket would hear. families: those that the endpoint has addresses of."""
    if (mapping.protocol, mapping.host_port) != (listener.protocol, listener.port):
        return False
    mapped = [f for f in families if mapping.host_ip is None or mapping.host_ip.version == f]
    return any(map(listener.hears, mapped)) and (listener.ip.is_unspecified or mapping.covers(listener.ip))


def collisions(mappings: Iterable[PortMapping], families: Collection[int]) -> Look:
    """Every collision with a socket of the calling thread's network namespace. Raises KernelRefused."""
    by_protocol: dict[str, list[PortMapping]] = {}
    for mapping in mappings:
        by_protocol.setdefault(mapping.protocol, []).append(mapping)
    look = Look([], {})
    for protocol, asked in by_protocol.items():
        try:
            found = listeners(protocol, {mapping.host_port for mapping in asked})
        except KernelRefused as error:
            if error.errno != errno.ENOENT:
                raise
            look.unknown[protocol] = str(error)
            continue
        look.collisions.extend(
            Collision(mapping, listener)
            for listener in found
            for mapping in asked
            if takes(mapping, families, listener)
        )
    return look


def has_host_ip(node: Node, mapping: PortMapping) -> bool:
    """Whether what comes for the mapping's hostIP comes to this node. Raises KernelRefused."""
    ip = mapping.host_ip
    return ip is None or ip.is_unspecified or (can_be_mapped(ip) and is_local(node, ip))


def who_listens(node: Node, listener: Listener) -> str:
    """Whose a socket is, for a sentence: ``sshd (pid 812)``. Looks at every process of the machine."""
    if found := holders(listener.inode):
        return ", ".join(found)
    device = tunnel_ports(node).get(listener.port) if listener.protocol == "udp" else None
    if device is not None:
        return f"the kernel, for the tunnel device {device},"
    return "the kernel itself, or a process that cannot be seen from here,"


# -- what is refused


def refuse_families(spec: AttachSpec, families: Collection[int]) -> None:
    """Raises InvalidInput for a mapping that leads to no address of the endpoint."""
    for asked in spec.port_mappings:
        if asked.host_ip is not None and asked.host_ip.version not in families:
            raise InvalidInput(
                f"{spec.key} asks for {asked}, but network {spec.network} has no IPv{asked.host_ip.version}; "
                "map an address of the other family, or none"
            )


def refuse_tunnel(spec: AttachSpec, port: int) -> None:
    """Raises PortTaken for the port by which the node tunnels, now or with the next network that does. port: UDP."""
    for asked in spec.port_mappings:
        if (asked.protocol, asked.host_port) == ("udp", port):
            raise PortTaken(
                f"{spec.key} asks for {asked}, but by udp port {port} the tunnel from other nodes comes (--vxlan-port "
                "of the agent); ask for another host port"
            )


def refuse_claimed(spec: AttachSpec, others: Iterable[Endpoint]) -> None:
    """Raises PortTaken naming the endpoint of this node that has a port."""
    for endpoint in others:
        for mapping in endpoint.port_mappings:
            for asked in spec.port_mappings:
                if asked.claims_the_same_as(mapping):
                    raise PortTaken(
                        f"{spec.key} asks for {asked}, but on this node {endpoint.key} has {mapping}; "
                        "end that one first, or ask for another host port"
                    )


def unclaimed(
    mappings: Iterable[PortMapping], others: Iterable[Endpoint]
) -> tuple[tuple[PortMapping, ...], list[str]]:
    """Those of the mappings whose ports no other endpoint of this node has; of the rest, which one has it."""
    free, taken = [], []
    having = [(mapping, endpoint) for endpoint in others for mapping in endpoint.port_mappings]
    for mapping in mappings:
        who = next((str(e.key) for other, e in having if mapping.claims_the_same_as(other)), None)
        if who is None:
            free.append(mapping)
        else:
            taken.append(f"{mapping}, which {who} has by now")
    return tuple(free), taken


def first_collision(node: Node, spec: AttachSpec, families: Collection[int]) -> Collision | None:
    """A socket of the node that a mapping would take the port from.

    Raises InvalidInput for a hostIP that the node does not have, KernelRefused. Where the kernel cannot tell who
    listens, that is no reason to map no ports at all.
    """
    for asked in spec.port_mappings:
        if not has_host_ip(node, asked):
            raise InvalidInput(
                f"{spec.key} asks for {asked}, but this node does not have the address {asked.host_ip}; leave hostIP "
                "out to map the port of every address, or name one that `ip address` lists"
            )
    look = collisions(spec.port_mappings, families)
    for why in look.unknown.values():
        log.warning("ports are mapped without knowing who listens there; see moorage doctor", why=why)
    return next(iter(look.collisions), None)


def taken_by(spec: AttachSpec, found: Collision, who: str) -> PortTaken:
    """What is said of a collision. who: as ``who_listens`` has it."""
    return PortTaken(
        f"{spec.key} asks for {found.mapping}, but on this node {who} listens on {found.listener}; stop that first, "
        "or ask for another host port"
    )
