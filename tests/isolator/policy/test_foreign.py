"""Other firewalls that block containers: found, with commands that work."""

from __future__ import annotations

import pytest

from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from isolator.policy.foreign import Blocked, blocked
from isolator.policy.others import read
from tests.isolator.rooms import Room

pytestmark = pytest.mark.kernel

FORWARD = "type filter hook forward priority 0"

HARMLESS = {
    "nothing": "",
    "a chain that accepts": f"table inet f {{ chain c {{ {FORWARD}; policy accept; }}; }}",
    "a drop of some": f"table inet f {{ chain c {{ {FORWARD}; ip saddr 192.0.2.1 drop; }}; }}",
    "a drop of other interfaces": f'table inet f {{ chain c {{ {FORWARD}; iifname "eth*" drop; }}; }}',
    "a drop of what is for the node": "table inet f { chain c { type filter hook input priority 0; policy drop; }; }",
    "a policy behind an accept of ours": f"table inet f {{ chain c {{ {FORWARD}; policy drop; "
    'iifname "mrg*" accept; oifname "mrg*" accept; }; }',
    "an accept in a chain of its own": 'table inet f { chain ours { iifname "mrg*" accept; oifname "m*" accept; }; '
    f"chain c {{ {FORWARD}; policy drop; jump ours; }}; }}",
    "a chain that accepts all": f"table inet f {{ chain c {{ {FORWARD}; policy drop; accept; }}; }}",
    "our own": f"table inet moorage {{ chain c {{ {FORWARD}; policy drop; }}; }}",
}

HARMFUL = {
    "a policy": f"table inet f {{ chain c {{ {FORWARD}; policy drop; }}; }}",
    "a policy behind rules for others": f"table ip f {{ chain c {{ {FORWARD}; policy drop; "
    "ct state established accept; }; }",
    "half an accept": f'table inet f {{ chain c {{ {FORWARD}; policy drop; iifname "mrg*" accept; }}; }}',
    "a drop at the end": f"table inet f {{ chain c {{ {FORWARD}; tcp dport 80 accept; drop; }}; }}",
    "a reject in a chain of its own": "table ip6 f { chain no { counter reject; }; "
    f"chain c {{ {FORWARD}; jump no; }}; }}",
}


def found(room: Room, *, has_iptables: bool = True) -> list[Blocked]:
    with room.do(NetlinkSocket, NETLINK_NETFILTER) as netfilter:
        return blocked(read(netfilter), has_iptables=has_iptables)


@pytest.mark.parametrize("what", HARMLESS)
def test_what_lets_containers_pass_is_no_finding(container: Room, what: str) -> None:
    if HARMLESS[what]:
        container.sh(f"nft '{HARMLESS[what]}'")
    assert found(container) == []


@pytest.mark.parametrize("what", HARMFUL)
def test_what_drops_is_named_and_its_commands_help(container: Room, what: str) -> None:
    container.sh(f"nft '{HARMFUL[what]}'")
    (one,) = found(container)
    assert str(one.chain).startswith("chain c of table")
    for command in one.commands:
        container.sh(command)
    assert found(container) == []


def test_a_docker_host_is_helped_where_docker_leaves_rules_alone(container: Room) -> None:
    container.sh(
        "iptables-nft -N DOCKER-USER; iptables-nft -A DOCKER-USER -j RETURN; "
        "iptables-nft -P FORWARD DROP; iptables-nft -A FORWARD -j DOCKER-USER"
    )
    (one,) = found(container)
    assert one.commands == (
        "iptables-nft -I DOCKER-USER -i mrg+ -j ACCEPT",
        "iptables-nft -I DOCKER-USER -o mrg+ -j ACCEPT",
    )
    for command in one.commands:
        container.sh(command)
    assert found(container) == []


@pytest.mark.parametrize("program", ["iptables-nft", "ip6tables-nft"])
@pytest.mark.parametrize("has_iptables", [True, False])
def test_a_policy_set_by_iptables_is_found_also_where_that_is_gone(
    container: Room, program: str, has_iptables: bool
) -> None:
    container.sh(f"{program} -P FORWARD DROP")
    (one,) = found(container, has_iptables=has_iptables)
    assert one.why.startswith("its policy is drop")
    assert all(command.startswith(program if has_iptables else "nft ") for command in one.commands)
    for command in one.commands:
        container.sh(command)
    assert found(container) == []
