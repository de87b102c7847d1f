"""Asking the agent of this machine, over the same socket and frames as the hook.

    call("/run/moorage/agent.sock", "status")       -> {"node": "a", ...}
    call("/run/moorage/agent.sock", "endpoints")    -> [{"container_id": "c1", "ifname": "eth0", ...}, ...]

A request frame has call=admin and, as stdin, JSON ``{"call": name, **arguments}``; the reply's stdout is
JSON, on a non-zero exit ``{"error": sentence}``.
"""

from __future__ import annotations

import json
import socket
import struct
import time
import uuid
from pathlib import Path
from typing import Any

from ipam.errors import InvalidInput, MoorageError, TryAgain
from netmodules import frame

TIMEOUT = 15.0
"""Seconds for the agent to answer; longer than an intent's, which an answer may wait for."""

MAX_ANSWER = 64 << 20
"""Bytes: about 100,000 endpoints."""


def call(socket_path: str, name: str, **arguments: Any) -> Any:
    """The agent's answer. Raises TryAgain when none answers, MoorageError with its sentence when it refuses."""
    request = frame.encode(
        {
            "call": b"admin",
            "request": uuid.uuid4().hex.encode(),
            "boot": Path("/proc/sys/kernel/random/boot_id").read_bytes().strip(),
            "started": str(time.clock_gettime_ns(time.CLOCK_BOOTTIME)).encode(),
            "stdin": json.dumps({"call": name, **arguments}).encode(),
        }
    )
    with _connect(socket_path) as link:
        try:
            link.sendall(request)
            length = frame.payload_length(_receive(link, frame.HEADER), MAX_ANSWER)
            reply = frame.decode(_receive(link, length))
            exit_code, answer = int(reply["exit"]), json.loads(reply["stdout"] or b"null")
        except TimeoutError:
            raise TryAgain(
                f"the agent on {socket_path} did not answer within {TIMEOUT:.0f} s; see its log"
            ) from None
        except (OSError, ValueError, KeyError) as error:
            raise TryAgain(
                f"the agent on {socket_path} broke off its answer ({error}); see its log, then try again"
            ) from error
    if exit_code:
        sentence = answer.get("error") if isinstance(answer, dict) else None
        raise MoorageError(sentence or f"the agent refused {name} without saying why; see its log")
    return answer


def _connect(path: str) -> socket.socket:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    # Not a timeout of Python's: connect(2) would not wait where many wait to be accepted.
    link.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", *divmod(round(TIMEOUT * 1e6), 10**6))
    )
    try:
        link.connect(path)
        link.settimeout(TIMEOUT)
    except BlockingIOError:
        link.close()
        raise TryAgain(
            f"the agent on {path} accepted nobody for {TIMEOUT:g} s; see its log and `moorage status`, then try again"
        ) from None
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        link.close()
        raise TryAgain(
            f"no agent answers on {path}: start it with `moorage agent`, or name its socket with --socket"
        ) from None
    except PermissionError:
        link.close()
        raise InvalidInput(f"only root may ask the agent on {path}; use sudo") from None
    except OSError as error:
        link.close()
        raise TryAgain(
            f"the agent on {path} cannot be reached: {error}; name its socket with --socket"
        ) from None
    return link


def _receive(link: socket.socket, length: int) -> bytes:
    """Exactly ``length`` bytes. Raises ValueError when the connection ends before."""
    received = bytearray()
    while len(received) < length:
        chunk = link.recv(min(length - len(received), 1 << 16))
        if not chunk:
            raise ValueError("connection closed")
        received += chunk
    return bytes(received)
