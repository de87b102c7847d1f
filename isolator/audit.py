"""This node's answer to `moorage ip check`: journal, kernel and what IPAM holds, against each other.

What is under way is no finding: an endpoint being attached or detached, an address the store has not
confirmed yet. Repairs are only those that cannot take an address from a live namespace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ipam.checks import Finding
from ipam.holder import Holder
from isolator.drivers.naming import shaper_ifname
from isolator.endpoints import Endpoints
from isolator.kernel import Kernel
from isolator.mending import Mending
from isolator.model import Endpoint, EndpointState, IPAddress
from isolator.netlink import HostLink
from isolator.recovery import remove_strays


async def audit(
    kernel: Kernel,
    endpoints: Endpoints,
    mending: Mending,
    holder: Holder,
    own: Mapping[IPAddress, str],
    *,
    repair: bool,
) -> dict[str, Any]:
    """The answer to an intent of kind ``check``.

    own: the node's own addresses, and the devices that have them.

    findings, repaired: Finding as dicts. notes: sentences. carried: ip -> endpoint that has it. unwritten:
    addresses whose assignment the store has not confirmed yet.
    """
    found = await _look(kernel, endpoints, holder)
    repaired: list[Finding] = []
    if repair and found.findings:
        await _repair(kernel, endpoints, mending, holder, found)
        # What is said to be repaired is what is so after.
        after = await _look(kernel, endpoints, holder)
        repaired = [finding for finding in found.findings if finding not in after.findings]
    attached = [e for e in endpoints.all() if e.state is EndpointState.ATTACHED]
    return {
        "findings": [asdict(finding) for finding in found.findings],
        "repaired": [asdict(finding) for finding in repaired],
        "notes": [*_notes(endpoints, holder)],
        "unwritten": [str(ip) for ip, held in holder.assigned().items() if held.dirty],
        "carried": {str(ip): str(e.key) for e in attached if e.host_ifname in found.links for ip in e.ips}
        | {str(ip): device for ip, device in own.items()},
    }


def _notes(endpoints: Endpoints, holder: Holder) -> Iterator[str]:
    if holder.problem:
        yield f"out of sync with the store: {holder.problem}"
    missing = [str(e.key) for e in endpoints.all() if e.state is EndpointState.MISSING]
    if missing:
        yield (
            f"nobody knows whether {', '.join(missing)} have ended: their addresses are kept, not verified; see "
            "`moorage endpoint missing` on that node"
        )


@dataclass(frozen=True, slots=True)
class _Seen:
    """findings: all. strays, orphans: those of invariants 4 and 2. damaged: endpoints that lack something."""

    findings: list[Finding]
    strays: list[Finding]
    orphans: list[Finding]
    damaged: list[Endpoint]
    links: Mapping[str, HostLink]
    routed: set[str]


async def _look(kernel: Kernel, endpoints: Endpoints, holder: Holder) -> _Seen:
    links = await kernel.links()
    routed = {str(route.destination.network_address) for route in await kernel.routes()}
    elements = await kernel.elements()
    shapers = await kernel.shapers()
    everyone = endpoints.all()
    findings: list[Finding] = []
    damaged: list[Endpoint] = []
    for endpoint in everyone:
        if endpoint.state is not EndpointState.ATTACHED:
            continue
        findings += _endpoint_findings(endpoint, holder)
        if endpoint.host_ifname not in links:
            findings.append(_finding(2, endpoint, "its interface is gone", repair="the agent collects it"))
            continue
        damage = await kernel.damage(endpoint)
        damage += [
            f"the firewall does not admit {ip}"
            for ip in endpoint.ips
            if (endpoint.host_ifname, ip) not in elements
        ]
        if endpoints.get(endpoint.key) is not endpoint:
            continue  # it came or went while it was looked at
        findings += [
            _finding(3, endpoint, text, repair="the agent puts it back, or `moorage status` says why not")
            for text in damage
        ]
        if damage:
            damaged.append(endpoint)
    orphans = _orphans(endpoints, holder)
    strays = _strays(everyone, set(links), routed, elements, shapers)
    conflicts = [
        Finding(
            1, str(e.key), "is cut off: its address belongs to another", {"ips": ", ".join(map(str, e.ips))}
        )
        for e in everyone
        if e.state is EndpointState.CONFLICT
    ]
    return _Seen([*findings, *orphans, *strays, *conflicts], strays, orphans, damaged, links, routed)


async def _repair(
    kernel: Kernel, endpoints: Endpoints, mending: Mending, holder: Holder, found: _Seen
) -> None:
    if found.strays and not holder.problem:
        await remove_strays(kernel, endpoints, found.links)
    if (found.strays and not holder.problem) or found.damaged:
        await endpoints.restore_policy(keep_endpoints=bool(holder.problem))
    for endpoint in found.damaged:
        await mending.repair(endpoint)
    # Without an endpoint, an interface and a route nobody can carry the address.
    free = {orphan.subject for orphan in found.orphans if orphan.subject not in found.routed}
    holder.accept(holder.plan_release([ip for ip in holder.assigned() if str(ip) in free]))


def _finding(invariant: int, endpoint: Endpoint, problem: str, repair: str = "") -> Finding:
    evidence = {"interface": endpoint.host_ifname, "netns": endpoint.netns, "network": endpoint.network}
    return Finding(invariant, str(endpoint.key), problem, evidence, repair)


def _endpoint_findings(endpoint: Endpoint, holder: Holder) -> list[Finding]:
    """Invariant 3."""
    found = []
    for ip in endpoint.ips:
        held = holder.held(ip)
        record = held.record if held else None
        if record is None or (record.container_id, record.ifname) != tuple(endpoint.key):
            state = "unknown" if record is None else f"{record.state.value} {record.container_id}".strip()
            found.append(_finding(3, endpoint, f"{ip} is not assigned to it but {state}"))
    return found


def _orphans(endpoints: Endpoints, holder: Holder) -> list[Finding]:
    """Invariant 2, from the address's side."""
    carried = {ip for endpoint in endpoints.all() for ip in endpoint.ips}
    return [
        Finding(
            2,
            str(ip),
            "is assigned to an endpoint that does not exist",
            {"container_id": held.record.container_id, "ifname": held.record.ifname},
            "released if no route leads to it",
        )
        for ip, held in holder.assigned().items()
        if held.record is not None and ip not in carried and not held.record.is_nodes_own
    ]


def _strays(
    everyone: list[Endpoint],
    links: set[str],
    routed: set[str],
    elements: set[tuple[str, Any]],
    shapers: set[str],
) -> list[Finding]:
    """Invariant 4."""
    names = {endpoint.host_ifname for endpoint in everyone}
    ips = {str(ip) for endpoint in everyone for ip in endpoint.ips}
    repair = "removed"
    found = [Finding(4, name, "is an interface without an endpoint", repair=repair) for name in links - names]
    limits = shapers - {shaper_ifname(name) for name in names}
    found += [Finding(4, name, "is a limit without an endpoint", repair=repair) for name in limits]
    found += [Finding(4, ip, "is a route without an endpoint", repair=repair) for ip in routed - ips]
    found += [
        Finding(4, f"{name} {ip}", "is a firewall element without an endpoint", repair=repair)
        for name, ip in elements
        if name not in names
    ]
    return sorted(found, key=lambda finding: finding.subject)
