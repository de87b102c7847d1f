"""A witness of how fast the machine is: its clock stands still while whoever wants to work does not come to it.

A history on a busy machine finds everything late, and says nothing by it. So lateness is measured by a clock that runs
as the wall clock does where processors are free, at half its speed where one waits as long for a processor as one
uses it, and so on. A process of its own finds that out: it sleeps, works for a fixed while, and compares. A product
that is slow, or waits for the wrong thing, does not slow the witness down.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import subprocess
import sys
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
    found += took * min(1.0, usual / max(took - {SLEEP}, 1e-9))
    os.write(1, struct.pack("d", found))
"""


class Witness(contextlib.AbstractContextManager["Witness"]):
    """See the module's docstring."""

    def __enter__(self) -> Self:
        self._found = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WITNESS], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def now(self) -> float:
        """Seconds for which the machine was there for whoever wanted to work; never blocks."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while select.select([pipe], [], [], 0)[0] and (said := os.read(pipe, 8)):
            (self._found,) = struct.unpack("d", said)
        return self._found
