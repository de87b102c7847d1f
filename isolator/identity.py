"""Who this agent is: its machine, and the boot it runs in."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MACHINE_ID = Path("/etc/machine-id")
_HARDWARE = Path("/sys/class/dmi/id/product_uuid")
_APPLICATION = b"moorage node"


def boot_id() -> str:
    """The kernel's name for this boot."""
    return _BOOT_ID.read_text().strip()


def machine_id() -> str:
    """32 hex digits that are the same for as long as this installation is, on this hardware; "" if /etc/machine-id has
    none.

    Derived from it, as machine-id(5) asks of whoever publishes it, and from the firmware's UUID where there is one: a
    virtual machine that was cloned has a new one, and its disk says the same.
    """
    try:
        text = _MACHINE_ID.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    if not re.fullmatch("[0-9a-f]{32}", text):
        return ""  # an image that has not been booted yet says "uninitialized"
    try:
        hardware = _HARDWARE.read_bytes().strip().lower()
    except OSError:
        hardware = b""
    return hmac.new(bytes.fromhex(text), _APPLICATION + hardware, hashlib.sha256).hexdigest()[:32]
