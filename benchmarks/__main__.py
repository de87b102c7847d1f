"""``python -m benchmarks``: measure, and print what was measured beside its budget.

Exits 0 if everything could be measured, also if a budget is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    agent_share,
    burst,
    cni,
    commits,
    follow,
    idle,
    large,
    outage,
    policy,
    reconcile,
    scale,
    throughput,
)
from benchmarks.figures import Row, table
from benchmarks.launch import CallFailed

BENCHMARKS: dict[str, Callable[[int], list[Row]]] = {
    "cni": cni.rows,
    "agent-share": agent_share.rows,
    "burst": burst.rows,
    "scale": scale.rows,
    "idle": idle.rows,
    "commits": commits.rows,
    "outage": outage.rows,
    "large": large.rows,
    "fabric-throughput": throughput.rows,
    "follow": follow.rows,
    "policy": policy.rows,
    "reconcile": reconcile.rows,
}


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description="moorage against its peers and budgets")
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="may be repeated; default: all")
    parser.add_argument("--rounds", type=int, default=100, help="of each benchmark (default 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if os.geteuid() != 0:
        print("network namespaces need root: sudo make bench", file=sys.stderr)
        return 1
    # An interrupt unwinds like an error, so that everything is cleaned up.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    print(_machine(), flush=True)
    found: dict[str, list[Row]] = {}
    try:
        for name in arguments.only or BENCHMARKS:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            found[name] = BENCHMARKS[name](arguments.rounds)
            time.sleep(1.0)
    except KeyboardInterrupt:
        print("interrupted; everything was taken away again", file=sys.stderr)
        return 130
    except (CallFailed, subprocess.SubprocessError, RuntimeError, OSError) as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    print("\n" + table([row for rows in found.values() for row in rows]))
    if arguments.json is not None:
        figures = {name: [row.as_json() for row in rows] for name, rows in found.items()}
        arguments.json.write_text(json.dumps({"machine": _machine(), **figures}, indent=2) + "\n")
    return 0


def _machine() -> str:
    system = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    load = os.getloadavg()[0]
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, Linux {platform.release()}, {system}, "
        f"Python {platform.python_version()}, load {load:.1f} at the start"
    )


if __name__ == "__main__":
    sys.exit(main())
