"""Who may call whom, against the one-line definition; and that names are never rule text."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from ipam.records import Network
from isolator.policy import ruleset
from isolator.policy.book import Admission, Book
from isolator.policy.callers import Caller, Isolation, callers, isolation_of, judge
from isolator.policy.names import chain_of_callers, set_of_netgroup

HERE, AWAY = ip_address("10.0.0.5"), ip_address("10.0.0.6")
SOME_GROUPS = st.lists(st.sampled_from(["a", "b", "c", "d", "public"]), max_size=3).map(tuple)
IDENTIFIER = re.compile(r"[a-z][A-Za-z0-9_]*")


@given(source=SOME_GROUPS, target=SOME_GROUPS, is_open=st.booleans())
def test_two_may_talk_iff_they_share_a_netgroup(
    source: tuple[str, ...], target: tuple[str, ...], is_open: bool
) -> None:
    allowed = is_open or "public" in target or bool(set(source) & set(target))
    verdict = judge(Caller(AWAY, source), callers(target, Isolation(open=is_open)))
    assert verdict.allowed == allowed
    assert verdict.why


def test_the_public_call_nobody_who_is_not() -> None:
    verdict = judge(Caller(AWAY, ("public",)), callers(["web"], Isolation()))
    assert not verdict.allowed
    assert "the caller is in public, the called in web" in verdict.why


def test_who_is_no_endpoint_calls_only_where_the_network_allows_it() -> None:
    isolation = Isolation(allow_from=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")), nodes=True)
    for ip, is_node, allowed in (
        ("192.0.2.9", False, True),
        ("192.0.3.9", False, False),
        ("192.0.3.9", True, True),
        ("2001:db8::9", False, True),
        ("2001:db9::9", False, False),
    ):
        assert judge(Caller(ip_address(ip), (), is_node), callers(["web"], isolation)).allowed == allowed
        assert not judge(Caller(ip_address(ip), (), is_node), callers(["web"], Isolation())).allowed


def test_a_networks_isolation_is_what_its_record_says_and_nothing_where_that_makes_no_sense() -> None:
    network = Network(name="web", pools=[], isolation="netgroups", allow_from=["192.0.2.0/24", "nodes", "?!"])
    assert isolation_of(network) == Isolation(False, (ip_network("192.0.2.0/24"),), True)
    assert isolation_of(network.with_(isolation="open")).open
    assert isolation_of(network.with_(isolation="whatever", allow_from=[])) == Isolation()


def test_endpoints_that_nothing_tells_apart_have_one_chain() -> None:
    isolation = Isolation(allow_from=(ip_network("192.0.2.0/24"), ip_network("10.9.0.0/16")))
    other = Isolation(allow_from=isolation.allow_from[::-1])
    assert callers(["b", "a"], isolation) == callers(["a", "b", "a"], other)


@given(names=st.lists(st.text(), min_size=1, max_size=4))
def test_no_netgroup_becomes_rule_text(names: list[str]) -> None:
    """Whatever other nodes and other versions write into the store."""
    for name in names:
        assert IDENTIFIER.fullmatch(set_of_netgroup(name, 4))
    may_call = callers(names, Isolation())
    assert IDENTIFIER.fullmatch(chain_of_callers(may_call))
    assert len(chain_of_callers(may_call)) < 128
    book = Book()
    book.admit(Admission("mrgx", "02:00:00:00:00:01", (HERE,), "web", tuple(names)))
    book.set_others([(AWAY, tuple(names))])
    plain = Book()
    plain.admit(
        Admission("mrgx", "02:00:00:00:00:01", (HERE,), "web", tuple(f"n{i}" for i in range(len(set(names)))))
    )
    plain.set_others([(AWAY, tuple(f"n{i}" for i in range(len(set(names)))))])
    if "public" not in names:
        assert shape(ruleset.table(book)) == shape(ruleset.table(plain))


def shape(text: str) -> list[str]:
    """The text without the names of netgroups; in order, because the names are."""
    return sorted(re.sub(r"(netgroup[46]|callers)_[A-Za-z0-9_]+", r"\1", text).splitlines())


@given(first=st.text(), other=st.text())
def test_different_netgroups_have_different_sets(first: str, other: str) -> None:
    assert (set_of_netgroup(first, 4) == set_of_netgroup(other, 4)) == (first == other)
