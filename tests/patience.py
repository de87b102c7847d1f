"""How long tests wait for what has to come.

A machine with two cores and much else to do stands still for seconds at a time, so a deadline in a test says "it never
came", not "it was slow". It costs nothing while tests pass. How fast things are is measured in ``benchmarks/``.
"""

from __future__ import annotations

PATIENCE = 60.0
"""Seconds."""
