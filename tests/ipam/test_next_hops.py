"""Which next hop a network gets."""

from __future__ import annotations

from ipaddress import ip_address

from ipam.next_hops import FIRST, LAST, choose_next_hop, next_hop


def test_a_number_is_one_address_in_each_family() -> None:
    assert (next_hop(FIRST, 4), next_hop(FIRST, 6)) == (ip_address("169.254.1.1"), ip_address("fe80::1"))
    assert (next_hop(LAST, 4), next_hop(LAST, 6)) == (ip_address("169.254.1.254"), ip_address("fe80::fe"))


def test_the_smallest_free_one_is_chosen() -> None:
    assert choose_next_hop([]) == 1
    assert choose_next_hop([1, 1, 2, 4]) == 3


def test_when_none_is_free_the_one_that_fewest_networks_share_is_chosen() -> None:
    everyone = list(range(FIRST, LAST + 1))
    assert choose_next_hop(everyone) == 1
    assert choose_next_hop([*everyone, 1, 2]) == 3
    assert choose_next_hop([*everyone, *everyone]) == 1
