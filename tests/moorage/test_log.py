"""Logs: where they go, what they look like, what they never contain."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from moorage import log


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers, root.level
    yield
    root.handlers, root.level = before
    structlog.reset_defaults()


def test_an_event_is_one_json_object_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", "json")
    structlog.get_logger("ipam.holder").info("address lent", ip="10.64.0.5", labels=[("a", "b")])
    out, err = capsys.readouterr()
    event = json.loads(err)
    assert out == ""
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "address lent",
        "logger": "ipam.holder",
        "level": "info",
        "ip": "10.64.0.5",
        "labels": [["a", "b"]],
    }


def test_what_libraries_log_looks_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", "json")
    logging.getLogger("pyroute2").warning("odd message %d", 7)
    event = json.loads(capsys.readouterr().err)
    assert (event["event"], event["logger"], event["level"]) == ("odd message 7", "pyroute2", "warning")


def test_what_is_below_the_level_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("warning", "console")
    structlog.get_logger("a").info("quiet")
    logging.getLogger("b").info("quiet")
    assert capsys.readouterr().err == ""


def test_an_exception_is_part_of_its_event(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", "json")
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        structlog.get_logger("a").exception("task died")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "RuntimeError: boom" in json.loads(lines[0])["exception"]


def test_the_console_form_is_one_line_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", "console")
    structlog.get_logger("a").warning("store away", why="refused")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "store away" in err
    assert "why=refused" in err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("password", "hunter2"),
        ("auth_token", "hunter2"),
        ("url", "etcd://root:hunter2@10.0.0.1:2379"),
        ("url", "https://hunter2@marathon/v2"),
    ],
)
def test_secrets_are_never_written(capsys: pytest.CaptureFixture[str], name: str, value: str) -> None:
    log.configure("info", "json")
    structlog.get_logger("a").info("connected", **{name: value})
    err = capsys.readouterr().err
    assert "hunter2" not in err
    assert "***" in err
