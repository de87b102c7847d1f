"""A thread that touches the kernel: one thing at a time, beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ipam.worker import Worker
from isolator.netlink.node import Node
from isolator.netlink.seal import Seal

P = ParamSpec("P")
T = TypeVar("T")


class KernelThread:
    """One thread, and a netlink socket in the network namespace that the agent is in. seal: as for Node."""

    def __init__(self, name: str, seal: Seal | None = None) -> None:
        self._executor = Worker(name)
        self.node = self.call(lambda: Node(seal))

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run it there."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: work(*args, **kwargs))

    def call(self, work: Callable[[], T]) -> T:
        """Run it there and wait: for start and stop, when there is nobody to keep waiting."""
        return self._executor.submit(work).result()

    def close(self) -> None:
        self.call(self.node.close)
        self._executor.shutdown()
