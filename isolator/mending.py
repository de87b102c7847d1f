"""Endpoints' routes, rules, addresses and neighbours, put back when somebody took them away.

The kernel says where something went (netlink/witness.py); only endpoints there are looked at, which takes some 2 ms
each. A container that keeps undoing its own wiring is mended, but never so often that others would feel it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from isolator.endpoints import Endpoints
from isolator.kernel import Kernel
from isolator.model import Endpoint, EndpointKey, EndpointState
from isolator.netlink import HostLink, Seen, Witness

LOOK_EVERY = 1.0
"""Seconds between looks at what the kernel told."""

AGAIN_AFTER = 3.0
"""Seconds between two looks at one endpoint; together with the above, less than the 5 s that mending may take."""

MOST_AT_ONCE = 25
"""Endpoints that are looked at before the next second: some 50 ms of work."""


def suspects(seen: Seen, endpoints: list[Endpoint], links: Mapping[str, HostLink]) -> list[Endpoint]:
    """The endpoints of which something may be missing. links: of the node, by name."""

    def suspected(endpoint: Endpoint) -> bool:
        link = links.get(endpoint.host_ifname)
        inside = link is not None and link.peer_namespace in seen.namespaces
        return (
            seen.lost or inside or endpoint.host_ifname in seen.links or not seen.ips.isdisjoint(endpoint.ips)
        )

    return [e for e in endpoints if e.state is EndpointState.ATTACHED and suspected(e)]


async def mend(kernel: Kernel, endpoints: Endpoints) -> None:
    """Mend until cancelled. Raises KernelRefused."""
    witness = Witness()
    waiting: dict[EndpointKey, None] = {}
    looked_at: dict[EndpointKey, float] = {}
    now = asyncio.get_running_loop().time
    try:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if seen := witness.seen():
                found = suspects(seen, endpoints.all(), await kernel.links())
                waiting |= dict.fromkeys(endpoint.key for endpoint in found)
            looked_at = {key: at for key, at in looked_at.items() if at > now() - AGAIN_AFTER}
            for key in [key for key in waiting if key not in looked_at][:MOST_AT_ONCE]:
                del waiting[key]
                looked_at[key] = now()
                endpoint = endpoints.get(key)
                if endpoint is not None:
                    await endpoints.repair(endpoint)
    finally:
        witness.close()
