"""A stand-in for the agent's admin side: answers frames on a unix socket from a table."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from netmodules import frame
from tests.patience import PATIENCE

Answers = dict[str, tuple[int, Any]]


@contextmanager
def answering(path: Path, answers: Answers) -> Iterator[list[dict[str, Any]]]:
    """An agent that answers each admin call with (exit code, JSON); yields the requests it saw."""
    seen: list[dict[str, Any]] = []

    def reply_to(request: dict[str, bytes]) -> bytes:
        asked = json.loads(request["stdin"])
        seen.append({**{k: v.decode() for k, v in request.items() if k != "stdin"}, "asked": asked})
        exit_code, answer = answers[asked["call"]]
        return frame.encode({"exit": str(exit_code).encode(), "stdout": json.dumps(answer).encode()})

    with serving(path, reply_to):
        yield seen


@contextmanager
def serving(path: Path, reply_to: Any) -> Iterator[None]:
    """A server that reads one request frame a connection and writes what ``reply_to`` returns."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        while True:
            try:
                link, _ = server.accept()
            except OSError:
                return
            with link, link.makefile("rb") as reading:
                length = frame.payload_length(reading.read(frame.HEADER))
                link.sendall(reply_to(frame.decode(reading.read(length))))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(PATIENCE)
