"""The other end of an interface, and what only looks like it."""

from __future__ import annotations

import pytest

from isolator.errors import NamespaceGone
from isolator.netlink import our_links
from isolator.netlink.far_end import far_end
from tests.isolator.conftest import MakeRoom
from tests.isolator.rooms import Machine, Room

pytestmark = pytest.mark.kernel


def name_inside(machine: Machine, room: Room, host_ifname: str) -> str:
    """What the other end of a link of the node is called in a namespace. Raises NamespaceGone."""
    with (
        machine.node.open_namespace(room.path) as namespace,
        far_end(machine.node, namespace, host_ifname) as end,
    ):
        return end.link.name


def test_a_pair_with_the_same_indexes_in_another_namespace_is_not_the_other_end(
    machine: Machine, make_container: MakeRoom
) -> None:
    container, other = make_container(), make_container()
    name = machine.attach(container, "eth0", "10.0.0.1").host_ifname
    machine.attach(other, "eth0", "10.0.0.2")
    link = machine.do(our_links, machine.node)[name]
    other.sh(f"ip link add eth9 index {link.peer} type veth peer name far index {link.index}")
    container.sh("ip link set eth0 down; ip link set eth0 name lan0")
    assert machine.do(name_inside, machine, container, name) == "lan0"
    with pytest.raises(NamespaceGone, match=r"the other end .* is not in it"):
        machine.do(name_inside, machine, other, name)
