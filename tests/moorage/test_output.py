"""Tables and JSON."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from ipam.records import Address, AddressState, Label
from moorage.cli.output import Column, Output, age, fields, words

ROWS = [
    {"address": "10.64.0.5", "netgroups": ["a", "b"], "nat": True},
    {"address": "10.64.0.60", "netgroups": [], "nat": False},
]


def test_a_table_has_aligned_columns_and_no_trailing_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).rows(ROWS, [Column("address"), Column("netgroups"), Column("nat")], none="none")
    assert capsys.readouterr().out == (
        "ADDRESS     NETGROUPS  NAT\n"
        "10.64.0.5   a, b       yes\n"
        "10.64.0.60  -          no\n"
    )  # fmt: skip


def test_json_has_all_fields_whatever_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).rows(ROWS, [Column("address")], none="none")
    assert json.loads(capsys.readouterr().out) == ROWS


def test_nothing_is_an_empty_array_or_a_sentence_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).rows([], [], none="No network yet.")
    assert capsys.readouterr() == ("[]\n", "")
    Output(as_json=False).rows([], [], none="No network yet.")
    assert capsys.readouterr() == ("", "No network yet.\n")


def test_long_values_are_neither_cut_nor_wrapped_on_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).rows(
        [{"container": "c" * 300, "app": "d" * 300}], [Column("container"), Column("app")], ""
    )
    assert capsys.readouterr().out.splitlines()[1] == "c" * 300 + "  " + "d" * 300


@pytest.mark.parametrize(
    "text", ["[bold]x[/bold]", ":smile:", "[/]", "\\[x]", "ünïcode 容器", "a\tb\x1b[31m\n"]
)
def test_text_of_users_is_printed_not_obeyed(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=False).rows([{"app": text}], [Column("app")], none="")
    shown = text.replace("\t", "\\t").replace("\x1b", "\\x1b").replace("\n", "\\n")
    assert capsys.readouterr().out == f"APP\n{shown}\n"


def test_a_record_is_a_line_a_field_and_lists_of_objects_are_tables(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = {
        "node": "a",
        "store": {"reachable": True, "in_sync": False},
        "outbox": 0,
        "addresses": [
            {"network": "web", "family": 4, "warm": 8},
            {"network": "web", "family": 6, "cooling": 1},
        ],
        "problems": [],
    }
    Output(as_json=False).record(status)
    assert capsys.readouterr().out == (
        "node      a\n"
        "store     reachable yes, in_sync no\n"
        "outbox    0\n"
        "problems  -\n"
        "\n"
        "addresses:\n"
        "NETWORK  FAMILY  WARM  COOLING\n"
        "web      4       8     -\n"
        "web      6       -     1\n"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("", "-"),
        ([], "-"),
        ({}, "-"),
        (0, "0"),
        (False, "no"),
        ([1, 2], "1, 2"),
        ({"a": 1, "b": ["x", "y"]}, "a 1, b x, y"),
        (
            [{"key": "tier", "value": "web"}, {"key": "tier", "value": ""}, {"key": "bare"}],
            "tier=web, tier=, bare",
        ),
        ({"key": "k", "network": "web", "note": ""}, "key k, network web, note -"),
    ],
)
def test_values_in_words(value: Any, text: str) -> None:
    assert words(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (59, "59s"),
        (60, "1m"),
        (61, "1m1s"),
        (3600, "1h"),
        (3720, "1h2m"),
        (90000, "1d1h"),
        (-5, "0s"),
    ],
)
def test_ages(seconds: float, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    assert age(1_000_000.0 - seconds) == text


def test_no_time_is_no_age() -> None:
    assert age(0.0) == "-"


def test_the_fields_of_a_record_include_those_a_newer_version_wrote() -> None:
    record = Address(
        pool="p",
        state=AddressState.ASSIGNED,
        node="a",
        labels=[Label("tier", ""), Label("bare")],
        unknown={"zone": "z1"},
    )
    shown = fields(record)
    assert shown["labels"] == [{"key": "tier", "value": ""}, {"key": "bare"}]
    assert (shown["state"], shown["zone"]) == ("assigned", "z1")
    assert not {"v", "unknown"} & shown.keys()
