"""An agent whose released addresses cool down, and whose sign of life ends, within a few seconds: for tests that wait
for both. ``python hasty_agent.py agent --node ...``"""

from __future__ import annotations

import functools

import ipam.membership
import moorage.agent
from isolator.isolator import Settings
from moorage.cli.app import main

COOLDOWN = 3.0
"""Seconds; longer than the sign of life lasts, as with every agent."""

ALIVE = 2.0
"""Seconds; etcd has no shorter leases."""

if __name__ == "__main__":
    ipam.membership.LEASE = ALIVE
    moorage.agent.Settings = functools.partial(Settings, cooldown=COOLDOWN)  # type: ignore[misc,assignment]
    main()
