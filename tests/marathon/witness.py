"""A witness of how fast the machine is: its clock runs slower while whoever wants to work has to wait for a processor.

A history on a busy machine finds everything late, and says nothing by it. So lateness is measured by a clock that runs
as the wall clock does where processors are free, and slower where they are not: as fast as somebody gets on who works
for half of the time and waits for the other half, which a busy machine does not make longer. A process of its own finds
that out: it sleeps, works for a fixed while, and compares. A product that is slow, or waits for the wrong thing, does
not slow the witness down.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import subprocess
import sys
import time
from typing import Self

SLEEP = 0.1
"""Seconds between looks."""

_WITNESS = f"""
import os, struct, time

def work():
    begun = time.process_time()
    sum(range(400_000))
    return time.process_time() - begun

usual = min(work() for _ in range(10))
found = 0.0
while True:
    begun = time.monotonic()
    time.sleep({SLEEP})
    work()
    took = time.monotonic() - begun
    slower = max(1.0, (took - {SLEEP}) / usual)
    found += took * 2 / (1 + slower)
    os.write(1, struct.pack("d", found))
"""


class Witness(contextlib.AbstractContextManager["Witness"]):
    """See the module's docstring."""

    def __enter__(self) -> Self:
        self._found, self._begun = 0.0, time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WITNESS], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def now(self) -> float:
        """Seconds for which the machine was there for whoever wanted to work; never blocks."""
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        while select.select([pipe], [], [], 0)[0] and (said := os.read(pipe, 8)):
            (self._found,) = struct.unpack("d", said)
        return self._found

    def speed(self) -> float:
        """How fast the machine was on the average, against one with free processors."""
        return self.now() / max(time.monotonic() - self._begun, 1e-9)
