"""Other firewalls that block containers: found, with commands that work."""

from __future__ import annotations

import json

import pytest

from isolator.policy.foreign import blocked
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


def listing(room: Room) -> dict[str, object]:
    return dict(json.loads(room.sh("nft -j list ruleset")))


@pytest.mark.parametrize("what", HARMLESS)
def test_what_lets_containers_pass_is_no_finding(container: Room, what: str) -> None:
    if HARMLESS[what]:
        container.sh(f"nft '{HARMLESS[what]}'")
    assert blocked(listing(container)) == []


@pytest.mark.parametrize("what", HARMFUL)
def test_what_drops_is_named_and_its_commands_help(container: Room, what: str) -> None:
    container.sh(f"nft '{HARMFUL[what]}'")
    (found,) = blocked(listing(container))
    assert str(found.chain).startswith("chain c of table")
    for command in found.commands:
        container.sh(command)
    assert blocked(listing(container)) == []


def test_a_docker_host_is_helped_where_docker_leaves_rules_alone(container: Room) -> None:
    container.sh(
        "nft 'table ip filter { chain DOCKER-USER { counter return; }; "
        "chain FORWARD { type filter hook forward priority 0; policy drop; jump DOCKER-USER; }; }'"
    )
    (found,) = blocked(listing(container))
    assert found.commands == (
        "iptables -I DOCKER-USER -i mrg+ -j ACCEPT",
        "iptables -I DOCKER-USER -o mrg+ -j ACCEPT",
    )
