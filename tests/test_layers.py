"""The house stands as docs/design.md draws it: imports only go down, every room says what it is for.

moorage  ->  netmodules, marathon  ->  isolator  ->  ipam         (marathon uses ipam only)
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "ipam": {"ipam"},
    "isolator": {"isolator", "ipam"},
    "marathon": {"marathon", "ipam"},
    "netmodules": {"netmodules", "isolator", "ipam"},
    "moorage": {"moorage", "netmodules", "marathon", "isolator", "ipam"},
}
MODULES = sorted(path.relative_to(ROOT) for name in MAY_IMPORT for path in (ROOT / name).rglob("*.py"))
BUILD_MACHINE = re.compile(r"(?<![\w.:/-])/(?:home|root|work|Users)/[\w.-]+")


def imported(source: str) -> Iterator[str]:
    """The dotted names a module imports, wherever in it; ``from a import b`` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def test_imported_sees_every_form_of_import() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n    from .e import g\n    import h as i\n"
    assert sorted(imported(source)) == [".e.g", "a.b", "c.d", "h"]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_only_go_down(module: Path) -> None:
    allowed = MAY_IMPORT[module.parts[0]]
    used = {name.split(".")[0] for name in imported((ROOT / module).read_text("utf-8"))}
    assert "" not in used, "relative imports hide where a module stands"
    assert used & MAY_IMPORT.keys() <= allowed
    assert "tests" not in used


@pytest.mark.parametrize(
    ("hook", "may_import"),
    [
        ("netmodules/hook.py", {"netmodules.frame"}),
        ("netmodules/modules/hook.py", {"netmodules.frame", "netmodules.hook"}),
    ],
)
def test_hooks_import_only_the_standard_library_and_the_frame(hook: str, may_import: set[str]) -> None:
    names = set(imported((ROOT / hook).read_text("utf-8")))
    assert {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} <= may_import


def test_what_the_hooks_import_imports_nothing() -> None:
    for name in ("netmodules/frame.py", "netmodules/__init__.py", "netmodules/modules/__init__.py"):
        assert not list(imported((ROOT / name).read_text("utf-8"))), name


@pytest.mark.parametrize("module", [m for m in MODULES if not m.name.startswith("_")], ids=str)
def test_every_public_module_says_what_it_is_for(module: Path) -> None:
    assert ast.get_docstring(ast.parse((ROOT / module).read_text("utf-8")))


def test_every_package_is_installed() -> None:
    """A directory without __init__.py works from the checkout and is missing from the installation."""
    assert [str(m) for m in MODULES if not (ROOT / m.parent / "__init__.py").exists()] == []


def committed_files() -> list[Path]:
    """What is, or would be, committed; outside of a git checkout, all files."""
    try:
        listed = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "-z", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        names = [Path(name) for name in listed.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = [p.relative_to(ROOT) for p in ROOT.rglob("*")]
    made = re.compile(r"\.git|\.venv|\.\w+_cache|\.hypothesis|__pycache__|build|.*\.egg-info")
    return [
        ROOT / name
        for name in names
        if (ROOT / name).is_file() and not any(made.fullmatch(part) for part in name.parts)
    ]


def test_no_file_names_a_place_on_a_build_machine() -> None:
    found = []
    for path in committed_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        places = {*BUILD_MACHINE.findall(text)} | ({str(ROOT)} if str(ROOT) + "/" in text else set())
        found += [f"{path.relative_to(ROOT)}: {place}" for place in sorted(places)]
    assert found == []
