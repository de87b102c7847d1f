"""The agent, killed by SIGKILL where one wants it: ``python -m moorage.lab.mortal DIRECTORY agent ...``.

    DIRECTORY/step       names a step (isolator/steps.py): the agent dies when it is there next; the file goes
    DIRECTORY/interval   two numbers: it dies at a random time, that many seconds after a request
    DIRECTORY/kills      gets one line a death: where, and how many requests were under way

Only this process is killed, and only by itself.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from isolator import steps
from moorage.cli import main

ENDS = {
    "attach:attached": "attach:begun",
    "detach:withdrawn": "detach:begun",
    "allocate:journalled": "allocate:begun",
    "release:journalled": "release:begun",
}


def command(directory: Path) -> tuple[str, ...]:
    """The command line of an agent that dies where files in ``directory`` say, less the agent's options."""
    return (sys.executable, "-m", "moorage.lab.mortal", str(directory), "agent")


class Reaper:
    """Follows the steps and ends the process at one of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.under_way = 0
        self.lock = threading.Lock()
        self.armed = False

    def observe(self, step: str) -> None:
        with self.lock:
            self.under_way += step.endswith(":begun")
            wanted = self.directory / "step"
            if wanted.exists() and wanted.read_text() == step:
                wanted.unlink()
                self.die(step)
            if step in ENDS:
                self.under_way -= 1
            if not self.armed and (self.directory / "interval").exists():
                self.armed = True
                threading.Thread(target=self.die_some_time, daemon=True).start()

    def die_some_time(self) -> None:
        shortest, longest = map(float, (self.directory / "interval").read_text().split())
        time.sleep(random.uniform(shortest, longest))
        with self.lock:
            self.armed = False
            if (self.directory / "interval").exists():
                self.die("random")

    def die(self, where: str) -> None:
        with (self.directory / "kills").open("a") as kills:
            kills.write(f"{where} {self.under_way}\n")
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    steps.observer = Reaper(Path(sys.argv.pop(1))).observe
    main()
