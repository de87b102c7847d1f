"""An endpoint in writing is the same endpoint when it is read, wherever there was room for it."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.netgroups import Netgroup
from ipam.records import Address, AddressState, Label
from isolator.drivers.naming import host_ifname
from isolator.model import UNLIMITED, Endpoint
from isolator.netlink.seal import MOST_SAID
from isolator.written import (
    assembled,
    decode_endpoint,
    encode_endpoint,
    for_alias,
    for_record,
    from_alias,
    from_record,
)
from tests.isolator.test_journal import BOOT, ENDPOINT

WHOLE = replace(ENDPOINT, host_ifname=host_ifname(ENDPOINT.key), default_route=True)
"""An endpoint with a value in every field that has a default."""

PLAIN = replace(
    WHOLE,
    netgroups=(Netgroup("web"),),
    labels=(),
    default_route=False,
    nameservers=(),
    search=(),
    port_mappings=(),
    bandwidth=UNLIMITED,
    next_hop=1,
    mac="0a:58:0a:00:00:01",
)


def as_recorded(endpoint: Endpoint) -> Address:
    return Address(
        pool="p",
        state=AddressState.ASSIGNED,
        node="n1",
        container_id=endpoint.key.container_id,
        ifname=endpoint.key.ifname,
        network=endpoint.network,
        engine=endpoint.engine,
        netgroups=list(endpoint.netgroups),
        labels=list(endpoint.labels),
        since=endpoint.since,
        endpoint=for_record(endpoint),
    )


def test_this_test_knows_an_endpoint_with_a_value_in_every_field() -> None:
    same = [f.name for f in fields(Endpoint) if f.default not in (MISSING, getattr(WHOLE, f.name))]
    assert same == [f.name for f in fields(Endpoint) if f.default is not MISSING and f.name != "lost"]


@pytest.mark.parametrize("endpoint", [WHOLE, PLAIN], ids=["whole", "plain"])
def test_journal_and_address_record_say_all_of_it(endpoint: Endpoint) -> None:
    assert decode_endpoint(encode_endpoint(endpoint)) == endpoint
    record = Address.decode("k", as_recorded(endpoint).encode())
    found = assembled(from_record(record, BOOT), {"ips": [str(ip) for ip in endpoint.ips]})
    assert replace(found, netns=endpoint.netns) == endpoint


@pytest.mark.parametrize(
    "odd", [{"mtu": "x"}, {"port_mappings": 7}, {"pools": ["x"]}, {"asked": []}, {"later": 1}]
)
def test_what_cannot_be_read_of_a_record_is_named_and_the_rest_is_used(odd: dict[str, object]) -> None:
    record = as_recorded(PLAIN)
    told = from_record(record.with_(endpoint={**record.endpoint, **odd}), BOOT)
    found = assembled(told, {"asked": {"boot_id": BOOT, "at": 0}, "ips": ["10.0.0.1"]})
    assert (found.key, found.netgroups) == (PLAIN.key, PLAIN.netgroups)
    assert ("port_mappings" in found.lost) == ("later" not in odd)


def test_a_plain_endpoint_costs_its_record_few_bytes() -> None:
    with_it = as_recorded(PLAIN)
    assert len(with_it.encode()) - len(with_it.with_(endpoint={}).encode()) < 160


def test_an_alias_says_all_of_an_endpoint_as_most_are() -> None:
    endpoint = replace(
        PLAIN,
        key=PLAIN.key._replace(container_id="84bd2819-0f2b-4bf0-88ee-dd04cf7b71eb"),
        request_id="4374a35ed6da2bbe21a3e417bb589ed7",
        port_mappings=WHOLE.port_mappings[:1],
    )
    found = assembled(from_alias(for_alias(endpoint), BOOT), {"mtu": 1450})
    restored = replace(
        found,
        netns=endpoint.netns,
        since=endpoint.since,
        pools=endpoint.pools,
        host_ifname=endpoint.host_ifname,
    )
    assert restored == endpoint


@given(
    st.integers(0, 175),
    st.lists(st.text("abc", min_size=1, max_size=63), min_size=1, max_size=64, unique=True),
    st.lists(st.tuples(st.text(max_size=30), st.none() | st.text(max_size=300)), max_size=20),
    st.integers(0, 3),
)
def test_an_alias_fits_and_says_what_it_does_not_say(
    length: int, netgroups: list[str], labels: list[tuple[str, str | None]], mapped: int
) -> None:
    endpoint = replace(
        WHOLE,
        key=WHOLE.key._replace(container_id="c" * length),
        netgroups=tuple(map(Netgroup, netgroups)),
        labels=tuple(Label(key, value) for key, value in labels),
        port_mappings=WHOLE.port_mappings[:mapped],
    )
    alias = for_alias(endpoint)
    assert len(alias.encode()) <= MOST_SAID
    told = from_alias(alias, BOOT)
    assert told, "at this length there is room for whose it is"
    found = assembled(told, {})
    others = {"lost", "netns", "since", "pools", "mtu", "host_ifname", "nameservers", "search"}
    said = {f.name for f in fields(Endpoint)} - {*found.lost} - others
    assert {name: getattr(found, name) for name in said} == {name: getattr(endpoint, name) for name in said}


@pytest.mark.parametrize(
    "alias", ["", "eth0 of my vm", "{}", '{"a":1}', '{"a":["c"]}', '["a"]', '{"a":["c","e"],"i":["x"]}']
)
def test_an_alias_of_somebody_else_says_nothing(alias: str) -> None:
    assert from_alias(alias, BOOT) == {}
