"""The client side of asking the local agent."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ipam.errors import MoorageError, TryAgain
from moorage import admin
from netmodules import frame
from tests.moorage.agents import answering, serving
from tests.patience import PATIENCE


def test_the_answer_is_returned_and_the_request_has_all_fields(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with answering(path, {"status": (0, {"node": "a"})}) as seen:
        assert admin.call(str(path), "status", deep=True) == {"node": "a"}
    assert seen[0]["call"] == "admin"
    assert seen[0]["asked"] == {"call": "status", "deep": True}
    assert len(seen[0]["request"]) == 32
    assert seen[0]["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert int(seen[0]["started"]) > 0


def test_a_refusal_is_raised_with_the_agents_sentence(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        answering(path, {"status": (1, {"error": "not now; wait"})}),
        pytest.raises(MoorageError, match=r"^not now; wait$"),
    ):
        admin.call(str(path), "status")


def test_an_answer_longer_than_one_read_arrives_whole(tmp_path: Path) -> None:
    path = tmp_path / "s"
    endpoints = [{"container_id": "c" * 900, "n": n} for n in range(1000)]
    with answering(path, {"endpoints": (0, endpoints)}):
        assert admin.call(str(path), "endpoints") == endpoints


def test_no_socket_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(TryAgain) as caught:
        admin.call(str(tmp_path / "s"), "status")
    assert str(caught.value) == (
        f"no agent answers on {tmp_path}/s: start it with `moorage agent`, or name its socket with --socket"
    )


def test_a_socket_that_nobody_listens_on_any_more_says_the_same(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "s"))
    with pytest.raises(TryAgain, match="no agent answers on"):
        admin.call(str(tmp_path / "s"), "status")


@pytest.mark.parametrize(
    "reply", [b"", b"MRG1", b"HTTP/1.1 400 Bad Request\r\n", b"MRG1\0\0\0\x09\0\x04exit"]
)
def test_half_an_answer_is_an_error_not_a_crash(tmp_path: Path, reply: bytes) -> None:
    path = tmp_path / "s"
    with serving(path, lambda request: reply), pytest.raises(TryAgain, match="broke off its answer"):
        admin.call(str(path), "status")


def test_an_agent_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "TIMEOUT", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        with pytest.raises(TryAgain, match="did not answer within"):
            admin.call(str(tmp_path / "s"), "status")


def test_an_agent_that_others_wait_for_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as other:
        busy.bind(str(path))
        busy.listen(0)
        busy.settimeout(PATIENCE)
        other.connect(str(path))  # there is room for one

        def serve() -> None:
            time.sleep(0.2)
            busy.accept()[0].close()
            accepted, _ = busy.accept()
            with accepted, accepted.makefile("rb") as reading:
                reading.read(frame.payload_length(reading.read(frame.HEADER)))
                accepted.sendall(frame.encode({"exit": b"0", "stdout": b"[]"}))

        with ThreadPoolExecutor(1) as serving_it:
            serving_it.submit(serve)
            assert admin.call(str(path), "status") == []


def test_an_agent_that_accepts_nobody_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "TIMEOUT", 0.1)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as other:
        busy.bind(str(path))
        busy.listen(0)
        other.connect(str(path))
        with pytest.raises(TryAgain, match=r"accepted nobody for 0\.1 s"):
            admin.call(str(path), "status")
