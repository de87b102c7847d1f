"""The hook's two programs, laid out as they are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.netmodules.fakes import CHECKOUT, NATIVE, SCRIPT


@pytest.fixture
def agent_socket(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir(mode=0o700)
    return tmp_path / "run" / "agent.sock"


@pytest.fixture(scope="session")
def native_hook(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native program, with the Python one and an interpreter beside it."""
    home = tmp_path_factory.mktemp("installed")
    (home / "bin").mkdir()
    (home / "bin" / "python3").symlink_to(sys.executable)
    (home / "netmodules").symlink_to(CHECKOUT / "netmodules")
    shutil.copy(SCRIPT, home / "bin")
    program = home / "bin" / "moorage-cni"
    compiler = ["cc", f"@{NATIVE / 'flags'}", "-Werror"]
    subprocess.run([*compiler, "-o", program, NATIVE / "moorage-cni.c"], check=True)
    return program


@pytest.fixture(params=["native", "python"])
def hook_program(request: pytest.FixtureRequest, native_hook: Path) -> Path:
    """What an engine executes, both forms of it."""
    return native_hook if request.param == "native" else native_hook.with_name("moorage-cni-py")
