"""App labels against what endpoints have and networks allow."""

from __future__ import annotations

import pytest

from ipam.records import Network
from marathon.facts import Assigned
from marathon.labels import plan

NETWORKS = {"web": Network(name="web", pools=[], allow_netgroups=["a", "b", "team-*"], allow_public=False)}


def address(*netgroups: str, app: str = "/web", number: int = 1, id: str = "") -> Assigned:
    return Assigned(
        state="assigned",
        node="n1",
        id=id or f"i{number}",
        network="web",
        app=app,
        netgroups=netgroups,
        ip=f"10.64.0.{number}",
    )


def wanted(text: str, *addresses: Assigned) -> list[tuple[str, tuple[str, ...]]]:
    found = plan(addresses, {"/web": {"MOORAGE_NETGROUPS": text}}, NETWORKS)
    return [(relabel.address.ip, relabel.netgroups) for relabel in found.relabel]


def test_an_endpoint_with_other_netgroups_is_given_those_of_its_app() -> None:
    assert wanted("a, b", address("web")) == [("10.64.0.1", ("a", "b"))]


def test_one_that_has_them_already_is_left_alone_whatever_their_order() -> None:
    assert wanted("a,b,a", address("b", "a")) == []
    assert wanted("web", address()) == [], "none recorded stands for the network's own"


def test_other_apps_are_left_alone() -> None:
    assert wanted("a", address("web", app="/db")) == []


def test_both_addresses_of_one_endpoint_are_changed_by_one_request() -> None:
    assert len(wanted("a", address("web", id="x"), address("web", id="x", number=2))) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a,secret", "does not allow netgroup secret"),
        ("public", "does not allow netgroup public"),
        ("", "must be 1 to 63 letters"),
        ("$(reboot)", "must be 1 to 63 letters"),
        (",".join(f"team-{n}" for n in range(65)), "at most 64"),
    ],
)
def test_what_is_not_allowed_or_makes_no_sense_is_told_and_changes_nothing(text: str, why: str) -> None:
    found = plan([address("web")], {"/web": {"MOORAGE_NETGROUPS": text}}, NETWORKS)
    assert (found.relabel, list(found.refused)) == ([], ["/web"])
    assert why in found.refused["/web"]


def test_a_misspelled_label_is_told() -> None:
    found = plan([], {"/web": {"MOORAGE_NETGROUP": "a"}}, NETWORKS)
    assert "known is MOORAGE_NETGROUPS" in found.refused["/web"]
