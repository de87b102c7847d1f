"""An agent of another machine: its boot id and machine id are ``BOOT`` and ``MACHINE`` of the environment, where those
are given; and it waits for ``LEFT_OVER`` seconds for what a boot may have left over."""

from __future__ import annotations

import os
import runpy

from ipam import namesakes
from isolator import identity

if __name__ == "__main__":
    boot, machine = os.environ.get("BOOT"), os.environ.get("MACHINE")
    if boot:
        identity.boot_id = lambda: boot
    if machine:
        identity.machine_id = lambda: machine
    namesakes.LEFT_OVER = float(os.environ.get("LEFT_OVER") or namesakes.LEFT_OVER)
    runpy.run_module("moorage", run_name="__main__")
