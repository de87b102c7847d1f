"""How nodes reach each other's containers: routes, and the tunnel where one is needed. See fabric.py."""

from isolator.fabric.fabric import Fabric
from isolator.fabric.plan import VXLAN_DEVICE, VXLAN_PORT, mac_of

__all__ = ["VXLAN_DEVICE", "VXLAN_PORT", "Fabric", "mac_of"]
