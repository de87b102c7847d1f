"""`moorage ip check`: whether the invariants hold, live and without a lock.

1. No IP is assigned to two endpoints at any moment; no IP is carried by two live namespaces.
2. Every assigned address has a live endpoint on its node, or is on its way out; every allocated one is somebody's.
3. Every attached endpoint has its addresses assigned to it.
4. Nothing of ours outlives its endpoint.
5. A block has one owner; no address key lies outside every pool.

The store is read here; every live agent answers for its own journal and kernel through an intent. What
changes all the time cannot be read at one moment, so a violation is what stands in two looks,
SETTLE seconds apart.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ipam import keys
from ipam.errors import MoorageError, StoreError
from ipam.intents import ask
from ipam.keys import IPAddress
from ipam.pools import Geometry, block_at, geometry
from ipam.records import Address, AddressState, Block, Intent, IntentKind, Pool
from ipam.store.base import Store, prefix_end, read_prefix, scan

SETTLE = 2.0
"""Seconds between the two looks (docs/design.md, section 5)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A violated invariant with the evidence for it.

    invariant: its number. repair: what `--repair` did or would need; "" if only a person can.
    """

    invariant: int
    subject: str
    problem: str
    evidence: dict[str, str] = field(default_factory=dict)
    repair: str = ""

    @property
    def identity(self) -> tuple[int, str, str]:
        return self.invariant, self.subject, self.problem


@dataclass(slots=True)
class CheckReport:
    """What a check found. notes: what could not be looked at, and why."""

    findings: list[Finding] = field(default_factory=list)
    repaired: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    addresses: int = 0
    nodes_asked: int = 0
    nodes_silent: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Look:
    findings: list[Finding] = field(default_factory=list)
    repaired: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    addresses: int = 0
    asked: int = 0
    silent: list[str] = field(default_factory=list)
    assigned: dict[str, str] = field(default_factory=dict)
    outside: dict[str, Address] = field(default_factory=dict)
    carried: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    unwritten: set[str] = field(default_factory=set)


async def check(store: Store, *, repair: bool = False) -> CheckReport:
    """Look twice, report what stood both times; with ``repair`` have agents mend what is provably safe."""
    look = await _look(store, repair=False)
    if look.findings:
        await asyncio.sleep(SETTLE)
        before = {finding.identity for finding in look.findings}
        look = await _look(store, repair=repair)
        look.findings = [finding for finding in look.findings if finding.identity in before]
    return CheckReport(
        findings=look.findings,
        repaired=look.repaired,
        notes=look.notes,
        addresses=look.addresses,
        nodes_asked=look.asked,
        nodes_silent=look.silent,
    )


async def _look(store: Store, *, repair: bool) -> _Look:
    look = _Look()
    pools = await _pools(store, look)
    holders = await _look_at_addresses(store, pools, look)
    if look.outside:
        networks, _ = await read_prefix(store, keys.NETWORKS)
        known = {kv.key.removeprefix(keys.NETWORKS) for kv in networks}
        look.findings.extend(_outside_findings(look.outside, known))
    await _look_at_blocks(store, pools, look)
    leases, _ = await read_prefix(store, keys.ALIVE)
    alive = {kv.key.removeprefix(keys.ALIVE) for kv in leases}
    for node, count in sorted(holders.items()):
        if node not in alive:
            look.silent.append(node)
            look.notes.append(
                f"node {node} holds {count} addresses and its agent gives no sign of life: they are kept, not verified"
            )
    await asyncio.gather(*(_ask(store, node, look, repair=repair) for node in sorted(alive)))
    look.findings.extend(_carried_findings(look))
    return look


async def _pools(store: Store, look: _Look) -> list[Geometry]:
    items, _ = await read_prefix(store, keys.POOLS)
    shapes = []
    for kv in items:
        try:
            shapes.append(geometry(Pool.decode(kv.key, kv.value)))
        except StoreError as error:
            look.findings.append(Finding(5, kv.key, "is no valid pool record", {"error": str(error)}))
    return shapes


def _carried_findings(look: _Look) -> list[Finding]:
    """What live endpoints carry, held against each other and against the store's records."""
    found = []
    for ip, places in sorted(look.carried.items()):
        endpoints = ", ".join(sorted(f"{endpoint} on {node}" for node, endpoint in places))
        if len(places) > 1:
            found.append(Finding(1, ip, "is carried by two live endpoints", {"endpoints": endpoints}))
        elif ip not in look.unwritten and look.assigned.get(ip) != places[0][0]:
            evidence = {"endpoint": endpoints, "assigned to node": look.assigned.get(ip, "none")}
            found.append(Finding(3, ip, "is carried by an endpoint and not assigned to its node", evidence))
    return found


async def _look_at_addresses(store: Store, pools: Sequence[Geometry], look: _Look) -> dict[str, int]:
    holders: dict[str, int] = defaultdict(int)
    async for kv in scan(store, keys.ADDRESSES, prefix_end(keys.ADDRESSES)):
        look.addresses += 1
        try:
            ip = keys.ip_of(kv.key)
            address = Address.decode(kv.key, kv.value)
        except StoreError as error:
            look.findings.append(Finding(5, kv.key, "is no valid address record", {"error": str(error)}))
            continue
        holders[address.node] += 1
        if address.state is AddressState.ASSIGNED:
            look.assigned[str(ip)] = address.node
        pool = next((p for p in pools if p.family == ip.version and ip in p.cidr), None)
        if pool is None:
            look.outside[str(ip)] = address
        else:
            look.findings.extend(_address_findings(ip, address, pool))
    return holders


def _outside_findings(outside: Mapping[str, Address], networks: Collection[str]) -> list[Finding]:
    """Addresses of pools that the store does not have, perhaps any more: it was restored from a backup that is older.

    outside: by IP. networks: the names of those that the store has.
    """
    used: dict[str, set[str]] = defaultdict(set)
    for address in outside.values():
        if address.state.is_taken:
            used[address.network].add(_cidr_of(address.pool))
    found = []
    for ip, address in outside.items():
        evidence = {"node": address.node, "network": address.network, "pool": address.pool}
        step = (
            f"the agent of node {address.node} gives it back; start it, or see `moorage node remove --help`"
        )
        if address.container_id:
            evidence["container"] = f"{address.container_id}/{address.ifname}"
        if address.state.is_taken:
            what, option = ("set", "--add-pool") if address.network in networks else ("create", "--pool")
            pools = " ".join(f"{option} {cidr}" for cidr in sorted(used[address.network]))
            user = f"container {evidence['container']}" if address.container_id else "who uses it"
            step = (
                "if the store was restored from a backup that is older than the pool, make it again, with its options: "
                f"`moorage network {what} {address.network} {pools}`; else end {user}"
            )
        found.append(Finding(5, ip, "lies outside every pool", evidence, step))
    return found


def _cidr_of(pool: str) -> str:
    """Of the pool by that name (see networks.py)."""
    base, _, length = pool.rpartition("-")
    return f"{base}/{length}" if base else "CIDR"


def _address_findings(ip: IPAddress, address: Address, pool: Geometry) -> list[Finding]:
    found = []
    if pool.name != address.pool:
        found.append(
            Finding(5, str(ip), "names another pool than it lies in", {"says": address.pool, "is": pool.name})
        )
    if address.state is AddressState.ALLOCATED and not address.uid:
        found.append(Finding(2, str(ip), "is allocated to nobody", {"node": address.node}))
    if address.state is AddressState.ASSIGNED and not address.container_id:
        found.append(Finding(2, str(ip), "is assigned to nobody", {"node": address.node}))
    return found


async def _look_at_blocks(store: Store, pools: Sequence[Geometry], look: _Look) -> None:
    items, _ = await read_prefix(store, keys.BLOCKS)
    by_name = {pool.name: pool for pool in pools}
    for kv in items:
        try:
            block = Block.decode(kv.key, kv.value)
            cidr = block_at(keys.ip_of(kv.key), block.size)
        except StoreError as error:
            look.findings.append(Finding(5, kv.key, "is no valid block record", {"error": str(error)}))
            continue
        pool = by_name.get(block.pool)
        if pool is None or cidr.network_address not in pool.cidr or block.size != pool.block_size:
            look.findings.append(
                Finding(5, str(cidr), "is a block of no pool", {"node": block.node, "pool": block.pool})
            )


async def _ask(store: Store, node: str, look: _Look, *, repair: bool) -> None:
    try:
        answer = await ask(store, node, Intent(kind=IntentKind.CHECK, evidence={"repair": repair}))
    except MoorageError as error:
        look.silent.append(node)
        look.notes.append(str(error))
        return
    look.asked += 1
    look.findings.extend(_finding(row) for row in answer.get("findings", []))
    look.repaired.extend(_finding(row) for row in answer.get("repaired", []))
    look.notes.extend(f"node {node}: {note}" for note in answer.get("notes", []))
    for ip, endpoint in answer.get("carried", {}).items():
        look.carried[ip].append((node, endpoint))
    look.unwritten.update(answer.get("unwritten", []))


def _finding(row: dict[str, Any]) -> Finding:
    return Finding(
        int(row["invariant"]),
        str(row["subject"]),
        str(row["problem"]),
        {str(k): str(v) for k, v in row.get("evidence", {}).items()},
        str(row.get("repair", "")),
    )
