"""A server that sends back what it gets, one connection after the other: ``python -m benchmarks.echo``.

Says ``ready`` when it listens.
"""

from __future__ import annotations

import socket

PORT = 5007


def serve() -> None:
    with socket.create_server(("", PORT)) as listener:
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while data := connection.recv(4096):
                    connection.sendall(data)


if __name__ == "__main__":
    serve()
