"""A command line on a SQLite store of its own, away from this machine's configuration."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ipam.store import Store, open_store
from moorage import config
from moorage.cli import cli


@dataclass
class CommandLine:
    """Runs commands as a user would."""

    store: str
    socket: Path

    def run(self, *arguments: str) -> Result:
        """A command, however it ends."""
        return CliRunner().invoke(cli, arguments, prog_name="moorage")

    def ok(self, *arguments: str) -> str:
        """The stdout of a command that works."""
        result = self.run(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """What a command prints with -o json."""
        return json.loads(self.ok(*arguments, "-o", "json"))

    def fails(self, *arguments: str, code: int = 1) -> str:
        """The one line on stderr of a command that does not work, without ``Error: ``."""
        result = self.run(*arguments)
        assert (result.exit_code, result.stdout) == (code, ""), result.output
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("Error: "), result.stderr
        assert "Traceback" not in result.stderr
        return last.removeprefix("Error: ")

    def on_store(self, action: Callable[[Store], Awaitable[None]]) -> None:
        """Do something to the store behind the command line's back."""

        async def opened() -> None:
            store = await open_store(self.store)
            try:
                await action(store)
            finally:
                await store.close()

        asyncio.run(opened())


@pytest.fixture
def moorage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """The command line, with the environment naming an empty store and a socket nobody listens on."""
    line = CommandLine(f"sqlite://{tmp_path}/store.db", tmp_path / "agent.sock")

    async def nothing(_: Store) -> None:
        """Opening it makes it."""

    line.on_store(nothing)
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "agent.toml")
    monkeypatch.setenv("MOORAGE_STORE", line.store)
    monkeypatch.setenv("MOORAGE_SOCKET", str(line.socket))
    return line
