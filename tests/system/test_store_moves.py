"""A store dumped and loaded into another one, under containers that go on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from moorage.lab import LabNode
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel

RUNBOOK = Path(__file__).parent.parent.parent / "docs" / "runbook.md"


def test_containers_go_on_with_a_loaded_store(node: LabNode) -> None:
    with node.container() as old, node.container() as new:
        ips = old.add("web").ips
        file = str(node.directory / "dump")
        assert "agents are running: node" in node.cli("store", "dump", file, check=False).stderr
        node.stop()
        assert node.ask("store", "dump", file)["count"] > 3
        node._store = f"sqlite://{node.directory}/other.db"
        node.cli("store", "load", file)
        node.start()
        eventually(lambda: node.ask("status")["problem"] == "")
        assert [row["state"] for row in node.ask("endpoint", "list")] == ["attached"]
        assert {row["address"] for row in node.ask("ip", "list", "--state", "assigned")} == {
            str(ip) for ip in ips.values()
        }
        assert node.namespace.pings(ips[4])
        assert new.add("web").exit == 0
        check = node.ask("ip", "check")
        assert (check["findings"], check["nodes_asked"]) == ([], 1)
        assert old.delete("web").exit == 0
        assert new.delete("web").exit == 0


def test_a_network_that_a_backup_does_not_know_is_made_again_by_what_the_check_says(node: LabNode) -> None:
    store, backup = Path(node.store.removeprefix("sqlite://")), node.directory / "backup"
    (written,) = re.findall(r"^python3 -c '(.+)'$", RUNBOOK.read_text("utf-8"), re.MULTILINE)
    script = written.replace("/var/lib/moorage/store.db", str(store)).replace(
        "/var/backups/moorage.db", str(backup)
    )
    node.namespace.run("python3", "-c", script)
    node.cli("network", "create", "late", "--pool", "10.65.0.0/24", "--pool", "fd65::/64")
    with node.container() as container:
        ips = container.add("late").ips
        node.stop()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{store}{suffix}").unlink(missing_ok=True)
        shutil.copy(backup, store)
        node.start()
        findings: list[dict[str, Any]] = []
        eventually(lambda: findings.extend(node.ask("ip", "check", check=False)["findings"]) or findings)
        assert {finding["subject"] for finding in findings} == {str(ip) for ip in ips.values()}
        assert {finding["evidence"]["container"] for finding in findings} == {f"{container.id}/eth0"}
        (command,) = {finding["repair"].split("`")[1] for finding in findings}
        node.cli(*command.split()[1:])
        eventually(lambda: node.ask("ip", "check", check=False)["findings"] == [])
        assert node.namespace.pings(ips[4])
        assert container.delete("late").exit == 0
