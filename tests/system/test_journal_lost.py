"""A journal that is lost, older than it was, or of a full disk: nobody's interface and address are touched by that."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from isolator import alias_key
from isolator.journal import Journal
from isolator.model import Endpoint, EndpointKey
from isolator.netlink import unpinned
from moorage.lab import Container, LabNode
from moorage.lab.modules import ModulesContainer
from moorage.lab.mortal import command as mortal_agent
from tests import journals
from tests.system.conftest import LISTEN, assert_nothing_left, eventually, links

pytestmark = pytest.mark.kernel

LABELS = {
    "moorage.ip": "10.64.0.77",
    "moorage.mac": "02:00:00:00:00:77",
    "moorage.default-route": "true",
    "moorage.netgroups": "blue,green",
    "moorage.bandwidth.ingress": "10mbit",
    "moorage.bandwidth.egress": "20mbit",
    "tier": "front",
}
PORTS = [
    {"host_port": 31080, "container_port": 80},
    {"host_port": 31053, "container_port": 53, "protocol": "udp"},
]


@pytest.fixture
def open_node(node: LabNode) -> LabNode:
    """A node whose network allows and gives all that an endpoint can have."""
    node.cli(
        "network", "set", "web", "--allow-mac", "--allow-netgroup", "*", "--max-bandwidth", "1gbit",
        "--dns", "10.64.0.53", "--search", "svc.internal",
    )  # fmt: skip
    return node


def settled(node: LabNode) -> None:
    eventually(lambda: ((status := node.ask("status"))["outbox"], status["problem"]) == (0, ""))


@contextlib.contextmanager
def store_away(node: LabNode) -> Iterator[None]:
    """Nobody can write to the store: somebody else has it locked."""
    with contextlib.closing(
        sqlite3.connect(node.store.removeprefix("sqlite://"), isolation_level=None)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextlib.contextmanager
def serving(container: Container, port: int) -> Iterator[None]:
    """Something in the container that accepts connections."""
    command = (sys.executable, "-c", LISTEN, "tcp", "0.0.0.0", str(port))
    with container.namespace.start(*command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield
        finally:
            process.kill()


def connects(node: LabNode, port: int) -> bool:
    """Whether the node's mapped port leads to something that accepts."""
    probe = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
    return node.namespace.run(sys.executable, "-c", probe, check=False).returncode == 0


def buckets(node: LabNode) -> list[str]:
    shown = node.namespace.run("tc", "qdisc", "show").stdout
    return sorted(line.partition("dev ")[2] for line in shown.splitlines() if "tbf" in line)


def different(before: Endpoint, after: Endpoint) -> list[str]:
    """Names of the fields that are different. Several paths may lead to a namespace."""
    one, other = (replace(endpoint, netns=str(namespace(endpoint))) for endpoint in (before, after))
    return [f.name for f in fields(Endpoint) if getattr(one, f.name) != getattr(other, f.name)]


def namespace(endpoint: Endpoint) -> int | None:
    """The inode of its namespace, None if that is not known."""
    path, inode = unpinned(endpoint.netns)
    return inode or (os.stat(path).st_ino if path else None)


def is_whole(node: LabNode) -> bool:
    return node.cli("ip", "check", check=False).returncode == 0


@pytest.mark.parametrize("key", ["with aliases", "without the key of aliases"])
def test_every_field_of_an_endpoint_outlives_a_lost_journal(open_node: LabNode, key: str) -> None:
    node = open_node
    with (
        node.container() as rich,
        node.container() as plain,
        ModulesContainer(node.socket, network="web") as old,
    ):
        assert rich.add("web", labels=LABELS, port_mappings=PORTS).exit == 0
        assert plain.add("web").exit == 0
        answer = old.allocate(2, 1, labels=[{"key": "role", "value": "frontend"}])
        assert old.isolate(answer["ipv4"] + answer["ipv6"]) == {"error": None}
        settled(node)
        before, limits = journals.endpoints_of(node.state_dir), buckets(node)
        # Else a field that is lost could not be told from one that is not.
        unset = {
            f.name
            for f in fields(Endpoint)
            if getattr(before[EndpointKey(rich.id, "eth0")], f.name) == f.default
        }
        assert unset <= {"next_hop", "lost"}, "this test's endpoint needs a value there"
        assert not node.ask("status")["journal_rebuilt"]
        node.kill()
        journals.lose(node.state_dir)
        if key == "without the key of aliases":
            (node.state_dir / alias_key.NAME).unlink()
        node.start()
        eventually(lambda: node.ask("status")["journal_rebuilt"])
        eventually(lambda: all(e.netns for e in journals.endpoints_of(node.state_dir).values()))
        after = journals.endpoints_of(node.state_dir)
        assert {str(key): different(before[key], after[key]) for key in before} == {
            str(key): [] for key in before
        }
        assert node.ask("status")["lost"] == []
        with serving(rich, 80):
            assert connects(node, 31080)
        for line in limits:
            device = line.split()[0]
            node.namespace.run("tc", "qdisc", "del", "dev", device, "root", check=False)
        eventually(lambda: buckets(node) == limits)


def test_what_the_store_was_not_told_before_the_journal_was_lost_is_told_by_the_interface(
    open_node: LabNode,
) -> None:
    node = open_node
    with node.container() as rich, node.container() as plain:
        plain.add("web")
        settled(node)
        with store_away(node):
            ips = rich.add("web", labels={"moorage.netgroups": "blue"}, port_mappings=PORTS[:1]).ips
            assert plain.delete("web").exit == 0
            eventually(lambda: len(journals.endpoints_of(node.state_dir)) == 1)
            before = journals.endpoints_of(node.state_dir)
            node.kill()
            journals.lose(node.state_dir)
        node.start()
        settled(node)
        (after,) = journals.endpoints_of(node.state_dir).values()
        assert set(different(before[after.key], after)) <= {"netns", "since", "labels", "lost"}
        assert set(after.lost) <= {"labels"}
        assert after.since == pytest.approx(before[after.key].since, abs=2)
        assert node.namespace.pings(ips[4])
        assert node.namespace.pings(ips[6])
        held = {row["address"] for row in node.ask("ip", "list", "--state", "assigned")}
        assert held == set(ips.values())
        eventually(lambda: is_whole(node))
        with serving(rich, 80):
            assert connects(node, 31080)
        rich.delete("web", port_mappings=PORTS[:1])
        assert_nothing_left(node)


def test_an_interface_of_which_nobody_says_whose_it_is_stays_and_so_does_its_address(node: LabNode) -> None:
    with node.container() as container, node.container() as other:
        other.add("web")
        settled(node)
        other.delete("web")
        eventually(lambda: links(node) == [])
        with store_away(node):
            ips = container.add("web").ips
            node.kill()
            (name,) = links(node)
            node.namespace.run("ip", "link", "set", name, "alias", "")
            journals.lose(node.state_dir)
        node.start()
        settled(node)
        eventually(lambda: any(name in sentence for sentence in node.ask("status")["lost"]))
        assert name in node.cli("doctor", check=False).stdout
        assert links(node) == [name]
        assert node.namespace.pings(ips[4])
        assert {row["address"] for row in node.ask("ip", "list", "--state", "assigned")} == set(ips.values())
        container.delete("web")
        assert_nothing_left(node)


def test_a_journal_that_was_put_back_from_before_wins_over_nothing_that_happened_since(
    open_node: LabNode, tmp_path: Path
) -> None:
    node = open_node
    with (
        node.container() as ended,
        node.container() as changed,
        node.container() as again,
        node.container() as new,
    ):
        first = ended.add("web", labels={"moorage.ip": "10.64.0.77"}, port_mappings=PORTS[:1]).ips
        changed.add("web")
        again.add("web")
        settled(node)
        journals.copy(node.state_dir, tmp_path / "copy")
        assert ended.delete("web", port_mappings=PORTS[:1]).exit == 0
        node.cli("endpoint", "set-netgroups", changed.id, "blue")
        again.delete("web")
        settled(node)
        second = again.add("web", labels={"moorage.netgroups": "green"}).ips
        ips = new.add("web", port_mappings=PORTS[:1]).ips
        settled(node)
        expected = journals.endpoints_of(node.state_dir)
        node.kill()
        journals.put_back(node.state_dir, tmp_path / "copy")
        node.start()
        settled(node)
        assert node.ask("status")["journal_rebuilt"]
        eventually(lambda: journals.endpoints_of(node.state_dir).keys() == expected.keys())
        found = journals.endpoints_of(node.state_dir)
        assert {
            str(k): different(expected[k], replace(found[k], netns=expected[k].netns)) for k in expected
        } == {str(key): [] for key in expected}
        assert all(node.namespace.pings(ip) for ip in (*ips.values(), *second.values()))
        assert not node.namespace.pings(first[4])
        states = {row["address"]: row["state"] for row in node.ask("ip", "list")}
        assert states.get(first[4], "cooling") == "cooling"
        eventually(lambda: is_whole(node))
        with serving(new, 80):
            assert connects(node, 31080)


def test_an_add_that_only_an_older_journal_calls_unfinished_is_not_undone(tmp_path: Path) -> None:
    with LabNode("older", agent=mortal_agent(tmp_path / "steps")) as node:
        (tmp_path / "steps").mkdir()
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16")
        with node.container() as container, node.container() as other:
            (tmp_path / "steps" / "step").write_text("attach:wired")
            call = container.start_call("ADD", container.config("web"))
            eventually(lambda: not node.is_running)
            journals.copy(node.state_dir, tmp_path / "copy")
            node.start()
            assert container.finish_call(call).exit == 0
            for _ in range(2):
                other.add("web")
                settled(node)
                other.delete("web")
                settled(node)
            node.kill()
            journals.put_back(node.state_dir, tmp_path / "copy")
            node.start()
            eventually(lambda: [e["state"] for e in node.ask("endpoint", "list")] == ["attached"])
            container.delete("web")


def fill(disk: Path, node: LabNode, nobody: Container) -> Path:
    """No room is left, not even for the smallest commit: the journal's log has some of its own for a few."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(os.urandom(4096)):
            pass
    for _ in range(300):
        assert nobody.delete("web").exit == 0
        if "DEL goes on without its tombstone" in node.log.read_text():
            return filler
    raise AssertionError("the disk does not fill up")


def test_a_del_on_a_full_disk_is_done_after_a_restart_too_and_its_port_is_free(
    small_disk: Path, tmp_path: Path
) -> None:
    steps = tmp_path / "steps"
    steps.mkdir()
    with LabNode("full", agent=mortal_agent(steps)) as node:
        node.state_dir.symlink_to(small_disk)
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16")
        with node.container() as ended, node.container() as nobody, node.container() as next_:
            ips = ended.add("web", port_mappings=PORTS[:1]).ips
            settled(node)
            filler = fill(small_disk, node, nobody)
            (steps / "step").write_text("detach:withdrawn")
            call = ended.start_call("DEL", ended.config("web", port_mappings=PORTS[:1]))
            eventually(lambda: not node.is_running)
            call.kill()
            call.communicate()
            # As if it had been answered before: nobody asks a second time.
            for entry in (node.socket.parent / "spool").glob("*.del"):
                entry.unlink()
            filler.unlink()
            node.start()
            assert next_.add("web", port_mappings=PORTS[:1]).exit == 0
            eventually(lambda: len(links(node)) == 1)
            eventually(lambda: [e["container_id"] for e in node.ask("endpoint", "list")] == [next_.id])
            assert not node.namespace.pings(ips[4])
            eventually(lambda: is_whole(node))


def test_the_row_of_an_ended_endpoint_goes_as_soon_as_there_is_room(small_disk: Path) -> None:
    with LabNode("full") as node:
        node.state_dir.symlink_to(small_disk)
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16")
        with node.container() as ended, node.container() as nobody, node.container() as next_:
            ended.add("web", port_mappings=PORTS[:1])
            settled(node)
            filler = fill(small_disk, node, nobody)
            assert ended.delete("web", port_mappings=PORTS[:1]).exit == 0
            eventually(lambda: "release is not journalled" in node.log.read_text())
            filler.unlink()
            assert next_.add("web", port_mappings=PORTS[:1]).exit == 0
            eventually(lambda: len(journals.endpoints_of(node.state_dir)) == 1)
            node.kill()
            node.start()
            assert [e["container_id"] for e in node.ask("endpoint", "list")] == [next_.id]


def test_an_agent_starts_although_its_journal_has_two_endpoints_with_one_port() -> None:
    """As a disk left it that was full when the first one ended."""
    with LabNode("node") as node:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16")
        with node.container() as ended, node.container() as next_:
            ended.add("web", port_mappings=PORTS[:1])
            settled(node)
            (row,) = journals.endpoints_of(node.state_dir).values()
            ended.delete("web", port_mappings=PORTS[:1])
            eventually(lambda: links(node) == [])
            ips = next_.add("web", port_mappings=PORTS[:1]).ips
            settled(node)
            node.stop()
            journal = Journal(node.state_dir / "journal.db", "")
            journal.save_endpoint(row)
            journal.close()
            node.start()
            assert node.namespace.pings(ips[4])
            eventually(lambda: [e["container_id"] for e in node.ask("endpoint", "list")] == [next_.id])
            with serving(next_, 80):
                assert connects(node, 31080)


def test_a_log_removed_under_the_agent_is_noticed_and_nothing_is_forgotten_with_it(node: LabNode) -> None:
    with node.container() as container, node.container() as other:
        container.add("web")
        (node.state_dir / "journal.db-wal").unlink()
        eventually(lambda: "removed or replaced under the agent" in node.log.read_text())
        other.add("web", labels={"moorage.bandwidth.egress": "20mbit"})
        before = journals.endpoints_of(node.state_dir)
        assert len(before) == 2
        node.kill()
        node.start()
        assert journals.endpoints_of(node.state_dir) == before
