"""``moorage marathon`` as a user meets it; Marathon is the stand-in, the store an embedded one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipam.store import Store
from tests.marathon.scene import FRAMEWORK, Idle, Scene, ip_of
from tests.moorage.conftest import CommandLine
from tests.patience import PATIENCE
from tests.standins.marathon import Instance, Marathon
from tests.standins.mesos_master import Master

ROOT = Path(__file__).parents[2]


@pytest.fixture
def marathon() -> Iterator[Instance]:
    with Marathon(framework=FRAMEWORK, keepalive=0.2).instance(user="u:p") as one:
        yield one


@pytest.fixture
def user(tmp_path: Path) -> str:
    path = tmp_path / "user"
    path.write_text("u:p\n")
    path.chmod(0o600)
    return str(path)


def one_is_stale_in(moorage: CommandLine, marathon: Instance) -> None:
    """Two addresses, a task for one of them, and no agent that could be asked."""

    async def act(store: Store) -> None:
        scene = Scene(store)
        scene.marathon = marathon.marathon
        await scene.node(alive=False)
        scene.listed(1)
        await scene.assigned(1, 2)

    moorage.on_store(act)


def test_a_dry_run_says_what_and_why(moorage: CommandLine, marathon: Instance, user: str) -> None:
    one_is_stale_in(moorage, marathon)
    said = moorage.run("marathon", "reconcile", "--url", marathon.url, "--user", user, "--dry-run")
    assert said.exit_code == 0
    assert ip_of(2) in said.output
    assert "Marathon does not know its task" in said.output
    assert "1 live" in said.output
    told = moorage.json("marathon", "reconcile", "--url", marathon.url, "--user", user, "--dry-run")
    assert (told["dry_run"], told["counts"]["live"], told["counts"]["unreachable"]) == (True, 1, 1)


def test_a_node_that_mesos_calls_gone_is_told_with_how_long_it_is_kept(
    moorage: CommandLine, marathon: Instance, user: str
) -> None:
    one_is_stale_in(moorage, marathon)
    master = Master()
    with master.instance() as leading:
        master.register(Idle(), "S1")
        master.mark_gone("S1")
        asked = ["--url", marathon.url, "--user", user, "--mesos-master", leading.url, "--gone-after", "900"]
        said = moorage.ok("marathon", "reconcile", *asked, "--dry-run")
    assert re.search(
        r"^node n1 is kept until its agent has been away for another \d{3} s: .*registry says",
        said,
        re.MULTILINE,
    )


def test_nobody_leads_is_said_with_what_to_do(moorage: CommandLine) -> None:
    moorage.run("network", "create", "web", "--pool", "10.64.0.0/24")
    assert "no listener leads; start one with `moorage marathon listen" in moorage.fails("marathon", "status")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--url", "http://u:hunter2@h:1"], "has a user in it"),
        (["--url", "marathon:8080"], "http://192.0.2.10:8080"),
        (["--url", "http://127.0.0.1:1"], "does not answer"),
    ],
)
def test_who_cannot_be_asked_is_said(moorage: CommandLine, options: list[str], why: str) -> None:
    moorage.run("network", "create", "web", "--pool", "10.64.0.0/24")
    said = moorage.fails("marathon", "reconcile", "--dry-run", *options)
    assert why in said
    assert "hunter2" not in said


def test_a_listener_leads_tells_how_it_is_and_ends_on_sigterm(
    moorage: CommandLine, marathon: Instance, user: str
) -> None:
    one_is_stale_in(moorage, marathon)
    command = [sys.executable, "-m", "moorage", "--store", moorage.store, "marathon", "listen"]
    process = subprocess.Popen(
        [*command, "--url", marathon.url, "--user", user, "--interval", "1", "--log-format", "json"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("MOORAGE_")},
    )
    try:
        [state] = steady(moorage)
        assert state["counts"]["live"] == 1
        assert [row["address"] for row in state["findings"]] == [ip_of(2)]
        shown = moorage.run("marathon", "status").output
        assert "steady" in shown
        assert "1 live, 1 unreachable" in shown
        process.send_signal(signal.SIGTERM)
        _, logs = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, logs
        assert "u:p" not in logs
        moorage.fails("marathon", "status")
    finally:
        process.kill()
        process.communicate()


def steady(moorage: CommandLine) -> list[dict[str, Any]]:
    deadline = time.monotonic() + PATIENCE
    while True:
        said = moorage.run("-o", "json", "marathon", "status")
        if said.exit_code == 0:
            states = moorage.json("marathon", "status")
            if states[0]["phase"] == "steady" and states[0]["last_pass"]:
                return states
        assert time.monotonic() < deadline, said.output
        time.sleep(0.2)
