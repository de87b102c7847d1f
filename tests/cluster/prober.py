"""Packets between containers, and what arrived of them: a process inside each, told over a pipe what to send.

    with Prober(container) as one, Prober(other) as another:
        one.send({ip_of_other: "mark"})
        another.heard()            -> ["mark"]

Every datagram leaves from a new port: none can pass as part of something older.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

PORT = 7


class Prober:
    """See the module's docstring."""

    def __init__(self, command: Sequence[str]) -> None:
        """command: the prefix that runs a program in the container's namespace."""
        self._process = subprocess.Popen(
            [*command, sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def send(self, targets: Mapping[str, str]) -> None:
        """One datagram to each address, with a mark in it."""
        self._ask(do="send", targets=targets)

    def heard(self) -> list[str]:
        """The marks that arrived since this was asked last."""
        return list(self._ask(do="heard"))

    def keep_sending(self, ip: str, mark: str, pause: float) -> None:
        """A datagram every ``pause`` seconds, each from another port, marked ``mark`` and a number, until stopped."""
        self._ask(do="keep_sending", ip=ip, mark=mark, pause=pause)

    def stop_sending(self) -> dict[str, int]:
        """End it; how many were sent with each mark."""
        return dict(self._ask(do="stop_sending"))

    def connect(self, ip: str) -> bool:
        """Begin a TCP connection to another prober; whether it came about."""
        return bool(self._ask(do="connect", ip=ip))

    def echoes(self, text: str) -> bool:
        """Whether what is sent on that connection comes back within a second."""
        return bool(self._ask(do="echo", text=text))


class _Inside:
    """The process in the container."""

    def __init__(self) -> None:
        self.marks: list[str] = []
        self.sent: dict[str, int] = {}
        self.stopping = threading.Event()
        self.senders: list[threading.Thread] = []
        self.connection: socket.socket | None = None
        listening = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        listening.bind(("::", PORT))
        server = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
        for work, sock in ((self._listen, listening), (self._serve, server)):
            threading.Thread(target=work, args=(sock,), daemon=True).start()

    def _listen(self, sock: socket.socket) -> None:
        while True:
            mark = sock.recv(256).decode()
            self.marks.append(mark)

    def _serve(self, server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_echo_back, args=(connection,), daemon=True).start()

    def answer(self, request: dict[str, Any]) -> Any:
        match request.pop("do"):
            case "send":
                for ip, mark in request["targets"].items():
                    _send(ip, mark)
                return None
            case "heard":
                marks, self.marks = self.marks, []
                return marks
            case "keep_sending":
                thread = threading.Thread(target=self._keep_sending, kwargs=request, daemon=True)
                self.senders.append(thread)
                thread.start()
                return None
            case "stop_sending":
                self.stopping.set()
                for sender in self.senders:
                    sender.join()
                return self.sent
            case "connect":
                try:
                    self.connection = socket.create_connection((request["ip"], PORT), timeout=1)
                except OSError:
                    return False
                return True
            case _:
                return self._echoes(request["text"].encode())

    def _keep_sending(self, ip: str, mark: str, pause: float) -> None:
        number = 0
        while not self.stopping.wait(pause):
            _send(ip, f"{mark} {number}")
            number += 1
        self.sent[mark] = number

    def _echoes(self, text: bytes) -> bool:
        assert self.connection is not None
        deadline = time.monotonic() + 1
        got = b""
        try:
            self.connection.sendall(text)
            while text not in got and time.monotonic() < deadline:
                got += self.connection.recv(4096)
        except OSError:
            return False
        return text in got


def _echo_back(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        while data := connection.recv(4096):
            connection.sendall(data)


def _send(ip: str, mark: str) -> None:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.sendto(mark.encode(), (ip, PORT))


if __name__ == "__main__":
    inside = _Inside()
    for line in sys.stdin:
        print(json.dumps(inside.answer(json.loads(line))), flush=True)
