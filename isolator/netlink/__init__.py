"""Netlink: messages as bytes, a socket that sends them in batches, namespaces, and what the kernel holds."""

from isolator.netlink.conntrack import (
    Connection,
    connections_of,
    flush_conntrack,
    flush_ports,
    forget,
    sources,
)
from isolator.netlink.inventory import (
    HostLink,
    HostRoute,
    HostRule,
    delete_links,
    delete_routes,
    endpoint_routes,
    fabric_routes,
    name_back,
    our_links,
    our_routes,
    our_rules,
    say,
    shaper_links,
)
from isolator.netlink.messages import ENDPOINT_PREFIX, ROUTE_PROTOCOL
from isolator.netlink.monitor import LinkMonitor
from isolator.netlink.node import Namespace, Node, pinned, unpinned
from isolator.netlink.witness import Seen, Witness

__all__ = [
    "ENDPOINT_PREFIX",
    "ROUTE_PROTOCOL",
    "Connection",
    "HostLink",
    "HostRoute",
    "HostRule",
    "LinkMonitor",
    "Namespace",
    "Node",
    "Seen",
    "Witness",
    "connections_of",
    "delete_links",
    "delete_routes",
    "endpoint_routes",
    "fabric_routes",
    "flush_conntrack",
    "flush_ports",
    "forget",
    "name_back",
    "our_links",
    "our_routes",
    "our_rules",
    "pinned",
    "say",
    "shaper_links",
    "sources",
    "unpinned",
]
