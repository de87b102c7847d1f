"""What apps may ask for with labels."""

import contextlib
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.errors import InvalidInput
from ipam.records import Label
from isolator.model import Bandwidth, Limit
from netmodules.labels import KNOWN, Requested, read_labels


def labels(**named: str | None) -> list[Label]:
    return [Label("moorage." + name.replace("_", "-"), value) for name, value in named.items()]


def test_every_label_is_understood() -> None:
    asked = [
        *labels(ip="10.0.0.7", ip6="fd00::7", reservation="db/1", netgroups="web, db,web", pool="blue"),
        *labels(mac="02-00-00-AA-BB-CC", default_route="true"),
        Label("moorage.bandwidth.ingress", "10M"),
    ]
    assert read_labels(asked) == Requested(
        ip=IPv4Address("10.0.0.7"),
        ip6=IPv6Address("fd00::7"),
        reservation="db/1",
        netgroups=("web", "db"),
        mac="02:00:00:aa:bb:cc",
        pool="blue",
        default_route=True,
        bandwidth=Bandwidth(ingress=Limit(10_000_000)),
    )


@pytest.mark.parametrize("pool", ["10.64.0.0/16", "10.64.0.0-16", "fd00::/64", "fd00::-64", "::/32", "blue"])
def test_a_pool_is_named_by_its_cidr_or_name(pool: str) -> None:
    assert read_labels(labels(pool=pool)).pool == pool


def test_labels_of_the_user_are_left_alone() -> None:
    theirs = [Label("role"), Label("role", "a"), Label("role", "b"), Label("", ""), Label("ünï", "\n☃")]
    assert read_labels(theirs) == Requested()


def test_an_unknown_label_of_ours_names_the_known_and_the_closest() -> None:
    with pytest.raises(InvalidInput, match=r"did you mean moorage\.netgroups\?") as caught:
        read_labels(labels(netgroup="web"))
    assert all(name in str(caught.value) for name in KNOWN)


def test_the_same_label_twice_is_fine_with_one_value_and_refused_with_two() -> None:
    assert read_labels([*labels(pool="a"), *labels(pool="a")]).pool == "a"
    with pytest.raises(InvalidInput, match=r"moorage\.pool is given as 'a' and as 'b'"):
        read_labels([*labels(pool="a"), *labels(pool="b")])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in KNOWN for value in (None, "", "  ", "a\nb")],
        *[
            ("moorage.ip", bad)
            for bad in ("fd00::1", "10.0.0", "10.0.0.256", "127.0.0.1", "0.0.0.0", "224.0.0.1")
        ],
        *[
            ("moorage.ip", bad)
            for bad in ("169.254.1.1", "10.0.0.1/33", "10.0.0.1/", "010.0.0.1", "١٠.0.0.1")
        ],
        *[
            ("moorage.ip6", bad)
            for bad in ("10.0.0.1", "::1", "fe80::1", "fd00::1%eth0", "::ffff:10.0.0.1", "::")
        ],
        *[
            ("moorage.netgroups", bad)
            for bad in (",", "-a", ".a", "_a", "*", "a*", "a,,b", "a b", "ä", "x" * 64, "$(id)", "a;drop")
        ],
        *[
            ("moorage.mac", bad)
            for bad in ("01:00:00:00:00:00", "00:00:00:00:00:00", "02:00:00:00:00", "02-00:00:00:00:00")
        ],
        *[("moorage.default-route", bad) for bad in ("yes", "1", "True")],
        *[
            ("moorage.bandwidth.egress", bad)
            for bad in ("0", "-1", "1.5M", "10MB", "10m", "1e9", "9" * 16, "1k", "2000G")
        ],
        ("moorage.reservation", "x" * 254),
        ("moorage.pool", "../x"),
    ],
)
def test_a_wrong_value_is_refused_by_the_labels_name(name: str, value: str | None) -> None:
    with pytest.raises(InvalidInput, match=name.replace(".", r"\.")):
        read_labels([Label(name, value)])


def test_too_many_netgroups_and_too_large_labels_are_refused() -> None:
    with pytest.raises(InvalidInput, match="at most 64"):
        read_labels(labels(netgroups=",".join(f"g{n}" for n in range(65))))
    with pytest.raises(InvalidInput, match="the 2 labels are 11034 bytes as JSON"):
        read_labels([Label("note", "☃" * 3665), Label("a")])
    # Many empty ones and many quotes take more room in a record than their characters.
    with pytest.raises(InvalidInput, match="at most 10240"):
        read_labels([Label("")] * 2000)
    with pytest.raises(InvalidInput, match="at most 10240"):
        read_labels([Label("note", '"' * 6000)])


@given(st.lists(st.builds(Label, st.sampled_from(KNOWN) | st.text(), st.none() | st.text())))
def test_any_labels_are_read_or_refused(some: list[Label]) -> None:
    with contextlib.suppress(InvalidInput):
        read_labels(some)
