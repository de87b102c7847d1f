"""How an endpoint is wired on its node: the interface is base.py, one file a driver, one line in the registry.

driver = load_driver("routed", node)
"""

from __future__ import annotations

from collections.abc import Callable

from ipam.errors import InvalidInput
from isolator.drivers.base import Driver, Repair, Wiring
from isolator.drivers.routed import Routed
from isolator.netlink.node import Node

__all__ = ["DRIVERS", "Driver", "Repair", "Wiring", "load_driver"]

DRIVERS: dict[str, Callable[[Node], Driver]] = {
    "routed": Routed,
}


def load_driver(name: str, node: Node) -> Driver:
    """The driver that a network names. Raises InvalidInput if there is none of that name."""
    try:
        return DRIVERS[name](node)
    except KeyError:
        known = ", ".join(sorted(DRIVERS))
        raise InvalidInput(f"there is no driver {name!r}; a network's driver is one of: {known}") from None
