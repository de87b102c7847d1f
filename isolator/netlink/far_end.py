"""The container's end of an endpoint's interface, found by what it is: the other end of the pair that the node has.

Paths are made anew and names are given to others, so neither says whose a namespace or a link is. The two ends of a
pair name each other by index, and each of our pairs has indexes of its own (drivers/routed.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from isolator.errors import NamespaceGone
from isolator.netlink.inventory import HostLink, link_by_index, link_by_name
from isolator.netlink.node import Namespace, Node
from isolator.netlink.socket import NetlinkSocket


@dataclass(frozen=True, slots=True)
class FarEnd:
    """route: a socket in the container's namespace. link: its end, whatever it is called there."""

    route: NetlinkSocket
    link: HostLink


@contextlib.contextmanager
def far_end(node: Node, container: Namespace, host_ifname: str) -> Iterator[FarEnd]:
    """Run the block inside the container, if it is the one that the node's link leads to.

    Raises NamespaceGone if it is another one or the link is gone, KernelRefused.
    """
    ours = link_by_name(node.route, host_ifname)
    if ours is None:
        raise NamespaceGone(f"the node has no link {host_ifname}; its container's end went with it")
    with container.inside(), NetlinkSocket() as route:
        link = link_by_index(route, ours.peer)
        if link is None or not link.is_peer_of(ours):
            raise NamespaceGone(
                f"{container.path} leads to another namespace by now: the other end of {host_ifname} is not in it"
            )
        yield FarEnd(route, link)
