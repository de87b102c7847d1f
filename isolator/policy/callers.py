"""Who may call an endpoint: the one definition that the nft rules and `moorage policy test` are both made of.

An endpoint's callers are a few clauses, asked one after the other. A clause has two faces: whether it covers a
caller (``covers``, below), and the rule that it is in the table (ruleset.py). So the two cannot disagree.

    netgroups web and db, in a network with --allow-from 192.0.2.0/24 --allow-from nodes
      -> Sharing("db"), Sharing("web"), From(192.0.2.0/24), Nodes()

This is about who may *begin*. Whoever an endpoint called itself may answer (ruleset.py, chain ``replies``). Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from ipam.isolation import MOST_CONNECTIONS, NODES, OPEN, sources_of
from ipam.keys import IPAddress, IPNetwork
from ipam.netgroups import PUBLIC
from ipam.records import Network


@dataclass(frozen=True, slots=True)
class Isolation:
    """What a network says of its endpoints' callers, and of how much they may call themselves.

    open: netgroups do not count. allow_from: callers that need be no endpoints. nodes: every node may call.
    connections: that each may have tracked; 0 leaves it to the node.
    """

    open: bool = False
    allow_from: tuple[IPNetwork, ...] = ()
    nodes: bool = False
    connections: int = 0


NETGROUPS = Isolation()
"""What a network says that says nothing."""


def isolation_of(network: Network) -> Isolation:
    """A network's isolation. What cannot be read of it allows nothing."""
    return Isolation(
        open=network.isolation == OPEN,
        allow_from=tuple(sources_of(network)),
        nodes=NODES in network.allow_from,
        connections=min(max(network.max_connections, 0), MOST_CONNECTIONS),
    )


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends the first packet. netgroups: () for one that is no endpoint. is_node: the address is a node's."""

    ip: IPAddress
    netgroups: tuple[str, ...] = ()
    is_node: bool = False


@dataclass(frozen=True, slots=True)
class Anyone:
    """The endpoint is open to everybody. why: as words."""

    why: str

    def covers(self, _: Caller) -> bool:
        return True

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True, slots=True)
class Sharing:
    """Members of one of the endpoint's own netgroups."""

    netgroup: str

    def covers(self, caller: Caller) -> bool:
        return self.netgroup in caller.netgroups

    def __str__(self) -> str:
        return f"both are in the netgroup {self.netgroup}"


@dataclass(frozen=True, slots=True)
class From:
    """Addresses that the network allows by --allow-from."""

    cidr: IPNetwork

    def covers(self, caller: Caller) -> bool:
        return caller.ip.version == self.cidr.version and caller.ip in self.cidr

    def __str__(self) -> str:
        return f"the network allows callers from {self.cidr}"


@dataclass(frozen=True, slots=True)
class Nodes:
    """All nodes, where the network says --allow-from nodes."""

    def covers(self, caller: Caller) -> bool:
        return caller.is_node

    def __str__(self) -> str:
        return "the network allows callers on nodes"


Clause: TypeAlias = Anyone | Sharing | From | Nodes
Callers: TypeAlias = tuple[Clause, ...]


def callers(netgroups: Iterable[str], isolation: Isolation) -> Callers:
    """Who may call an endpoint that is in these netgroups; equal for endpoints that are told apart by nothing."""
    groups = sorted(set(netgroups))
    if isolation.open:
        return (Anyone("its network is open"),)
    if PUBLIC in groups:
        return (Anyone(f"it is in the netgroup {PUBLIC}"),)
    return (
        *(Sharing(group) for group in groups),
        *(From(cidr) for cidr in sorted(set(isolation.allow_from), key=lambda c: (c.version, c))),
        *((Nodes(),) if isolation.nodes else ()),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a call is allowed, and why, as words. drop: the name of what drops it, where netgroups do not decide."""

    allowed: bool
    why: str
    drop: str = ""


def judge(caller: Caller, may_call: Callers) -> Verdict:
    """Whether an endpoint with these callers may be called by this one."""
    for clause in may_call:
        if clause.covers(caller):
            return Verdict(True, str(clause))
    if caller.netgroups:
        theirs = ", ".join(sorted(caller.netgroups))
        ours = ", ".join(clause.netgroup for clause in may_call if isinstance(clause, Sharing))
        return Verdict(
            False, f"they share no netgroup: the caller is in {theirs}, the called in {ours or 'none'}"
        )
    return Verdict(False, f"{caller.ip} is no endpoint, and the network does not allow it by --allow-from")
