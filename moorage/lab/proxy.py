"""A slow network on the lab's underlay: a TCP proxy in a namespace of its own, whose delay is set from here.

with DelayingProxy(switch, 150, target="198.18.0.201:2379") as proxy:
    proxy.delay(round_trip=0.2)
    ...                             connections to proxy.address take 200 ms a round trip
"""

from __future__ import annotations

import contextlib
import subprocess
import sys

from moorage.lab.namespace import Namespace, unique
from moorage.lab.switch import Switch


class DelayingProxy:
    """See the module's docstring. A context manager.

    host: its number on the underlay. target: where it forwards to, ``ip:port``; it listens on the same port.
    """

    def __init__(self, switch: Switch, host: int, target: str) -> None:
        self.namespace = Namespace(unique("proxy"))
        self._switch = switch
        self._host = host
        self._target = target
        self._resources = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes]
        self.address = ""

    def __enter__(self) -> DelayingProxy:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.namespace)
            ip = self._switch.plug(self.namespace, self._host)
            self.address = f"{ip}:{self._target.rpartition(':')[2]}"
            self._process = stack.enter_context(
                self.namespace.start(
                    sys.executable, "-m", "moorage.lab.delaying", self.address, self._target,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
            )  # fmt: skip
            self.delay(round_trip=0.0)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def delay(self, round_trip: float) -> None:
        """From now on a round trip takes this many seconds longer. Raises RuntimeError if the proxy is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{round_trip}\n".encode())
            self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError(f"the proxy to {self._target} ended with {self._process.wait()}")
