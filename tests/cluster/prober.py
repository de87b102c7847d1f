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
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.cluster.traffic import Flood, Flow, Stream

PORT = 7
FLOW = "a flow begins"
PATIENCE = 30.0
"""Seconds to wait for what is allowed. What is forbidden is waited for as long as a test thinks it worth."""
ETH_P_IP = 0x800
KEPT_UP = b"~"
"""Begins every datagram of a flow that is kept up: those are counted, not remembered."""
QUEUE = 1 << 24
"""Bytes that may wait to be heard."""


_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
"""Linux's; the socket module has no name for them."""


class Prober:
    """See the module's docstring."""

    def __init__(self, command: Sequence[str]) -> None:
        """command: the prefix that runs a program in the container's namespace."""
        self._process = subprocess.Popen(
            [*command, sys.executable, "-m", "tests.cluster.prober"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
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

    def keep_sending(self, flows: Mapping[str, tuple[str, float]]) -> None:
        """mark -> (ip, datagrams a second), each from another port, until stopped. What falls behind is made up for."""
        self._ask(do="keep_sending", flows=flows)

    def sent(self) -> dict[str, int]:
        """How many of these were sent so far, by mark."""
        return dict(self._ask(do="sent"))

    def stop_sending(self) -> dict[str, int]:
        """End it; how many were sent."""
        return dict(self._ask(do="stop_sending"))

    def counted(self) -> Counter[str]:
        """How many datagrams of such flows arrived, by mark."""
        return Counter(self._ask(do="counted"))

    def overflowed(self) -> int:
        """How many arrived and found no room, since nobody listened for too long."""
        return int(self._ask(do="overflowed"))

    def stream(self) -> None:
        """Send numbers on the connection, all the time, and have them come back."""
        self._ask(do="stream")

    def stop_streaming(self, within: float = PATIENCE) -> dict[str, Any]:
        """End it; see Stream.stop."""
        return dict(self._ask(do="stop_streaming", within=within))

    def flow(self, ip: str) -> bool:
        """Begin a UDP flow with another prober, which answers it and remembers it; whether an answer came."""
        return bool(self._ask(do="flow", ip=ip))

    def answer_flows(self, mark: str) -> None:
        """Once more to everybody who began a flow, on that flow; and on every TCP connection that came in."""
        self._ask(do="answer_flows", mark=mark)

    @contextlib.contextmanager
    def listening_to_all(self) -> Iterator[Ear]:
        """Everything that arrives at the container's interface from now on."""
        self._ask(do="listen_to_all")
        yield Ear(self)

    def packets(self) -> list[str]:
        """See Ear."""
        return list(self._ask(do="packets"))

    def connect(self, ip: str, within: float = PATIENCE) -> bool:
        """Begin a TCP connection to another prober; whether it came about. Tried anew every second, since other
        nodes hear of an address only after its ADD was answered."""
        return bool(self._ask(do="connect", ip=ip, within=within))

    def echoes(self, text: str, within: float = PATIENCE) -> bool:
        """Whether what is sent on that connection comes back."""
        return bool(self._ask(do="echo", text=text, within=within))


class Ear:
    """What a prober hears of all that arrives."""

    def __init__(self, prober: Prober) -> None:
        self._prober = prober

    def packets(self) -> list[str]:
        """(source, protocol) of every IPv4 packet that came."""
        return self._prober.packets()


class _Inside:
    """The process in the container."""

    def __init__(self) -> None:
        self.marks: list[str] = []
        self.counts: Counter[bytes] = Counter()
        self.flood = Flood()
        self.stream: Stream | None = None
        self.connection: socket.socket | None = None
        self.flows: dict[tuple[str, int], None] = {}
        self.accepted: list[socket.socket] = []
        self.calling: list[socket.socket] = []
        self.ear: socket.socket | None = None
        self.listening = listening = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, QUEUE)
        listening.bind(("::", PORT))
        server = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
        for work, sock in ((self._listen, listening), (self._serve, server)):
            threading.Thread(target=work, args=(sock,), daemon=True).start()

    def _listen(self, sock: socket.socket) -> None:
        while True:
            raw, source = sock.recvfrom(256)
            if raw.startswith(KEPT_UP):
                self.counts[raw] += 1
                continue
            mark = raw.decode()
            if mark == FLOW:
                self.flows[source[:2]] = None
                sock.sendto(b"yes", source)
            else:
                self.marks.append(mark)

    def _serve(self, server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            self.accepted.append(connection)
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
                self.flood.begin(
                    {
                        mark: Flow(ip, PORT, KEPT_UP + mark.encode(), rate)
                        for mark, (ip, rate) in request["flows"].items()
                    }
                )
                return None
            case "sent":
                return self.flood.sent()
            case "stop_sending":
                self.flood.stop()
                return self.flood.sent()
            case "counted":
                return {raw.removeprefix(KEPT_UP).decode(): count for raw, count in self.counts.items()}
            case "overflowed":
                return _dropped(self.listening)
            case "stream":
                assert self.connection is not None
                self.stream = Stream(self.connection)
                return None
            case "stop_streaming":
                assert self.stream is not None
                return self.stream.stop(request["within"])
            case "flow":
                return self._flow(request["ip"])
            case "answer_flows":
                for target in self.flows:
                    self.listening.sendto(request["mark"].encode(), target)
                for connection in self.accepted:
                    with contextlib.suppress(OSError):
                        connection.sendall(request["mark"].encode())
                return None
            case "listen_to_all":
                self.ear = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
                self.ear.bind(("eth0", ETH_P_IP))
                self.ear.setblocking(False)
                return None
            case "packets":
                return self._packets()
            case "connect":
                return self._connect(**request)
            case _:
                return self._echoes(request["text"].encode(), request["within"])

    def _connect(self, ip: str, within: float) -> bool:
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            try:
                self.connection = socket.create_connection((ip, PORT), timeout=1)
            except OSError:
                time.sleep(0.05)
            else:
                return True
        return False

    def _flow(self, ip: str) -> bool:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(PATIENCE)
        self.calling.append(sock)
        sock.sendto(FLOW.encode(), (ip, PORT))
        try:
            return sock.recv(64) == b"yes"
        except OSError:
            return False

    def _packets(self) -> list[str]:
        assert self.ear is not None
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, address = self.ear.recvfrom(65536)
                if address[2] != socket.PACKET_OUTGOING:
                    found.append(f"{socket.inet_ntoa(packet[12:16])} protocol {packet[9]}")
        return found

    def _echoes(self, text: bytes, within: float) -> bool:
        assert self.connection is not None
        deadline = time.monotonic() + within
        got = b""
        try:
            self.connection.settimeout(within)
            self.connection.sendall(text)
            while text not in got and time.monotonic() < deadline:
                if not (data := self.connection.recv(4096)):
                    return False
                got += data
        except OSError:
            return False
        return text in got


def _dropped(sock: socket.socket) -> int:
    """Datagrams of both families that were dropped before the socket, for want of room or of the kernel's memory."""
    drops = 8
    return int(struct.unpack("9I", sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))[drops])


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
