"""An operator removes a node by force that is only cut off, and it comes back."""

from __future__ import annotations

import pytest

from ipam.membership import LEASE
from moorage.lab import LabNode
from tests.cluster.conftest import HEALED_WITHIN, Story, clean_again, stored_for
from tests.cluster.load import NETWORK
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]


def is_alive(name: str, *, asked: LabNode) -> bool:
    return any(row["name"] == name and row["alive"] for row in asked.ask("node", "list"))


def test_it_is_fenced_asserts_what_is_free_and_cuts_off_what_is_anothers(story: Story) -> None:
    with story(quiet=1) as (lab, load):
        alone, other, _ = lab.nodes
        robbed, kept = load.settle(alone, 2)
        eventually(lambda: alone.ask("status")["outbox"] == 0)
        lab.partition(alone, *lab.etcd.members)
        eventually(lambda: not is_alive(alone.name, asked=other), within=LEASE + HEALED_WITHIN)
        other.cli("node", "remove", alone.name, "--force", "--yes", alone.name)
        late = load.settle(alone, 2)
        assert all(stay.ip for stay in late)
        with other.container() as taker:
            assert taker.add(NETWORK, labels={"moorage.ip": robbed.ip}).exit == 0
            lab.heal()
            eventually(
                lambda: alone.ask("status")["conflicts"] == [f"{robbed.container.id}/eth0"], HEALED_WITHIN
            )
            stored_for(other, [kept, *late])
            assert not robbed.container.namespace.pings(kept.ip, wait=1)
            # The way leads to who has the address now, also from the node that had it.
            eventually(lambda: alone.namespace.pings(robbed.ip, wait=1))
            assert all(alone.namespace.pings(stay.ip) for stay in (kept, *late))
            assert other.namespace.pings(robbed.ip)
            # The store is not in doubt: what is new is taken as before.
            eventually(lambda: load.settle(alone, 1)[0].ip)
            load.end(robbed)
            clean_again(lab)
            assert is_alive(alone.name, asked=other)
            (row,) = [r for r in other.ask("ip", "list", "--state", "assigned") if r["address"] == robbed.ip]
            assert (row["node"], row["container_id"]) == (other.name, taker.id)
            assert taker.delete(NETWORK).exit == 0
