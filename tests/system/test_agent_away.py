"""Calls while the agent is down, and what a restart makes of them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from moorage.lab import LabNode
from netmodules.hook import WINDOW
from tests import journals
from tests.patience import PATIENCE
from tests.system.conftest import assert_nothing_left, eventually, links, routes

pytestmark = pytest.mark.kernel


def spooled(node: LabNode) -> list[str]:
    return [path.name for path in (node.socket.parent / "spool").glob("*.del")]


def test_a_del_without_an_agent_returns_at_once_and_is_done_when_it_is_back(node: LabNode) -> None:
    with node.container() as container:
        container.add("web")
        node.kill()
        begun = time.monotonic()
        answer = container.delete("web")
        assert (answer.exit, answer.stdout) == (0, "")
        assert time.monotonic() - begun < WINDOW / 2
        assert len(spooled(node)) == 1
        node.start()
        assert_nothing_left(node)
        assert spooled(node) == []


def test_a_namespace_deleted_before_its_del_is_no_obstacle(node: LabNode) -> None:
    with node.container() as container:
        container.add("web")
        node.kill()
    assert container.delete("web").exit == 0
    node.start()
    assert_nothing_left(node)
    assert container.delete("web").exit == 0


def test_a_spooled_del_leaves_a_newer_endpoint_of_the_same_name_alone(node: LabNode) -> None:
    with node.container() as container:
        container.add("web")
        node.kill()
        container.delete("web")
        add = container.start_call("ADD", container.config("web"))
        time.sleep(0.2)
        node.start()
        ips = container.finish_call(add).ips
        assert node.namespace.pings(ips[4])
        eventually(lambda: spooled(node) == [])
        assert [e["state"] for e in node.ask("endpoint", "list")] == ["attached"]
        container.delete("web")


def test_running_containers_keep_talking_while_the_agent_is_down_and_restarted(node: LabNode) -> None:
    with node.container() as a, node.container() as b:
        a.add("web")
        ips = b.add("web").ips
        before = (links(node), routes(node))
        ping = a.namespace.start(
            "ping", "-n", "-i", "0.01", "-c", "150", "-W", "10", ips[4], stdout=subprocess.PIPE
        )
        node.kill()
        node.start()
        stdout, _ = ping.communicate(timeout=PATIENCE)
        assert b" 0% packet loss" in stdout, stdout.decode()
        assert (links(node), routes(node)) == before
        assert len(node.ask("endpoint", "list")) == 2
        for each in (a, b):
            each.delete("web")


def test_a_lost_journal_is_rebuilt_from_kernel_and_store(node: LabNode) -> None:
    with node.container() as container:
        ips = container.add("web").ips
        eventually(lambda: len(node.ask("ip", "list", "--state", "assigned")) == 2)
        node.kill()
        journals.lose(node.state_dir)
        node.start()
        assert [e["container_id"] for e in node.ask("endpoint", "list")] == [container.id]
        assert node.namespace.pings(ips[4])
        container.delete("web")
        assert_nothing_left(node)


def test_a_corrupt_journal_is_kept_aside_and_rebuilt(node: LabNode) -> None:
    with node.container() as container:
        ips = container.add("web").ips
        eventually(lambda: len(node.ask("ip", "list", "--state", "assigned")) == 2)
        node.kill()
        journal = node.state_dir / "journal.db"
        Path(f"{journal}-wal").unlink(missing_ok=True)
        journal.write_bytes(b"this is no database" * 500)
        node.start()
        assert "journal is damaged" in node.log.read_text()
        assert list(node.state_dir.glob("journal.db.corrupt-*"))
        assert node.namespace.pings(ips[4])
        assert [e["container_id"] for e in node.ask("endpoint", "list")] == [container.id]
        container.delete("web")
        assert_nothing_left(node)


def test_a_rebuilt_journal_knows_the_mac_that_a_container_chose(node: LabNode) -> None:
    """Neither journal nor store say it then; from another one the firewall would let nothing pass."""
    node.cli("network", "set", "web", "--allow-mac")
    with node.container("a") as a, node.container("b") as b:
        ips = a.add("web", labels={"moorage.mac": "02:00:00:00:00:77"}).ips
        b.add("web")
        eventually(lambda: node.ask("status")["outbox"] == 0)
        node.kill()
        journals.lose(node.state_dir)
        node.start()
        eventually(lambda: len(node.ask("endpoint", "list")) == 2)
        assert node.ask("endpoint", "show", f"{a.id}/eth0")["mac"] == "02:00:00:00:00:77"
        assert all(b.namespace.pings(ip) for ip in ips.values())


def test_a_corrupt_store_is_refused_with_the_remedy_and_not_emptied(node: LabNode) -> None:
    node.stop()
    store = Path(node.store.removeprefix("sqlite://"))
    for suffix in ("-wal", "-shm"):
        Path(f"{store}{suffix}").unlink(missing_ok=True)
    store.write_bytes(b"this is no database" * 500)
    node.launch()
    eventually(lambda: not node.is_running)
    assert str(store) in node.log.read_text()
    assert store.read_bytes().startswith(b"this is no database")


def test_with_a_full_disk_add_is_refused_and_del_still_works(small_disk: Path) -> None:
    with LabNode("full") as node:
        state = node.state_dir
        state.symlink_to(small_disk)
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16")
        with node.container() as first, node.container() as second:
            first.add("web")
            filler = small_disk / "filler"
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(os.urandom(4096)):
                        pass
                except OSError:
                    pass
            answers = []
            # The journal's log has room of its own for a few commits.
            for _ in range(200):
                answers.append(second.add("web"))
                if answers[-1].exit:
                    break
                assert second.delete("web").exit == 0
            assert answers[-1].json["code"] == 11
            assert "journal" in answers[-1].json["msg"]
            status = second.status("web").json
            assert (status["code"], "journal" in status["msg"]) == (50, True)
            assert "cannot be written" in node.ask("status")["journal"]
            findings = {found["check"]: found["problem"] for found in node.ask("doctor", check=False)}
            assert f"{state}/journal.db cannot be written" in findings["journal"]
            assert first.delete("web").exit == 0
            eventually(lambda: links(node) == [])
            filler.unlink()
            eventually(lambda: node.ask("status")["journal"] == "")
            assert second.add("web").exit == 0
            second.delete("web")
            assert_nothing_left(node)


def test_sigterm_ends_the_agent_with_0_and_leaves_containers_running(node: LabNode) -> None:
    with node.container() as container:
        ips = container.add("web").ips
        assert node.stop() == 0
        assert node.namespace.pings(ips[4])
        assert not node.socket.exists()
        node.start()
        container.delete("web")
        assert_nothing_left(node)


def test_an_address_is_released_only_when_nobody_carries_it_unless_forced(node: LabNode) -> None:
    with node.container() as container:
        living = container.namespace.start("sleep", "1000")
        ip = container.add("web").ips[4]
        eventually(lambda: len(node.ask("ip", "list", "--state", "assigned")) == 2)
        refused = node.cli("ip", "release", ip, check=False)
        assert refused.returncode == 1
        assert container.id in refused.stdout + refused.stderr
        assert node.namespace.pings(ip)
        node.cli("ip", "release", ip, "--force")
        assert_nothing_left(node)
        living.kill()
        living.wait()


def test_a_namespace_without_a_process_carries_its_address_no_longer(node: LabNode) -> None:
    with node.container() as container:
        living = container.namespace.start("sleep", "1000")
        ip = container.add("web").ips[4]
        eventually(lambda: len(node.ask("ip", "list", "--state", "assigned")) == 2)
        living.kill()
        living.wait()
        # Its handle is still mounted, so that namespace and interface are there.
        assert node.namespace.pings(ip)
        node.cli("ip", "release", ip)
        assert_nothing_left(node)


def test_check_finds_and_repairs_what_was_planted(node: LabNode) -> None:
    with node.container() as container:
        container.add("web")
        node.namespace.run("ip", "route", "add", "10.64.200.1/32", "dev", "lo", "proto", "157")
        node.namespace.run("ip", "link", "add", "mrgplanted", "type", "bridge")
        found = node.cli("ip", "check", check=False)
        assert found.returncode == 1
        assert "10.64.200.1" in found.stdout
        assert "mrgplanted" in found.stdout
        node.cli("ip", "check", "--repair", check=False)
        assert node.cli("ip", "check").returncode == 0
        container.delete("web")


def test_the_firewall_is_restored_after_somebody_flushed_it(node: LabNode) -> None:
    with node.container() as a, node.container() as b:
        a.add("web")
        ips = b.add("web").ips
        node.namespace.run("nft", "flush", "ruleset")
        eventually(lambda: "mrg" in node.namespace.run("nft", "list", "ruleset").stdout)
        assert a.namespace.pings(ips[4])
        for each in (a, b):
            each.delete("web")
        assert_nothing_left(node)


def test_endpoints_of_an_earlier_boot_are_released_at_start(node: LabNode) -> None:
    with node.container() as container:
        container.add("web")
        eventually(lambda: len(node.ask("ip", "list", "--state", "assigned")) == 2)
        node.stop()

    # What a reboot leaves: a journal and a store written before it, and no interface.
    def earlier(endpoint: dict[str, Any]) -> None:
        endpoint["asked"]["boot_id"] = "an earlier boot"

    journals.edit(node.state_dir, earlier, boot_id="an earlier boot")
    node.start()
    assert_nothing_left(node)
    assert "earlier boot released" in node.log.read_text()


def test_the_service_manager_is_told_when_the_agent_serves_and_when_it_ends(node: LabNode) -> None:
    node.stop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE)
        address = node.directory / "notify"
        manager.bind(str(address))
        node.launch(NOTIFY_SOCKET=str(address))
        assert manager.recv(100) == b"READY=1"
        assert node.answers()
        node.stop()
        assert manager.recv(100) == b"STOPPING=1"


def test_flushed_elements_are_restored_although_the_table_is_there(node: LabNode) -> None:
    with node.container("a") as a, node.container("b") as b:
        a.add("web")
        ips = b.add("web").ips
        for family in (4, 6):
            node.namespace.run("nft", "flush", "set", "inet", "moorage", f"senders{family}")
        assert not a.namespace.pings(ips[4], wait=1)
        eventually(lambda: a.namespace.pings(ips[4], wait=1) and a.namespace.pings(ips[6], wait=1))
        assert "firewall sets did not hold what they should" in node.log.read_text()
        for each in (a, b):
            each.delete("web")


def test_an_add_right_after_a_flush_succeeds(node: LabNode) -> None:
    with node.container() as container:
        node.namespace.run("nft", "flush", "ruleset")
        answer = container.add("web")
        assert answer.exit == 0, answer.stdout
        assert node.namespace.pings(answer.ips[4])
        container.delete("web")


def test_a_lost_journal_costs_no_check(node: LabNode) -> None:
    with node.container() as container:
        config = {"cniVersion": "1.0.0", "name": "web", "type": "moorage-cni", "socket": str(node.socket)}
        result = container.call("ADD", config).json
        eventually(lambda: len(node.ask("ip", "list", "--state", "assigned")) == 2)
        node.kill()
        journals.lose(node.state_dir)
        node.start()
        check = container.call("CHECK", {**config, "prevResult": result})
        assert (check.exit, check.stdout) == (0, "")
        container.call("DEL", config)
        assert_nothing_left(node)
