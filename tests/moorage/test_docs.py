"""The documents name everything that there is."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import isolator.errors
import netmodules.cni.errors
from ipam.errors import MoorageError
from moorage.cli import cli
from moorage.config import KEYS, TABLES
from netmodules.labels import KNOWN

DOCS = Path(__file__).parent.parent.parent / "docs"
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
