"""An agent whose released addresses cool down, and whose sign of life ends, within a few seconds: for tests that wait
for both. ``python hasty_agent.py agent --node ...``"""

from __future__ import annotations

import runpy

from ipam import holder, membership

COOLDOWN = 3.0
"""Seconds; longer than the sign of life lasts, as with every agent."""

ALIVE = 2.0
"""Seconds; etcd has no shorter leases."""

if __name__ == "__main__":
    # Before anything that takes them for its defaults is imported.
    holder.COOLDOWN, membership.LEASE = COOLDOWN, ALIVE
    runpy.run_module("moorage", run_name="__main__")
