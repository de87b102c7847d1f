"""moorage: an IP address for every Mesos container, isolated by netgroup, never lost or double-booked.

This package composes the others: the command line, the configuration, the agent.
"""

__version__ = "0.1.0.dev0"
