"""Listeners as processes of their own: started, paused, resumed, killed, as an operator's machines do it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moorage.lab import Namespace
from moorage.lab.node import MOORAGE, with_source


class Listening:
    """One ``moorage marathon listen`` process. log: the file it writes to. within: where it runs."""

    def __init__(
        self,
        store: str,
        marathons: Sequence[str],
        masters: Sequence[str],
        log: Path,
        *,
        grace: float,
        interval: float,
        gone_after: float,
        keep_alive: float = 10.0,
        within: Namespace | None = None,
    ) -> None:
        self.log = log
        others = {name: text for name, text in os.environ.items() if not name.startswith("MOORAGE_")}
        command = [
            *MOORAGE, "--store", store, "marathon", "listen",
            *(word for url in marathons for word in ("--url", url)),
            *(word for url in masters for word in ("--mesos-master", url)),
            "--grace", str(grace), "--interval", str(interval), "--keep-alive", str(keep_alive),
            "--gone-after", str(gone_after),
        ]  # fmt: skip
        self._command = command if within is None else within.command(*command)
        self._environment = with_source({**others, "MOORAGE_CONFIG": os.devnull})
        self._process: subprocess.Popen[bytes] | None = None
        self._is_paused = False

    def start(self) -> None:
        assert self._process is None, "it runs already"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        self._is_paused = False

    @property
    def works(self) -> bool:
        """It runs, and is not paused."""
        return self._process is not None and self._process.poll() is None and not self._is_paused

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def pause(self) -> None:
        """It stands still and does not know it."""
        if self.works:
            os.kill(self.pid, signal.SIGSTOP)
            self._is_paused = True

    def resume(self) -> None:
        if self._is_paused:
            os.kill(self.pid, signal.SIGCONT)
            self._is_paused = False

    def kill(self) -> None:
        """kill -9; no error if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self._is_paused = False
