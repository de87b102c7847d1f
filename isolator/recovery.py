"""Start-up: what the journal remembers, the kernel holds and the store says become one again.

    endpoints of another boot          their namespaces died with it: released
    'detaching'                        ended
    'attaching'                        kept for the hook that comes back with the same request, then undone
    'attached', interface there        kept; no packet is lost
    'attached', interface gone         ended: its namespace is gone
    'attached', all of several gone    'missing', before this: nobody knows (isolator/missing.py)
    interface, unknown to the journal  adopted if the store has its address here, else removed

Nothing is written to the kernel before the store is in sync, or known to be away; without the store,
what cannot be attributed is left alone and keeps working.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from ipam.catalogue import Catalogue
from ipam.netgroups import Netgroup
from ipam.nodes_networks import FAMILIES
from ipam.records import Address, Network
from isolator.drivers.naming import host_ifname, mac_for, shaper_ifname
from isolator.endpoints import Endpoints
from isolator.kernel import Kernel
from isolator.model import Asked, Endpoint, EndpointKey, EndpointState, IPAddress
from isolator.netlink import HostLink

log = structlog.get_logger(__name__)


def adopted_endpoint(
    endpoint: Endpoint | None,
    ip: IPAddress,
    record: Address,
    link: HostLink,
    network: Network | None,
    boot_id: str,
    mac: str | None = None,
) -> Endpoint:
    """An endpoint as kernel and store together remember it; ``endpoint`` is what an earlier IP said.

    network: the record's, None if it is not known.
    mac: the container's, if the firewall knows it; else the one that follows from its addresses.
    """
    ips = tuple(sorted({ip, *(endpoint.ips if endpoint else ())}, key=lambda ip: (ip.version, int(ip))))
    return Endpoint(
        key=EndpointKey(record.container_id, record.ifname),
        state=EndpointState.ATTACHED,
        request_id="",
        asked=Asked(boot_id, 0),
        engine=record.engine,
        network=record.network,
        driver=network.driver if network is not None else "routed",
        netns="",
        ips=ips,
        host_ifname=link.own_name,
        mac=mac or mac_for(ips),
        mtu=link.mtu,
        netgroups=tuple(map(Netgroup, record.netgroups)),
        labels=tuple(record.labels),
        since=record.since,
        next_hop=network.next_hop if network is not None else 1,
    )


def owner_of(links: Mapping[str, HostLink], record: Address) -> HostLink | None:
    """The interface that an address record's endpoint has, if it is there."""
    return links.get(host_ifname(EndpointKey(record.container_id, record.ifname)))


async def recover(
    kernel: Kernel,
    endpoints: Endpoints,
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
    await kernel.mark_links()
    if in_sync or catalogue.pools() or not await kernel.elements():
        await endpoints.restore_policy(keep_endpoints=not in_sync, keep_others=keep_others)
    else:
        closed = {family: catalogue.around.closed(family, forced=False) for family in FAMILIES}
        if changed := await kernel.adopt_policy(closed):
            log.warning(
                "the firewall took nodes' own networks for containers'; it does no more", sets=changed
            )
    for endpoint in endpoints.all():
        if endpoint.state is EndpointState.DETACHING:
            await endpoints.resume_end(endpoint)
        elif endpoint.state is EndpointState.CONFLICT:
            await kernel.disconnect(endpoint)
    await endpoints.collect()
    if in_sync:
        await remove_strays(kernel, endpoints, links)


async def remove_strays(kernel: Kernel, endpoints: Endpoints, links: Mapping[str, HostLink]) -> list[str]:
    """Remove the interfaces, limits and routes that no endpoint owns; returns their names."""
    owned = {endpoint.host_ifname for endpoint in endpoints.all()}
    strays = [name for name in links if name not in owned]
    if strays:
        await kernel.delete_links(strays)
        log.warning("interfaces without an owner removed", names=strays)
    shapers = sorted(await kernel.shapers() - {shaper_ifname(name) for name in owned})
    if shapers:
        await kernel.delete_links(shapers)
        log.warning("limits without an owner removed", names=shapers)
    ips = {ip for endpoint in endpoints.all() for ip in endpoint.ips}
    routes = [r for r in await kernel.routes() if r.destination.network_address not in ips]
    if routes:
        await kernel.delete_routes(routes)
        log.warning("routes without an owner removed", routes=[str(r.destination) for r in routes])
    return strays + shapers + [str(route.destination) for route in routes]
