"""An agent whose wall clock is wrong by ``SKEW`` seconds, of the environment; 0 unless given.
``SKEW=3600 python skewed_agent.py agent --node ...``. Time namespaces move the other clocks only."""

from __future__ import annotations

import os
import runpy
import sys
import time

if __name__ == "__main__":
    right, skew = time.time, float(os.environ.get("SKEW") or 0)

    def wrong() -> float:
        # gRPC makes deadlines of it for its core, which has the machine's clock.
        asker = str(sys._getframe(1).f_globals.get("__name__"))
        return right() + (0.0 if asker.startswith("grpc.") else skew)

    time.time = wrong
    runpy.run_module("moorage", run_name="__main__")
