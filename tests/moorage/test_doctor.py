"""What `moorage doctor` makes of an agent's status."""

from __future__ import annotations

from typing import Any

import pytest

from ipam.errors import MoorageError
from isolator import sysctl
from moorage import doctor
from moorage.cli.session import Session

QUIET: dict[str, Any] = {"problem": "", "conflicts": [], "fabric": {"device": "mfbvxlan", "problems": []}}
TUNNEL = {"open": False, "addresses": 2, "unnamed": []}


def said(monkeypatch: pytest.MonkeyPatch, **status: Any) -> list[str]:
    monkeypatch.setattr(Session, "ask_agent", lambda *_: QUIET | status)
    return [finding.problem for finding in doctor.agent(Session())]


def test_an_agent_of_an_earlier_version_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch) == []


def test_an_endpoint_that_is_cut_off_is_told_with_what_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, conflicts=["c1/eth0"], cut_off=["c1/eth0 is cut off: why"]) == [
        "c1/eth0 is cut off: why"
    ]
    assert said(monkeypatch, conflicts=["c1/eth0"]) == ["c1/eth0 is cut off"], (
        "by an agent of an earlier version"
    )


def test_clones_and_endpoints_that_nobody_sees_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, identity=["a clone"], missing="have they ended?") == [
        "a clone",
        "have they ended?",
    ]


def test_a_journal_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, journal="the journal cannot be written") == [
        "the journal cannot be written; until then every ADD is refused"
    ]


@pytest.mark.parametrize(
    ("runs", "says"),
    [(True, "something changed it"), (False, "the agent turns it on when it starts")],
)
def test_forwarding_that_is_off_is_nobodys_doing_before_the_agent_starts(
    monkeypatch: pytest.MonkeyPatch, runs: bool, says: str
) -> None:
    def ask(*_: object) -> dict[str, Any]:
        if not runs:
            raise MoorageError("no agent answers")
        return QUIET

    monkeypatch.setattr(Session, "ask_agent", ask)
    monkeypatch.setattr(sysctl, "read", lambda _: "0")
    told = [finding.problem for finding in doctor.forwarding(Session())]
    assert [sentence.endswith(says) for sentence in told] == [True, True]


def test_a_tunnel_that_takes_anybodys_packets_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (sentence,) = said(monkeypatch, fabric=QUIET["fabric"] | {"tunnel": TUNNEL | {"open": True}})
    assert "takes packets from anybody" in sentence


def test_a_certificate_that_ends_soon_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "the client certificate /etc/moorage/node.pem expires in 3 days"
    assert said(monkeypatch, certificates=[sentence]) == [sentence]


def test_without_a_tunnel_nothing_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, fabric={"device": "", "tunnel": TUNNEL | {"open": True}}) == []


def test_an_address_that_no_node_has_any_more_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (sentence,) = said(monkeypatch, fabric={"device": "", "tunnel": TUNNEL | {"unnamed": ["198.18.0.9"]}})
    assert "198.18.0.9" in sentence


@pytest.mark.parametrize(("tracked", "told"), [(799, False), (800, True)])
def test_a_connection_table_that_runs_full_is_told_with_who_has_most(
    monkeypatch: pytest.MonkeyPatch, tracked: int, told: bool
) -> None:
    largest = [
        {"ip": "10.64.0.5", "count": 700, "endpoint": "c1/eth0"},
        {"ip": "192.0.2.9", "count": 1, "endpoint": ""},
    ]
    sentences = said(monkeypatch, connections={"tracked": tracked, "most": 1000, "largest": largest})
    assert [("c1/eth0 700, 192.0.2.9 1" in sentence) for sentence in sentences] == [True] * told


@pytest.mark.parametrize(
    ("url", "asks"),
    [
        ("etcd://10.0.0.1:2379", False),
        ("etcd://10.0.0.1:2379?ca=/etc/ca.pem", False),
        ("etcd://10.0.0.1:2379?user-file=/etc/user", True),
        ("etcd://10.0.0.1:2379?ca=/c&cert=/c&key=/k", True),
    ],
)
def test_whether_the_store_is_shown_who_asks(url: str, asks: bool) -> None:
    assert doctor.asks_for_login(url) is asks


def test_a_store_in_doubt_and_addresses_that_two_nodes_may_have_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said_of_both = said(monkeypatch, contested=["10.64.0.1 is"], grace={"seconds": 12.3, "why": "n1 found"})
    assert said_of_both[0] == "10.64.0.1 is"
    assert "for 12 s: n1 found" in said_of_both[1]
    assert said(monkeypatch, contested=[], grace={"seconds": 0.0, "why": ""}) == []
