"""A standing lab as a user has it: every command is a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moorage.lab import names
from moorage.lab.namespace import NAMESPACES
from moorage.lab.node import MOORAGE
from tests.system.conftest import eventually

pytestmark = [pytest.mark.kernel, pytest.mark.etcd, pytest.mark.xdist_group("lab")]


class User:
    """Somebody at a terminal, with one lab in mind."""

    def __init__(self) -> None:
        self.lab = f"t-{os.urandom(3).hex()}"

    def command(self, name: str, *words: str) -> list[str]:
        return [*MOORAGE, "lab", name, "--lab", self.lab, *words]

    def runs(self, name: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(self.command(name, *words), text=True, capture_output=True)
        assert ended.returncode == 0 or not check, ended.stderr
        return ended

    def json(self, name: str, *words: str) -> Any:
        return json.loads(self.runs(name, "-o", "json", *words).stdout)

    def fails(self, name: str, *words: str) -> str:
        ended = self.runs(name, *words, check=False)
        assert ended.returncode == 1, ended
        return ended.stderr.removeprefix("Error: ").strip()

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {row["node"]: row for row in self.json("status")["nodes"]}

    def containers(self) -> dict[str, dict[str, Any]]:
        return {row["container"]: row for row in self.json("status")["containers"]}

    def pings(self, place: str, ip: str) -> bool:
        return self.runs("exec", place, "ping", "-n", "-c", "1", "-W", "1", ip, check=False).returncode == 0

    def left(self) -> list[str]:
        """What can be seen of the lab."""
        found = [str(path) for path in NAMESPACES.glob(f"mrg-{self.lab}.*")]
        directory = names.directory_of(self.lab)
        found += [str(directory)] if directory.exists() else []
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and str(directory) in _command_line(process):
                found.append(_command_line(process))
        return found


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    """With a lab of two nodes and a gateway, which stands until the last test."""
    user = User()
    user.runs("up", "--nodes", "2", "--gateway")
    yield user
    user.runs("down")
    assert user.left() == []


def test_status_shows_every_part_as_running(user: User) -> None:
    status = user.json("status")
    assert [(row["node"], row["agent"], row["problem"]) for row in status["nodes"]] == [
        ("n1", "running", None),
        ("n2", "running", None),
        ("gw", "running", None),
    ]
    assert [(row["member"], row["state"]) for row in status["etcd"]] == [("etcd0", "running")]
    assert status["partitions"] == []
    table = user.runs("status").stdout
    assert "NODE  AGENT" in table


def test_a_container_joins_by_the_hook_runs_its_command_and_leaves(user: User) -> None:
    row = user.json("run", "n1", "--name", "web", "--network", "blue", "--network", "green", "sleep", "600")
    try:
        assert list(row["addresses"]) == ["blue", "green"]
        assert [len(ips) for ips in row["addresses"].values()] == [2, 2]
        (pid,) = [row["pid"] for row in user.containers().values()]
        assert Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
        assert user.pings("n1", row["addresses"]["green"][1])
        assert user.nodes()["n1"]["endpoints"] == 2
        inside = user.runs("exec", row["id"][:8], "ip", "-o", "address").stdout
        assert row["addresses"]["blue"][0] in inside
        assert "has a container web already" in user.fails("run", "n2", "--name", "web")
        assert "n1 is a machine of lab" in user.fails("run", "n2", "--name", "n1")
    finally:
        user.runs("rm", "web")
    assert user.containers() == {}
    assert not Path(f"/proc/{pid}/ns/net").exists()
    eventually(lambda: user.nodes()["n1"]["endpoints"] == 0)


def test_containers_reach_each_other_across_nodes_and_the_gateway_reaches_them(user: User) -> None:
    one = user.json("run", "n1", "--name", "one")
    two = user.json("run", "n2", "--name", "two")
    for place, row in (("one", two), ("two", one), ("gw", one), ("gw", two), ("n2", one)):
        for ip in row["addresses"]["blue"]:
            eventually(lambda place=place, ip=ip: user.pings(place, ip))
    assert "is a gateway" in user.fails("run", "gw")
    user.runs("rm", "one", "two")


def test_a_command_that_is_waited_for_gives_its_exit_code_and_takes_its_container_with_it(
    user: User,
) -> None:
    ended = user.runs("run", "n1", "--wait", "--", "sh", "-c", "ip -br link; exit 7", check=False)
    assert ended.returncode == 7
    assert "eth0@" in ended.stdout
    assert user.containers() == {}


def test_a_container_that_its_node_refuses_leaves_nothing(user: User) -> None:
    before = sorted(NAMESPACES.glob(f"mrg-{user.lab}.*"))
    assert "c1 cannot join nowhere on n1: " in user.fails("run", "n1", "--network", "nowhere")
    said = user.fails(
        "run", "n1", "--network", "blue", "--network", "green", "--label", "moorage.ip=10.64.9.9"
    )
    assert "c1 cannot join green on n1: " in said
    assert user.containers() == {}
    assert sorted(NAMESPACES.glob(f"mrg-{user.lab}.*")) == before


def test_labels_reach_the_network(user: User) -> None:
    labels = ("--label", "moorage.ip=10.64.7.7", "--label", "moorage.netgroups=front,public")
    row = user.json("run", "n1", *labels)
    assert row["addresses"]["blue"][0] == "10.64.7.7"
    shown = user.runs("exec", "n1", "moorage", "endpoint", "list", "-o", "json").stdout
    assert [endpoint["netgroups"] for endpoint in json.loads(shown)] == [["front", "public"]]
    user.runs("rm", row["container"])


def test_moorage_on_a_node_is_that_nodes_and_etcdctl_on_a_member_is_that_members(user: User) -> None:
    assert json.loads(user.runs("exec", "n2", "moorage", "status", "-o", "json").stdout)["node"] == "n2"
    assert "198.18.0.201:2379" in user.runs("exec", "etcd0", "etcdctl", "member", "list").stdout
    assert user.runs("exec", "n1", "sh", "-c", "exit 3", check=False).returncode == 3


def test_containers_go_on_without_their_agent_and_the_next_one_finds_them(user: User) -> None:
    row = user.json("run", "n1", "--name", "web")
    ip = row["addresses"]["blue"][0]
    user.runs("kill", "n1")
    assert user.nodes()["n1"]["agent"] == "killed"
    assert user.pings("n1", ip)
    assert "the agent of n1 does not run" in user.fails("kill", "n1")
    user.runs("rm", "web")
    assert user.containers() == {}
    user.runs("start", "n1")
    assert "the agent of n1 runs already" in user.fails("start", "n1")
    eventually(lambda: user.nodes()["n1"]["endpoints"] == 0)


def test_a_machine_dies_with_its_containers_and_comes_back_without_them(user: User) -> None:
    user.runs("run", "n2", "--name", "lost", "--", "sleep", "600")
    user.runs("run", "n1", "--name", "kept")
    pid = user.containers()["lost"]["pid"]
    assert "lost with it" in user.runs("kill", "n2", "--power").stdout
    assert not Path(f"/proc/{pid}/ns/net").exists()
    assert list(user.containers()) == ["kept"]
    assert user.nodes()["n2"]["agent"] == "switched off"
    for words in (("run", "n2"), ("exec", "n2", "true"), ("kill", "n2", "--power")):
        assert "n2 is switched off" in user.fails(*words)
    user.runs("start", "n2")
    eventually(lambda: user.nodes()["n2"]["endpoints"] == 0)
    new = user.json("run", "n2", "--name", "new")
    assert user.pings("n2", new["addresses"]["blue"][0])
    user.runs("rm", "kept", "new")


def test_a_lab_is_not_taken_down_from_within(user: User) -> None:
    words = user.command("down")
    assert "runs inside" in user.fails("exec", "n1", *words)
    assert {row["agent"] for row in user.nodes().values()} == {"running"}


def test_a_member_of_etcd_is_killed_and_started(user: User) -> None:
    user.runs("kill", "etcd0")
    status = user.json("status")
    assert [row["state"] for row in status["etcd"]] == ["killed"]
    assert {row["blocks"] for row in status["nodes"]} == {None}
    assert "unknown" in user.runs("status").stdout
    assert "etcd0 is no node" in user.fails("kill", "etcd0", "--power")
    user.runs("start", "etcd0")
    eventually(lambda: all(not row["problem"] for row in user.nodes().values()))
    assert user.pings("n1", "198.18.0.201")


def test_a_partition_is_a_cut_wire_until_it_is_healed(user: User) -> None:
    assert user.pings("n1", "198.18.0.2")
    user.runs("partition", "n2", "n1")
    assert user.json("status")["partitions"] == [{"between": "n1", "and": "n2"}]
    assert not user.pings("n1", "198.18.0.2")
    assert user.pings("n1", "198.18.0.201")
    assert user.json("heal")["healed"] == [["n1", "n2"]]
    assert user.pings("n1", "198.18.0.2")


def test_two_labs_stand_side_by_side_and_one_ends_alone(user: User) -> None:
    other = User()
    other.runs("up", "--nodes", "1", "--fabric", "hostgw")
    try:
        other.runs("run", "n1", "--name", "web", "--", "sleep", "600")
        assert user.containers() == {}
        listed = subprocess.run([*MOORAGE, "lab", "list"], text=True, capture_output=True).stdout
        assert {user.lab, other.lab} <= set(listed.split())
        assert "exists already" in other.fails("up", "--nodes", "1")
    finally:
        other.runs("down")
    assert other.left() == []
    assert {row["agent"] for row in user.nodes().values()} == {"running"}


def test_a_killed_up_is_taken_down_by_name(user: User) -> None:
    broken = User()
    with subprocess.Popen(broken.command("up", "--nodes", "3"), stderr=subprocess.PIPE) as up:
        agent = names.directory_of(broken.lab) / "n2" / "agent.pid"
        eventually(agent.exists)
        up.kill()
    try:
        assert broken.json("status")["complete"] is False
        assert "is not complete" in broken.fails("run", "n1")
        assert "not all of it" in broken.fails("up")
    finally:
        broken.runs("down")
    assert broken.left() == []


def test_an_up_that_is_ended_leaves_nothing(user: User) -> None:
    ended = User()
    with subprocess.Popen(ended.command("up", "--nodes", "3"), stderr=subprocess.PIPE) as up:
        eventually((names.directory_of(ended.lab) / "n1" / "agent.pid").exists)
        up.terminate()
        assert up.wait(60) == 128 + 15
    assert ended.left() == []


def test_a_lab_whose_files_were_removed_by_hand_is_still_taken_down(user: User) -> None:
    lost = User()
    lost.runs("up", "--nodes", "1")
    lost.runs("run", "n1", "--name", "web", "--", "sleep", "600")
    pids = [row["pid"] for row in (*lost.nodes().values(), *lost.containers().values())]
    subprocess.run(["rm", "-rf", names.directory_of(lost.lab)], check=True)
    assert "only remains" in lost.fails("status")
    lost.runs("down")
    assert lost.left() == []
    eventually(lambda: not any(Path(f"/proc/{pid}/ns/net").exists() for pid in pids))
    assert f"there is no lab {lost.lab!r}" in lost.fails("down")
