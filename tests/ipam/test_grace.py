"""The time in which nothing new is taken, over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipam import grace
from ipam.grace import Grace
from isolator.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


def begun(path: Path, boot: str = "boot-1", at_least: float = 0.0) -> Grace:
    """What an agent that starts in that boot knows of it."""
    return Grace(Journal(path, boot), boot, at_least)


def test_a_restart_within_it_goes_on_with_what_is_left_and_waits_for_the_same_nodes(path: Path) -> None:
    begun(path).begin("the store is older", {"n1", "n2"})
    again = begun(path)
    assert 0 < again.left <= grace.SECONDS
    assert (again.why, again.awaited) == ("the store is older", {"n1", "n2"})


def test_in_another_boot_it_begins_anew_since_that_clock_says_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grace, "boottime", lambda: 10**15)
    begun(path).begin("why", ())
    monkeypatch.setattr(grace, "boottime", lambda: 5 * 10**9)
    assert begun(path, "boot-2").left == grace.SECONDS


def test_it_is_over_for_restarts_too_once_its_time_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = begun(path)
    one.begin("why", ())
    now = grace.boottime()
    monkeypatch.setattr(grace, "boottime", lambda: now + int(grace.SECONDS + 1) * 10**9)
    assert (one.left, begun(path).left, begun(path, "boot-2").left) == (0.0, 0.0, 0.0)


def test_it_is_over_for_restarts_too_once_all_nodes_have_asserted(path: Path) -> None:
    one = begun(path)
    one.begin("why", ())
    one.end()
    assert (one.left, begun(path).left) == (0.0, 0.0)


def test_a_pause_never_shortens_it(path: Path) -> None:
    one = begun(path)
    one.begin("why", {"n1"})
    one.pause("another reason", 5.0)
    assert (one.why, one.awaited) == ("why", {"n1"})
    assert one.left > 5.0


def test_it_lasts_as_long_as_addresses_cool_down(path: Path) -> None:
    one = begun(path, at_least=90.0)
    one.begin("why", ())
    assert 80.0 < one.left <= 90.0
