"""Telling the service manager how the agent is: the sd_notify protocol (sd_notify(3)), no library needed."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import structlog

log = structlog.get_logger(__name__)

READY = "READY=1"
STOPPING = "STOPPING=1"


def notify(state: str, environ: Mapping[str, str] | None = None) -> bool:
    """Send ``state`` to NOTIFY_SOCKET; several lines are several assignments.

    Says whether it was sent: without a service manager there is nobody to tell, and one that cannot be
    told is no reason to stop.
    """
    address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
            link.connect(address)
            link.sendall(state.encode())
    except OSError as error:
        log.warning("service manager not told", state=state, why=str(error))
        return False
    return True
