"""Netlink: messages as bytes, a socket that sends them in batches, namespaces, and what the kernel holds."""

from isolator.netlink.conntrack import flush_conntrack, flush_ports
from isolator.netlink.inventory import (
    HostLink,
    HostRoute,
    HostRule,
    delete_links,
    delete_routes,
    endpoint_links,
    endpoint_routes,
    fabric_routes,
    our_routes,
    our_rules,
    shaper_links,
)
from isolator.netlink.messages import ENDPOINT_PREFIX, ROUTE_PROTOCOL
from isolator.netlink.monitor import LinkMonitor
from isolator.netlink.node import Namespace, Node
from isolator.netlink.witness import Seen, Witness

__all__ = [
    "ENDPOINT_PREFIX",
    "ROUTE_PROTOCOL",
    "HostLink",
    "HostRoute",
    "HostRule",
    "LinkMonitor",
    "Namespace",
    "Node",
    "Seen",
    "Witness",
    "delete_links",
    "delete_routes",
    "endpoint_links",
    "endpoint_routes",
    "fabric_routes",
    "flush_conntrack",
    "flush_ports",
    "our_routes",
    "our_rules",
    "shaper_links",
]
