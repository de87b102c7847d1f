"""The command line as a whole: help, errors, exit codes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from moorage.cli import cli
from tests.moorage.conftest import CommandLine


def commands(
    group: click.Group = cli, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group with the words that lead to it."""
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands())
LEAVES = [path for path, command in COMMANDS.items() if not isinstance(command, click.Group)]


def test_the_command_tree() -> None:
    assert sorted(" ".join(path) for path in LEAVES) == [
        "agent",
        "block list",
        "block release",
        "doctor",
        "endpoint list",
        "endpoint missing",
        "endpoint set-netgroups",
        "endpoint show",
        "endpoint trace",
        "ip check",
        "ip list",
        "ip release",
        "ip reservations",
        "ip reserve",
        "ip show",
        "ip unreserve",
        "lab down",
        "lab exec",
        "lab heal",
        "lab kill",
        "lab list",
        "lab partition",
        "lab rm",
        "lab run",
        "lab start",
        "lab status",
        "lab up",
        "marathon listen",
        "marathon reconcile",
        "marathon status",
        "network cni-config",
        "network create",
        "network delete",
        "network list",
        "network set",
        "network show",
        "node adopt",
        "node drain",
        "node list",
        "node remove",
        "node show",
        "policy show",
        "policy test",
        "status",
        "store dump",
        "store load",
        "store upgrade",
    ]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_a_summary_of_one_line_and_an_example(
    path: tuple[str, ...], moorage: CommandLine
) -> None:
    shown = moorage.ok(*path, "--help")
    assert "Example" in shown
    assert f"moorage {' '.join(path)}".strip() in shown.split("Example")[1]
    summary = (COMMANDS[path].help or "").splitlines()[0]
    assert summary.endswith((".", "first.", "from."))
    if path:
        assert COMMANDS[path].short_help


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_with_a_value_says_its_default_or_that_it_is_needed(path: tuple[str, ...]) -> None:
    silent = []
    for parameter in COMMANDS[path].params:
        if not isinstance(parameter, click.Option) or parameter.hidden or parameter.is_flag:
            continue
        record = parameter.get_help_record(click.Context(COMMANDS[path], show_default=True))
        said = record[1] if record else ""
        if not any(word in said for word in ("default", "required", "repeatable")):
            silent.append(parameter.name)
    assert silent == []


@pytest.mark.parametrize("path", [p for p in LEAVES if p != ("agent",)], ids=" ".join)
def test_every_command_prints_table_or_json(path: tuple[str, ...]) -> None:
    options = {name for parameter in COMMANDS[path].params for name in parameter.opts}
    assert {"-o", "--output", "--store", "--socket"} <= options


def test_version(moorage: CommandLine) -> None:
    assert moorage.ok("--version").startswith("moorage 0.1.0")


def test_python_m_moorage_is_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "moorage", "--help"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("Usage: moorage [OPTIONS] COMMAND")


def test_an_unknown_command_is_exit_2_with_a_guess(moorage: CommandLine) -> None:
    assert "No such command 'netwrok'" in moorage.fails("netwrok", code=2)


def test_an_argument_that_is_no_ip_is_exit_2(moorage: CommandLine) -> None:
    assert "'10.0.0' is no IP address; write for example" in moorage.fails("ip", "show", "10.0.0", code=2)


def test_a_store_that_is_no_store_is_one_line(moorage: CommandLine) -> None:
    assert moorage.fails("--store", "/var/store", "ip", "list").startswith(
        "--store: expected a store URL such as"
    )


def test_an_unknown_variable_is_one_line(moorage: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOORAGE_STROE", "sqlite:///x")
    assert "MOORAGE_STROE is unknown (did you mean MOORAGE_STORE?)" in moorage.fails("ip", "list")


def test_the_store_may_be_named_before_and_behind_the_command(moorage: CommandLine, tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/other.db"
    moorage.ok("--store", url, "network", "create", "web", "--pool", "10.64.0.0/24")
    assert len(moorage.json("network", "list", "--store", url)) == 1
    assert moorage.json("network", "list") == []


def test_a_store_that_does_not_exist_is_not_made_by_looking_at_it(
    moorage: CommandLine, tmp_path: Path
) -> None:
    missing = tmp_path / "none" / "store.db"
    assert str(missing) in moorage.fails("network", "list", "--store", f"sqlite://{missing}")
    assert not missing.parent.exists()


def test_json_may_be_asked_for_before_the_command(moorage: CommandLine) -> None:
    assert moorage.ok("-o", "json", "network", "list") == "[]\n"


def test_a_defect_is_one_line_that_says_how_to_see_more(
    moorage: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(store: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("ipam.networks.list_networks", broken)
    assert moorage.fails("network", "list").startswith("unexpected ZeroDivisionError: oh; this is a bug")
    assert isinstance(moorage.run("--debug", "network", "list").exception, ZeroDivisionError)
