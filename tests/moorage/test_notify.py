"""sd_notify."""

from __future__ import annotations

import socket
import uuid
from pathlib import Path

import pytest

from moorage.notify import READY, notify


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_the_state_reaches_the_service_manager(tmp_path: Path, kind: str) -> None:
    name = str(tmp_path / "n") if kind == "path" else f"@moorage-test-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(5)
        manager.bind(name.replace("@", "\0"))
        assert notify(READY, {"NOTIFY_SOCKET": name})
        assert manager.recv(100) == b"READY=1"


def test_without_a_service_manager_nothing_happens() -> None:
    assert not notify(READY, {})


def test_a_service_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert not notify(READY, {"NOTIFY_SOCKET": str(tmp_path / "gone")})
