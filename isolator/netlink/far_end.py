"""The container's end of an endpoint's interface, found by what it is: the other end of the pair that the node has.

Paths are made anew and names are given to others, so neither says whose a namespace or a link is. The kernel does: of
the node's end it tells in which namespace the other one is, by the number that it has here, and its index there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from isolator.errors import NamespaceGone
from isolator.netlink.inventory import HostLink, link_by_index, link_by_name, namespace_number
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
    is_elsewhere = NamespaceGone(
        f"{container.path} leads to another namespace by now: the other end of {host_ifname} is not in it"
    )
    if ours.peer_namespace is None or ours.peer_namespace != namespace_number(node.route, container.fd):
        raise is_elsewhere
    with container.inside(), NetlinkSocket() as route:
        link = link_by_index(route, ours.peer)
        # It may have been deleted since, and another link have its index.
        if link is None or link.peer != ours.index:
            raise is_elsewhere
        yield FarEnd(route, link)
