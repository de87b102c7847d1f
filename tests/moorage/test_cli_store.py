"""``moorage store`` between SQLite files; etcd: tests/ipam/store/test_dump.py."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from moorage.cli import cli
from tests.moorage.conftest import CommandLine


def test_a_dump_is_loaded_into_another_store(moorage: CommandLine, tmp_path: Path) -> None:
    created = moorage.json("network", "create", "web", "--pool", "10.64.0.0/24")
    file = tmp_path / "dump"
    said = moorage.json("store", "dump", str(file))
    assert (said["file"], said["schema"], said["count"]) == (str(file), 1, 3)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.glob(".dump*")] == []
    assert len(file.read_text().splitlines()) == 4
    other = f"sqlite://{tmp_path}/other.db"
    assert "3 entries of schema version 1 loaded" in moorage.ok("store", "load", str(file), "--store", other)
    assert moorage.json("network", "list", "--store", other) == [created]
    assert "holds networks or addresses already" in moorage.fails(
        "store", "load", str(file), "--store", other
    )


def test_a_dump_goes_through_a_pipe(moorage: CommandLine, tmp_path: Path) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    text = moorage.ok("store", "dump", "-")
    assert json.loads(text.splitlines()[0])["count"] == 3
    other = f"sqlite://{tmp_path}/other.db"
    result = CliRunner().invoke(
        cli, ["store", "load", "-", "--store", other], input=text, prog_name="moorage"
    )
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in moorage.json("network", "list", "--store", other)] == ["web"]


def test_files_that_cannot_be_used_are_named(moorage: CommandLine, tmp_path: Path) -> None:
    assert "cannot be written" in moorage.fails("store", "dump", str(tmp_path / "no" / "dump"))
    assert "cannot be read" in moorage.fails("store", "load", str(tmp_path / "none"))
    (tmp_path / "text").write_text("hello\n")
    other = tmp_path / "other.db"
    said = moorage.fails("store", "load", str(tmp_path / "text"), "--store", f"sqlite://{other}")
    assert "this is no dump of a store" in said
    assert not other.exists()


def test_there_is_nothing_to_upgrade_yet(moorage: CommandLine) -> None:
    moorage.ok("network", "create", "web", "--pool", "10.64.0.0/24")
    assert moorage.ok("store", "upgrade") == "the store is at version 1 already\n"
    assert moorage.json("store", "upgrade") == {"from": 1, "to": 1}
