"""``moorage lab``: what it understands, and what it answers when there is no lab to work on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from isolator.identity import boot_id
from moorage.cli.lab import lab
from moorage.lab import labs, names
from moorage.lab.standing import Record
from tests.moorage.conftest import CommandLine


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root, on a machine without any lab."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(names, "BASE", tmp_path / "labs")
    monkeypatch.setattr(names, "NAMESPACES", tmp_path / "netns")


@pytest.fixture
def namespaces(tmp_path: Path) -> Path:
    """Where namespaces are found by name; none of them is a real one."""
    directory = tmp_path / "netns"
    directory.mkdir()
    return directory


def recorded(name: str, *, boot: str = "", complete: bool = True) -> Path:
    """What an `up` leaves in files."""
    directory = names.directory_of(name)
    directory.mkdir(parents=True)
    record = Record(
        name=name,
        nodes=2,
        etcd=1,
        fabric="vxlan",
        gateway=False,
        boot=boot or boot_id(),
        since=time.time(),
        complete=complete,
    )
    (directory / "lab.json").write_bytes(msgspec.json.encode(record))
    return directory


def parsed(command: str, *words: str) -> dict[str, Any]:
    """The arguments a command is called with."""
    found = lab.commands[command]
    return found.make_context(command, list(words)).params


# -- command lines


def test_options_stand_on_both_sides_of_the_node_and_end_where_the_command_begins() -> None:
    for words in (
        ("--network", "blue", "n1", "--label", "a=b", "ping", "-c", "3", "--network"),
        ("n1", "--network=blue", "--label", "a=b", "--", "ping", "-c", "3", "--network"),
        ("--network", "blue", "--label", "a=b", "--", "n1", "ping", "-c", "3", "--network"),
    ):
        found = parsed("run", *words)
        assert (found["node"], found["networks"], found["labels"]) == ("n1", ("blue",), ("a=b",)), words
        assert found["command"] == ("ping", "-c", "3", "--network"), words


def test_a_command_may_have_a_double_dash_of_its_own() -> None:
    assert parsed("exec", "n1", "--", "env", "--", "ls")["command"] == ("env", "--", "ls")
    assert parsed("exec", "n1", "env", "--", "ls")["command"] == ("env", "--", "ls")


def test_exec_without_a_command_is_understood(moorage: CommandLine) -> None:
    assert parsed("exec", "n1", "--lab", "demo") == {
        **parsed("exec", "--lab", "demo", "n1"),
        "place": "n1",
        "name": "demo",
        "command": (),
    }


def test_the_node_is_needed(moorage: CommandLine) -> None:
    assert "Missing argument 'NODE'" in moorage.fails("lab", "run", "--network", "blue", code=2)
    with pytest.raises(click.NoSuchOption):
        parsed("run", "--netwrok", "n1")


# -- what a lab needs


def test_it_needs_root(moorage: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "need root; use sudo" in moorage.fails("lab", "up")
    assert "Example" in moorage.ok("lab", "up", "--help")


def test_missing_programs_are_named_with_their_packages(
    moorage: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = moorage.fails("lab", "up")
    assert "a lab needs etcd" in said
    assert "apt-get install etcd-server etcd-client" in said
    assert names.all_labs() == []


@pytest.mark.parametrize("name", ["", "A", "a.b", "../x", "a" * 21, "-a", "a/b"])
def test_names_that_could_not_be_paths_and_namespaces_are_refused(moorage: CommandLine, name: str) -> None:
    assert "cannot be the name of a lab" in moorage.fails("lab", "up", "--lab", name)


# -- which lab


@pytest.mark.parametrize(
    "words", [("status",), ("down",), ("heal",), ("exec", "n1"), ("run", "n1"), ("rm", "c1")], ids=str
)
def test_without_a_lab_every_command_says_how_to_start_one(
    moorage: CommandLine, words: tuple[str, ...]
) -> None:
    assert moorage.fails("lab", *words) == "no lab is up; start one with `moorage lab up --nodes 3`"


def test_an_unknown_lab_is_answered_with_the_known_ones(moorage: CommandLine) -> None:
    recorded("a")
    recorded("b-2")
    assert moorage.fails("lab", "status", "--lab", "c") == "there is no lab 'c'; there is a, b-2"
    assert "there are 2 labs: a, b-2; say which" in moorage.fails("lab", "status")
    assert moorage.json("lab", "list") == [{"lab": "a"}, {"lab": "b-2"}]


def test_a_name_that_is_taken_is_refused(moorage: CommandLine) -> None:
    recorded("a")
    said = moorage.fails("lab", "up", "--lab", "a")
    assert said.startswith("a lab called a exists already; end it with `moorage lab down --lab a`")


def test_a_lab_that_did_not_come_up_completely_is_only_looked_at_and_taken_down(moorage: CommandLine) -> None:
    recorded("a", complete=False)
    assert moorage.json("lab", "status")["complete"] is False
    assert "lab a is not complete" in moorage.fails("lab", "run", "n1")
    assert "exists already, not all of it" in moorage.fails("lab", "up", "--lab", "a")
    assert moorage.ok("lab", "down") == "lab a is gone\n"
    assert not names.BASE.exists()


def test_a_lab_that_ended_with_the_machine_says_so_and_its_files_are_cleared_away(
    moorage: CommandLine,
) -> None:
    recorded("a", boot="an earlier one")
    assert "ended when this machine was restarted" in moorage.fails("lab", "status")
    assert moorage.ok("lab", "down") == "lab a is gone\n"
    assert names.all_labs() == []


def test_remains_without_a_record_are_found_by_name_and_cleared_away(
    moorage: CommandLine, namespaces: Path
) -> None:
    (namespaces / "mrg-a.n1").touch()
    (namespaces / "mrg-lab-0a0b0c-n1").touch()
    (namespaces / "somebody.else").touch()
    assert names.all_labs() == ["a"]
    assert "only remains of lab a are left" in moorage.fails("lab", "status")
    names.directory_of("a").mkdir(parents=True)
    assert "only remains of lab a are left" in moorage.fails("lab", "exec", "n1")


def test_the_remains_of_one_lab_are_not_those_of_another_whose_name_begins_alike(namespaces: Path) -> None:
    for name in ("mrg-a.n1", "mrg-a-b.n1", "mrg-a.web"):
        (namespaces / name).touch()
    assert names.all_labs() == ["a", "a-b"]
    found = {namespace.name for namespace in names.namespaces_of("a")}
    assert found == {"mrg-a.n1", "mrg-a.web"}


# -- which part of it


def test_unknown_parts_are_answered_with_the_known_ones(moorage: CommandLine) -> None:
    recorded("a")
    assert moorage.fails("lab", "kill", "n9") == "lab a has no node 'n9'; it has n1, n2, etcd0"
    assert moorage.fails("lab", "run", "etcd0") == "lab a has no node 'etcd0'; it has n1, n2"
    assert "no node 'gw'" in moorage.fails("lab", "partition", "n1", "gw")
    assert "it has none yet; start one with" in moorage.fails("lab", "rm", "web")
    assert "no node and no container 'web'; it has n1, n2, etcd0" in moorage.fails("lab", "exec", "web")
    assert "cannot be cut off from itself" in moorage.fails("lab", "partition", "n1", "n1")


def test_what_cannot_be_run_is_refused_before_anything_is_made(moorage: CommandLine) -> None:
    recorded("a")
    assert "no program 'no-such'" in moorage.fails("lab", "run", "n1", "no-such", "-x")
    assert "--wait needs a command" in moorage.fails("lab", "run", "n1", "--wait")
    assert "--label 'front' is no label" in moorage.fails("lab", "run", "n1", "--label", "front")
    assert "n1 is switched off" in moorage.fails("lab", "run", "n1")
    assert not (names.directory_of("a") / "containers").exists()


def test_a_command_waits_for_another_one_and_gives_up_with_a_reason(
    moorage: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded("a")
    monkeypatch.setattr(labs, "PATIENCE", 0.1)
    with labs.locked("a"):
        assert "another `moorage lab` command is at work on lab a" in moorage.fails("lab", "down")
    with labs.locked("a", shared=True), labs.locked("a", shared=True):
        pass
    assert moorage.ok("lab", "down") == "lab a is gone\n"
