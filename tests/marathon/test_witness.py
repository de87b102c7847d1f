"""The clock that lateness is measured by: as fast as the machine, and never faster than the wall."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tests.marathon.witness import Witness


def test_its_clock_is_never_ahead_of_the_wall_and_stands_still_with_its_process() -> None:
    with Witness() as witness:
        begun = time.monotonic()
        while (first := witness.now()) == 0.0:
            time.sleep(0.02)
        assert 0.0 < first <= time.monotonic() - begun + 1.0
        before, wall = witness.now(), time.monotonic()
        time.sleep(2.0)
        assert 0.0 < witness.now() - before <= time.monotonic() - wall + 0.5


def test_it_runs_slower_while_its_processor_is_wanted_by_others() -> None:
    with Witness() as witness:
        time.sleep(1.0)
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
        try:
            for process in (*busy, witness.process):
                os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
            time.sleep(1.0)
            before, wall = witness.now(), time.monotonic()
            time.sleep(3.0)
            speed = (witness.now() - before) / (time.monotonic() - wall)
        finally:
            for process in busy:
                process.kill()
                process.wait()
    assert speed < 0.8
