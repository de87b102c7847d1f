"""Start-up: what the journal remembers, the kernel holds and the store says become one again.

    endpoints of another boot          their namespaces died with it: released
    'detaching'                        ended
    'attaching'                        kept for the hook that comes back with the same request, then undone
    'attached', interface there        kept; no packet is lost
    'attached', interface gone         ended: its namespace is gone
    'attached', all of several gone    'missing', before this: nobody knows (isolator/missing.py)
    interface on its way out           ended, whatever the journal says: its DEL was answered
    interface, unknown to the journal  its alias says whose it is, or the record of its address

Nothing is written to the kernel before the store is in sync, or known to be away; without the store,
what cannot be attributed is left alone and keeps working. Nor is anything removed then that leads to a namespace, and
nobody says whose it is: it becomes an endpoint under the interface's name (docs/decisions/whose-word-counts.md).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

import structlog

from ipam.boottime import boottime
from ipam.catalogue import Catalogue
from ipam.holder import Holder
from ipam.netgroups import Netgroup
from ipam.nodes_networks import FAMILIES
from ipam.records import Address, Network
from isolator.drivers.naming import host_ifname, shaper_ifname
from isolator.endpoints import Endpoints, owner
from isolator.kernel import Kernel
from isolator.model import Endpoint, EndpointKey, EndpointState, IPAddress
from isolator.netlink import HostLink, HostRoute
from isolator.written import Fields, assembled, for_alias, from_alias, from_record, not_in_record

log = structlog.get_logger(__name__)

UNKNOWN = "unknown"
"""The engine of an interface of which nobody says whose it is, and its name inside, if that is not found."""

_SAID_BY_KERNEL = frozenset({"ips", "mac", "next_hop"})
"""What an alias may lack and kernel or catalogue still say."""

_GUESSED = frozenset({"since", "pools", "nameservers", "search"})
"""What an alias never has: as kernel and network have it now, until an address record says it."""


def adopted_endpoint(
    endpoint: Endpoint | None,
    ip: IPAddress,
    record: Address,
    mtu: int,
    network: Network | None,
    boot_id: str,
    mac: str | None = None,
) -> Endpoint:
    """An endpoint as kernel and store together remember it; ``endpoint`` is what is known already.

    mtu: its interface's. network: the record's, None if it is not known.
    mac: the container's, if the firewall knows it; else the one that follows from its addresses.
    """
    ips = _in_order({ip, *(endpoint.ips if endpoint else ())})
    told = from_record(record, boot_id)
    if endpoint is not None:
        return _completed(endpoint, told, ips)
    kernels: Fields = {
        "asked": {"boot_id": boot_id, "at": 0},
        "ips": [str(one) for one in ips],
        "mtu": mtu,
        "next_hop": network.next_hop if network is not None else 1,
        "driver": network.driver if network is not None else "routed",
    }
    if mac is not None:
        kernels["mac"] = mac
    return assembled(told, kernels)


def of_boot(endpoint: Endpoint, boot_id: str) -> Endpoint:
    """As if it was made in that boot."""
    return replace(endpoint, asked=replace(endpoint.asked, boot_id=boot_id))


def _completed(endpoint: Endpoint, told: Fields, ips: tuple[IPAddress, ...]) -> Endpoint:
    """With what a record says of it that the endpoint lost; a record of another ADD says nothing of this one."""
    known = replace(endpoint, ips=ips)
    names = set(endpoint.lost)
    asked = told.get("asked", {}).get("at")
    if not names or asked is None or ("asked" not in names and asked != endpoint.asked.at):
        return known
    whole = assembled(told, {"ips": [str(ip) for ip in ips], "mac": known.mac, "mtu": known.mtu})
    return replace(known, lost=(), **{name: getattr(whole, name) for name in names})


def _in_order(ips: Collection[IPAddress]) -> tuple[IPAddress, ...]:
    return tuple(sorted(ips, key=lambda ip: (ip.version, int(ip))))


def carries(link: HostLink, ip: IPAddress, routed: Mapping[int, Collection[IPAddress]]) -> bool:
    """Whether the kernel says nothing against it that an interface has an address; one that is down has no routes."""
    ips = routed.get(link.index)
    return not ips or ip in ips


def owner_of(links: Mapping[str, HostLink], record: Address) -> HostLink | None:
    """The interface that an address record's endpoint has, if it is there and stays."""
    link = links.get(host_ifname(EndpointKey(record.container_id, record.ifname)))
    return None if link is None or link.is_doomed else link


async def recall(
    kernel: Kernel,
    endpoints: Endpoints,
    holder: Holder,
    catalogue: Catalogue,
    boot_id: str,
    links: Mapping[str, HostLink],
    routed: Mapping[int, Collection[IPAddress]],
) -> None:
    """Take endpoints that the journal does not know, or knows an earlier one of, as their interfaces have them.

    routed: index of an interface -> addresses that lead to it.
    Before the store was heard: their addresses are nobody else's whatever it says. Raises KernelRefused.
    """
    macs = await kernel.macs()
    for link in links.values():
        told = from_alias(link.said, boot_id)
        if not told or link.is_doomed or link.name != host_ifname(EndpointKey(*told["key"])):
            continue
        known = endpoints.get(EndpointKey(*told["key"]))
        if known is not None and known.asked.boot_id == boot_id and known.asked.at >= told["asked"]["at"]:
            _keep_netgroups(endpoints, known, told)
            continue
        network = catalogue.wholly_known(str(told.get("network", "")))
        found = _from_kernel(told, link, network, routed.get(link.index, ()), macs.get(link.name))
        if not found.ips:
            continue  # nothing is known of it that anybody else could be given
        if others := _others(endpoints, found):
            log.error(
                "interface kept: it claims addresses of another endpoint",
                interface=link.name,
                endpoint=str(found.key),
                others=others,
            )
            continue
        log.warning(
            "endpoint adopted: the journal had lost it, and its interface says what it is",
            endpoint=str(found.key),
            ips=[str(ip) for ip in found.ips],
            lost=found.lost,
        )
        _adopt(endpoints, holder, found)


def _keep_netgroups(endpoints: Endpoints, known: Endpoint, told: Fields) -> None:
    """The netgroups that took effect, if the journal has others: from before, or those that nobody was told of."""
    if known.asked.at != told["asked"]["at"] or "netgroups" in told.get("lost", ()):
        return
    netgroups = tuple(map(Netgroup, told.get("netgroups", (known.network,))))
    if netgroups != known.netgroups:
        log.warning("netgroups are those of the interface", endpoint=str(known.key), netgroups=netgroups)
        endpoints.adopt(replace(known, netgroups=netgroups))


def _from_kernel(
    told: Fields, link: HostLink, network: Network | None, routed: Collection[IPAddress], mac: str | None
) -> Endpoint:
    lost = [*(name for name in told.get("lost", ()) if name not in _SAID_BY_KERNEL), *sorted(_GUESSED)]
    otherwise: Fields = {
        "ips": [str(ip) for ip in _in_order(routed)],
        "mtu": link.mtu,
        "next_hop": network.next_hop if network is not None else 1,
        "driver": network.driver if network is not None else "routed",
        "since": time.time() - (boottime() - told["asked"]["at"]) / 1e9,
    }
    if mac is not None and "mac" in told.get("lost", ()):
        otherwise["mac"] = mac
    if "netgroups" in lost:
        # It may not become a member of something that it was none of.
        otherwise["netgroups"] = [link.name]
    return assembled({**told, "lost": lost}, otherwise)


def _guessed(endpoint: Endpoint, catalogue: Catalogue) -> Endpoint:
    """With what no address record said either, as its network has it now."""
    known = replace(endpoint, lost=tuple(name for name in endpoint.lost if name not in _GUESSED))
    network = catalogue.wholly_known(endpoint.network)
    if network is None:
        return known
    pools = catalogue.cidrs_of(network, {ip.version for ip in endpoint.ips})
    return replace(known, pools=pools, nameservers=tuple(network.dns), search=tuple(network.search))


def routed_to(routes: Collection[HostRoute]) -> dict[int, set[IPAddress]]:
    """Index of an interface -> addresses that are routed to it."""
    found: defaultdict[int, set[IPAddress]] = defaultdict(set)
    for route in routes:
        found[route.index].add(route.destination.network_address)
    return found


def _others(endpoints: Endpoints, endpoint: Endpoint) -> list[str]:
    """Other endpoints that have one of its addresses."""
    having = (endpoints.of_ip(ip) for ip in endpoint.ips)
    return [str(other.key) for other in having if other is not None and other.key != endpoint.key]


def _adopt(endpoints: Endpoints, holder: Holder, endpoint: Endpoint) -> None:
    endpoints.adopt(endpoint)
    holder.carry(endpoint.ips, endpoint.network, owner(endpoint))


async def recover(
    kernel: Kernel,
    endpoints: Endpoints,
    holder: Holder,
    catalogue: Catalogue,
    boot_id: str,
    *,
    in_sync: bool,
    keep_others: bool,
) -> None:
    """Bring kernel and endpoints in line; see the module's docstring. Raises KernelRefused.

    keep_others: other nodes' endpoints are not heard of yet, the firewall goes on with those it knows.
    """
    for endpoint in endpoints.all():
        if endpoint.asked.boot_id != boot_id:
            log.info("endpoint of an earlier boot released", endpoint=str(endpoint.key))
            endpoints.forget(endpoint)
    links = await kernel.links()
    await kernel.mark_links({endpoint.host_ifname for endpoint in endpoints.all()})
    # What is over is not admitted once more: its ports, or its addresses, may be another's by now.
    await endpoints.collect()
    for endpoint in endpoints.all():
        link = links.get(endpoint.host_ifname)
        if endpoint.state is EndpointState.DETACHING or (link is not None and link.is_doomed):
            await endpoints.resume_end(endpoint)
    if in_sync:
        await _name_strangers(kernel, endpoints, holder, catalogue, boot_id, links)
    if in_sync or catalogue.pools() or not await kernel.elements():
        await endpoints.restore_policy(keep_endpoints=not in_sync, keep_others=keep_others)
    else:
        closed = {family: catalogue.around.closed(family, forced=False) for family in FAMILIES}
        if changed := await kernel.adopt_policy(closed):
            log.warning(
                "the firewall took nodes' own networks for containers'; it does no more", sets=changed
            )
    for endpoint in endpoints.all():
        if endpoint.state is EndpointState.CONFLICT:
            await kernel.disconnect(endpoint)
    if not in_sync:
        return
    if holder.journal_was_behind:
        endpoints.trust_attaching(links)
    for endpoint in endpoints.all():
        if _GUESSED & set(endpoint.lost):
            endpoints.adopt(_guessed(endpoint, catalogue))
    endpoints.tell_store()
    attached = [e for e in endpoints.all() if e.state is EndpointState.ATTACHED and e.host_ifname in links]
    if refused := await kernel.mark([e for e in attached if links[e.host_ifname].said != for_alias(e)]):
        log.warning("interfaces do not say what they are", count=len(refused), why=str(refused[0]))
    await remove_strays(kernel, endpoints, links)


async def _name_strangers(
    kernel: Kernel,
    endpoints: Endpoints,
    holder: Holder,
    catalogue: Catalogue,
    boot_id: str,
    links: Mapping[str, HostLink],
) -> None:
    """Take interfaces that lead to a namespace, and of which nobody says whose they are, for endpoints of their own:
    so nobody else is given their addresses, and an operator sees them."""
    owned = {endpoint.host_ifname for endpoint in endpoints.all()}
    routed = routed_to(await kernel.routes())
    macs = await kernel.macs()
    for link in links.values():
        ips = _in_order(routed.get(link.index, ()))
        pool = catalogue.pool_of(ips[0]) if ips else None
        if link.name in owned or link.is_doomed or not link.leads_elsewhere or pool is None:
            continue
        path, ifname = await kernel.inside(link.name) or ("", UNKNOWN)
        told: Fields = {
            "key": [link.name, ifname],
            "netns": path,
            "engine": UNKNOWN,
            "network": pool.network,
            "netgroups": [link.name],
            "asked": {"boot_id": boot_id, "at": 0},
            "ips": [str(ip) for ip in ips],
            "mtu": link.mtu,
            "lost": ["key", "netgroups", "labels", *not_in_record()],
        }
        mac = {"mac": macs[link.name]} if link.name in macs else {}
        stranger = replace(assembled(told, mac), host_ifname=link.name)
        if _others(endpoints, stranger):
            continue
        log.error(
            "interface kept: neither journal, store nor its alias says whose it is",
            interface=link.name,
            ips=[str(ip) for ip in ips],
        )
        _adopt(endpoints, holder, stranger)


async def remove_strays(kernel: Kernel, endpoints: Endpoints, links: Mapping[str, HostLink]) -> list[str]:
    """Remove the interfaces, limits and routes that no endpoint owns; returns their names.

    Not those of an interface that leads to a namespace, unless its end had begun.
    """
    everyone = endpoints.all()
    owned = {endpoint.host_ifname for endpoint in everyone}
    strangers = {
        link.name: link
        for link in links.values()
        if link.name not in owned and link.leads_elsewhere and not link.is_doomed
    }
    owned |= strangers.keys()
    strays = [name for name in links if name not in owned]
    if strays:
        await kernel.delete_links(strays)
        log.warning("interfaces without an owner removed", names=strays)
    shapers = sorted(await kernel.shapers() - {shaper_ifname(name) for name in owned})
    if shapers:
        await kernel.delete_links(shapers)
        log.warning("limits without an owner removed", names=shapers)
    ips = {ip for endpoint in endpoints.all() for ip in endpoint.ips}
    kept = {link.index for link in strangers.values()}
    routes = [
        route
        for route in await kernel.routes()
        if route.destination.network_address not in ips and route.index not in kept
    ]
    if routes:
        await kernel.delete_routes(routes)
        log.warning("routes without an owner removed", routes=[str(r.destination) for r in routes])
    return strays + shapers + [str(route.destination) for route in routes]
