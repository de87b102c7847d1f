"""The agent called straight over its socket, without the hook."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

from benchmarks.launch import CallFailed
from benchmarks.subjects import Container, config_of
from isolator.identity import boot_id
from moorage.lab import LabNode
from moorage.lab.container import HOOK
from netmodules import frame


@dataclass(frozen=True, slots=True)
class Span:
    """One call: CLOCK_MONOTONIC in ns, as the frame was about to be sent and as the whole reply was there."""

    sent: int
    answered: int

    @property
    def ms(self) -> float:
        return (self.answered - self.sent) / 1e6


class AgentClient:
    """Calls the agent of a node as its hook does, one connection a call; connecting is not in the time."""

    def __init__(self, node: LabNode) -> None:
        self._path = str(node.socket)
        self._config = config_of(node)
        self._boot = boot_id().encode()

    def call(self, command: str, container: Container) -> Span:
        """Raises CallFailed."""
        request = self._request(command, container)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(self._path)
            sent = time.monotonic_ns()
            link.sendall(request)
            reply = link.recv(65536)
            while len(reply) < frame.HEADER or len(reply) < frame.HEADER + frame.payload_length(
                reply[: frame.HEADER]
            ):
                more = link.recv(65536)
                if not more:
                    raise CallFailed(f"the agent closed the connection in a {command}")
                reply += more
            answered = time.monotonic_ns()
        answer = frame.decode(reply[frame.HEADER :])
        if answer["exit"] != b"0":
            raise CallFailed(f"the agent refused a {command}: {answer['stdout'].decode()}")
        return Span(sent, answered)

    def _request(self, command: str, container: Container) -> bytes:
        variables = container.environment(command, HOOK.parent)
        return frame.encode(
            {
                "call": b"cni",
                "request": os.urandom(16).hex().encode(),
                "boot": self._boot,
                "started": b"%d" % time.clock_gettime_ns(time.CLOCK_BOOTTIME),
                **{f"env.{k}": v.encode() for k, v in variables.items() if k.startswith("CNI_")},
                "stdin": self._config,
            }
        )
