"""A scripted agent, for hooks: it notes every request, and answers or misbehaves as told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from isolator.model import EndpointKey
from netmodules import frame
from netmodules.spool import Spool
from tests.patience import PATIENCE

Fields: TypeAlias = dict[str, bytes]
Conversation: TypeAlias = Callable[[socket.socket, Fields], None]

RESULT = frame.encode({"exit": b"0", "stdout": b"result"})


def reply(link: socket.socket, _: Fields) -> None:
    """Answer."""
    link.sendall(RESULT)


def break_off(link: socket.socket, _: Fields) -> None:
    """Leave in the middle of the reply."""
    link.sendall(RESULT[:-3])


def be_silent(link: socket.socket, _: Fields) -> None:
    """Never answer, for as long as the hook waits."""
    link.recv(1)


@contextmanager
def agent(path: Path, *conversations: Conversation, after: float = 0.0) -> Iterator[list[Fields]]:
    """One connection a conversation, then the agent is gone. Yields the requests it saw."""
    seen: list[Fields] = []
    listening = socket.socket(socket.AF_UNIX)
    listens = threading.Event()

    def serve() -> None:
        time.sleep(after)
        listening.bind(str(path))
        listening.listen()
        listens.set()
        for converse in conversations:
            link, _ = listening.accept()
            with link:
                seen.append(_receive(link))
                converse(link, seen[-1])
        path.unlink()
        listening.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert after or listens.wait(PATIENCE)
    yield seen
    thread.join(PATIENCE)
    assert not thread.is_alive()


def spooled(agent_socket: Path) -> list[EndpointKey]:
    """The endpoints whose DELs lie in the spool beside this socket."""
    return [entry.key for entry in Spool(agent_socket.parent / "spool").entries()]


def _receive(link: socket.socket) -> Fields:
    header = link.recv(frame.HEADER, socket.MSG_WAITALL)
    return frame.decode(link.recv(frame.payload_length(header), socket.MSG_WAITALL))
