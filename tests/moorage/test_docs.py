"""The documents name everything that there is."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import isolator.errors
import netmodules.cni.errors
from ipam.errors import ANEW, MoorageError
from moorage.cli import cli
from moorage.config import KEYS, TABLES
from netmodules.labels import KNOWN

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
ERROR_MODULES = ("ipam.errors", isolator.errors.__name__, netmodules.cni.errors.__name__)


def codes(error: type[MoorageError] = MoorageError) -> set[int]:
    """The codes of all errors that an engine may be given."""
    own = {error.code} if error.__module__ in ERROR_MODULES else set()
    return own.union(*(codes(sub) for sub in error.__subclasses__()))


def test_every_error_code_is_explained() -> None:
    explained = re.findall(r"^\| (\d+) \|", (DOCS / "errors.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(codes()) == sorted(int(code) for code in explained)


@pytest.mark.parametrize("key", KEYS)
def test_every_setting_is_explained(key: str) -> None:
    flag = "--" + key.replace("_", "-")
    table, _, rest = key.partition("_")
    name = f"[{table}] {rest}" if table in TABLES else key
    assert f"| `{flag}` | `MOORAGE_{key.upper()}` | `{name}` |" in (DOCS / "operator.md").read_text("utf-8")


def test_every_command_is_explained() -> None:
    guide = (DOCS / "operator.md").read_text("utf-8")
    missing = []
    for name, command in cli.commands.items():
        for leaf in command.commands if isinstance(command, click.Group) else [""]:
            if not re.search(rf"`moorage {name}\b[^|]*{re.escape(leaf)}", guide):
                missing.append(f"{name} {leaf}")
    assert missing == []


@pytest.mark.parametrize("label", KNOWN)
def test_every_label_is_explained(label: str) -> None:
    text = (DOCS / "labels.md").read_text("utf-8")
    assert f"`{label}`" in text or (label.endswith(".egress") and "`.egress`" in text)


def test_who_is_told_to_take_another_state_directory_is_told_one_that_the_unit_lets_the_agent_write() -> None:
    unit = (ROOT / "packaging" / "moorage-agent.service").read_text("utf-8")
    assert "ProtectSystem=strict" in unit, "else any place would do"
    assert "StateDirectory=moorage" in unit
    texts = [
        *DOCS.rglob("*.md"),
        *(file for room in ("ipam", "isolator") for file in (ROOT / room).rglob("*.py")),
    ]
    nowhere = [
        f"{text.relative_to(ROOT)}: {line.strip()}"
        for text in texts
        for line in text.read_text("utf-8").splitlines()
        if re.search(r"(another|other) `?--state-dir|`--node` and `--state-dir`", line)
    ]
    assert nowhere == []
    assert ANEW == "with --state-dir /var/lib/moorage/NEWNAME"
