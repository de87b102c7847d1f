"""Debian's firewalld in a node's namespace, with a message bus and a configuration of its own.

`scripts/setup --test` has unpacked it into .venv. It guards that namespace only, and only we talk to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from moorage.lab import LabNode

ROOT = Path(sys.prefix, "firewalld")
PYTHON = "/usr/bin/python3"
"""The system's: it has the bindings to the bus."""
SERVES_WITHIN = 60.0

BUS = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={socket}</listen>
  <policy context="default">
    <allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/>
  </policy>
</busconfig>
"""

COMMAND = """\
#!/bin/sh
exec {python} {root}/usr/bin/firewall-cmd "$@"
"""


class Firewalld:
    """See the module's docstring. A context manager: it guards the node meanwhile."""

    def __init__(self, node: LabNode) -> None:
        self._node = node
        self._directory = node.directory / "firewalld"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for name in ("bin", "etc"):
            (self._directory / name).mkdir(parents=True)
        bus = self._directory / "bus"
        (self._directory / "bus.conf").write_text(BUS.format(socket=bus))
        command = self._directory / "bin" / "firewall-cmd"
        command.write_text(COMMAND.format(python=PYTHON, root=ROOT))
        command.chmod(0o755)
        self._environment = {
            **os.environ,
            "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={bus}",
            "PYTHONPATH": str(ROOT / "usr/lib/python3/dist-packages"),
            "PATH": f"{command.parent}:{os.environ['PATH']}",
        }
        with self._stack:
            self._start("dbus-daemon", f"--config-file={self._directory / 'bus.conf'}", "--nofork")
            self._until(bus.exists)
            self._start(
                PYTHON, str(ROOT / "usr/sbin/firewalld"), "--nofork", "--nopid",
                "--system-config", str(self._directory / "etc"),
                "--default-config", str(ROOT / "usr/lib/firewalld"),
                "--log-target", "file", "--log-file", str(self._directory / "firewalld.log"),
            )  # fmt: skip
            self._until(lambda: self.sh("firewall-cmd --state", check=False).returncode == 0)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def sh(self, command: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell command on the node, whose firewall-cmd is this firewalld's."""
        done = self._node.namespace.run("sh", "-ec", command, check=False, environment=self._environment)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def _start(self, *command: str) -> None:
        printed = self._stack.enter_context((self._directory / "log").open("ab"))
        process = self._node.namespace.start(
            *command, env=self._environment, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SERVES_WITHIN
        while not holds():
            assert time.monotonic() < deadline, (self._directory / "log").read_text()
            time.sleep(0.05)
