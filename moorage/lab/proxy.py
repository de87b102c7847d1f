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
from moorage.lab.resource import Resource
from moorage.lab.switch import Switch, address


class DelayingProxy(Resource):
    """See the module's docstring.

    host: its number on the underlay. target: where it forwards to, ``ip:port``; it listens on the same port.
    """

    def __init__(self, switch: Switch, host: int, target: str) -> None:
        self.namespace = Namespace(unique("proxy"))
        self.address = f"{address(host)}:{target.rpartition(':')[2]}"
        self._switch = switch
        self._host = host
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        self.namespace.create()
        self._switch.plug(self.namespace, self._host)
        self._process = self.namespace.start(
            sys.executable, "-m", "moorage.lab.delaying", self.address, self._target,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        self.delay(round_trip=0.0)

    def delete(self) -> None:
        if self._process is not None:
            with self._process:  # its end of the pipe closed is its order to end
                pass
        self.namespace.delete()

    def delay(self, round_trip: float) -> None:
        """From now on a round trip takes this many seconds longer. Raises RuntimeError if the proxy is gone."""
        assert self._process is not None, "it is made first"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{round_trip}\n".encode())
            self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise RuntimeError(f"the proxy to {self._target} ended with {self._process.wait()}")
