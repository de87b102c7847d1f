"""etcd is restored from a backup that does not know of the last containers."""

from __future__ import annotations

import pytest

from ipam import grace
from tests.cluster.conftest import HEALED_WITHIN, Story, clean_again, stored_for, under_way
from tests.patience import PATIENCE
from tests.system.conftest import eventually

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.etcd,
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
]


def test_what_was_given_out_since_the_backup_is_asserted_anew_and_given_to_nobody_else(story: Story) -> None:
    with story(etcd=1, quiet=1) as (lab, load):
        staying = [stay for node in lab.nodes for stay in load.settle(node, 2)]
        backup = lab.etcd.back_up()
        staying += [stay for node in lab.nodes for stay in load.settle(node, 5)]
        under_way(load)
        eventually(lambda: lab.nodes[0].ask("status")["outbox"] == 0)
        assert all(stay.ip for stay in staying)
        lab.etcd.restore(backup)
        clean_again(lab)
        stored_for(lab.nodes[0], staying)
        for node in lab.nodes:
            for stay in staying:
                assert stay.node != node.name or node.namespace.pings(stay.ip)
        under_way(load, within=grace.SECONDS + PATIENCE)
        # The quiet one noticed a little later. Eight addresses may be warm from before; one more is new.
        for _ in range(9):
            eventually(lambda: load.settle(lab.nodes[0], 1)[0].ip, within=HEALED_WITHIN)
