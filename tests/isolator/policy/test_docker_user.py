"""What is put into DOCKER-USER, and beside whom nothing is: rules as versions of Docker write them, and others'."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from isolator.policy.docker_user import CHAINS, COMMENT, edits
from isolator.policy.look import Look, look
from isolator.policy.others import Ruleset, read
from tests.isolator.rooms import Room

pytestmark = pytest.mark.kernel

DOCKER_20 = """
iptables -N DOCKER
iptables -N DOCKER-ISOLATION-STAGE-1
iptables -N DOCKER-ISOLATION-STAGE-2
iptables -N DOCKER-USER
iptables -P FORWARD DROP
iptables -A FORWARD -j DOCKER-USER
iptables -A FORWARD -j DOCKER-ISOLATION-STAGE-1
iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -A FORWARD -o docker0 -j DOCKER
iptables -A FORWARD -i docker0 ! -o docker0 -j ACCEPT
iptables -A FORWARD -i docker0 -o docker0 -j ACCEPT
iptables -A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
iptables -A DOCKER-ISOLATION-STAGE-1 -j RETURN
iptables -A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
iptables -A DOCKER-ISOLATION-STAGE-2 -j RETURN
iptables -A DOCKER-USER -j RETURN
"""
"""As 20.10.24 wrote it, but for what it writes to table nat."""

DOCKER_28 = """
for chain in DOCKER DOCKER-BRIDGE DOCKER-CT DOCKER-FORWARD DOCKER-USER; do iptables -N $chain; done
iptables -P FORWARD DROP
iptables -A FORWARD -j DOCKER-USER
iptables -A FORWARD -j DOCKER-FORWARD
iptables -A DOCKER ! -i docker0 -o docker0 -j DROP
iptables -A DOCKER-BRIDGE -o docker0 -j DOCKER
iptables -A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -A DOCKER-FORWARD -j DOCKER-CT
iptables -A DOCKER-FORWARD -j DOCKER-BRIDGE
iptables -A DOCKER-FORWARD -i docker0 -j ACCEPT
"""
"""The structure of version 28: chains of its own for everything, and no RETURN in DOCKER-USER."""

PROGRAMS = ("iptables-nft", "ip6tables-nft")
OURS = [
    f'-A DOCKER-USER {option} {name} -m comment --comment "{COMMENT}" -j {verdict}'
    for name, verdict in (("docker0", "RETURN"), ("mrg+", "ACCEPT"))
    for option in ("-i", "-o")
]
ADMINISTRATORS = "-A DOCKER-USER -s {} -j DROP"
DOCUMENTATION = {"iptables-nft": "192.0.2.1/32", "ip6tables-nft": "2001:db8::1/128"}


def write(room: Room, rules: str, program: str = "iptables-nft") -> None:
    room.sh(rules.replace("iptables ", f"{program} "))


def load(room: Room, rules: Iterable[str], directory: Path) -> None:
    file = directory / "rules"
    file.write_text("\n".join(rules))
    room.sh(f"nft -f {file}")


def user(room: Room, program: str = "iptables-nft") -> list[str]:
    return room.sh(f"{program} -S DOCKER-USER").splitlines()[1:]


def looked(room: Room, *, wants_accepts: bool = True) -> Look:
    def inside() -> Look:
        return look(wants_accepts=wants_accepts)

    return room.do(inside)


def ruleset(room: Room) -> Ruleset:
    with room.do(NetlinkSocket, NETLINK_NETFILTER) as netfilter:
        return read(netfilter, CHAINS)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("rules", [DOCKER_20, DOCKER_28], ids=["20", "28"])
def test_ours_stand_at_the_end_of_the_chain_and_are_written_once(
    container: Room, rules: str, program: str
) -> None:
    write(container, rules, program)
    theirs = ADMINISTRATORS.format(DOCUMENTATION[program])
    end = user(container, program)
    container.sh(f"{program} {theirs.replace('-A', '-I', 1)}")
    first = looked(container)
    assert first.edited
    assert not first.blocked
    assert not first.refused
    assert user(container, program) == [theirs, *OURS, *end]
    again = looked(container)
    assert (again.edited, again.ours) == ((), first.ours)
    assert not looked(container, wants_accepts=False).ours
    assert user(container, program) == [theirs, *end]


def test_both_families_are_opened_at_once(container: Room) -> None:
    for program in PROGRAMS:
        write(container, DOCKER_20, program)
    assert looked(container).ours == CHAINS


DISTURBED = {
    "appended after": ("iptables -A DOCKER-USER -s 192.0.2.1 -j DROP", ["-A DOCKER-USER -s 192.0.2.1/32 -j DROP"]),
    "one of ours is gone": ("iptables -D DOCKER-USER 2", []),
    "all of ours are gone": ("iptables -F DOCKER-USER", []),
    "ours are there twice": (
        f'iptables -I DOCKER-USER -i mrg+ -m comment --comment "{COMMENT}" -j ACCEPT', []
    ),
    "ours are in another order": (
        f'iptables -D DOCKER-USER 4; iptables -I DOCKER-USER -o mrg+ -m comment --comment "{COMMENT}" -j ACCEPT', []
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", DISTURBED)
def test_whatever_happens_to_the_chain_is_put_right(container: Room, how: str) -> None:
    write(container, DOCKER_28)
    looked(container)
    assert user(container) == OURS
    command, theirs = DISTURBED[how]
    write(container, command)
    assert looked(container).edited
    assert user(container) == [*theirs, *OURS]


def test_ours_are_taken_out_of_a_chain_that_nothing_leads_to(container: Room) -> None:
    write(container, DOCKER_28)
    assert looked(container).ours
    write(container, "iptables -D FORWARD -j DOCKER-USER")
    found = looked(container)
    assert not found.ours
    assert [str(one.chain) for one in found.blocked] == ["chain FORWARD of table ip filter"]


OTHERS = {
    "an administrator's drop in DOCKER-USER": "iptables -I DOCKER-USER -j DROP",
    "one of what containers send": "iptables -I DOCKER-USER -i mrg+ -j REJECT",
    "one in a chain of his own": "iptables -N mine; iptables -A mine -o mrg+ -j DROP; iptables -I DOCKER-USER -j mine",
    "a drop of some in FORWARD": "iptables -A FORWARD -s 192.0.2.1 -j DROP",
    "a drop at the end of FORWARD": "iptables -A FORWARD -j REJECT",
    "an accept of an administrator's": "iptables -A FORWARD -i eth1 -j ACCEPT",
    "a queue": "iptables -A FORWARD -i eth1 -j NFQUEUE",
    "ufw": "iptables -N ufw-before-forward; iptables -I FORWARD -j ufw-before-forward",
    "kube-proxy": "iptables -N KUBE-FORWARD; iptables -I FORWARD -j KUBE-FORWARD; "
    "iptables -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
    "a table of its own": "nft 'table inet fw { chain c { type filter hook forward priority 5; policy drop; }; }'",
    "a chain that sounds like Docker's": "iptables -N DOCKER-MINE; iptables -A FORWARD -j DOCKER-MINE; "
    "iptables -A DOCKER-MINE -s 192.0.2.1 -j DROP",
    "a map of verdicts": "nft 'add rule ip filter FORWARD ip saddr vmap { 192.0.2.1 : drop }'",
    "a jump for some": "iptables -D FORWARD -j DOCKER-USER; iptables -I FORWARD -i eth0 -j DOCKER-USER",
    "an accept by the administrator": "iptables -I DOCKER-USER -j ACCEPT",
    "a policy that accepts": "iptables -P FORWARD ACCEPT",
    "a bridge that could be rule text": "iptables -A FORWARD -o 'a;b\"' -j DOCKER",
}


PASSING = ("an accept by the administrator", "a policy that accepts")


@pytest.mark.parametrize("what", OTHERS)
def test_beside_anybody_else_nothing_is_touched_and_ours_are_taken_out(container: Room, what: str) -> None:
    write(container, DOCKER_20)
    assert looked(container).ours
    write(container, OTHERS[what])
    assert not looked(container).ours
    before = container.sh("nft -s list ruleset")
    found = looked(container)
    assert not found.edited
    assert container.sh("nft -s list ruleset") == before
    assert bool(found.blocked) is (what not in PASSING)
    assert not found.waiting


ALLOWED = {
    "containers of a bridge that may not talk": "iptables -A FORWARD -i docker0 -o docker0 -j DROP",
    "a counter": "iptables -A FORWARD -s 192.0.2.1",
    "a log": "iptables -I FORWARD -j LOG",
    "swarm": "iptables -N DOCKER-INGRESS; iptables -I FORWARD -j DOCKER-INGRESS; "
    "iptables -A DOCKER-INGRESS -p tcp --dport 80 -j ACCEPT; iptables -A DOCKER-INGRESS -j RETURN",
    "a drop of other interfaces": "iptables -I DOCKER-USER -i eth0 -j DROP",
    "another table that lets containers pass": "nft 'table inet fw { chain c { type filter hook forward priority 5; "
    'policy drop; iifname "mrg*" accept; oifname "mrg*" accept; }; }\'',
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_docker_writes_and_what_drops_nothing_of_ours_is_no_hindrance(
    container: Room, what: str
) -> None:
    write(container, DOCKER_20)
    write(container, ALLOWED[what])
    found = looked(container)
    assert found.ours
    assert not found.blocked


def test_dockers_own_containers_stay_as_they_were(container: Room) -> None:
    """Every bridge of Docker's is left to its own rules, before anything of ours accepts."""
    write(container, DOCKER_28)
    write(container, "iptables -A DOCKER-BRIDGE -o br-0123456789ab -j DOCKER")
    (edit,) = edits(ruleset(container), wanted=True)
    assert [(line.name, line.verdict) for line in edit.lines][:-2] == [
        (bridge, "return") for bridge in ("br-0123456789ab", "docker0") for _ in ("in", "out")
    ]


def test_only_what_forwarding_goes_through_is_read(container: Room, tmp_path: Path) -> None:
    """A node of Kubernetes has tens of thousands of rules for NAT."""
    container.sh(
        "nft 'table ip nat { chain KUBE-SERVICES { }; chain PREROUTING { type nat hook prerouting priority dstnat; "
        "jump KUBE-SERVICES; }; }'"
    )
    numbers = (f"{n // 250}.{n % 250}" for n in range(5000))
    load(container, (f"add rule ip nat KUBE-SERVICES ip daddr 10.{n}.1 accept" for n in numbers), tmp_path)
    write(container, DOCKER_20)
    found = ruleset(container)
    assert {chain.table for chain in found.rules} == {"filter"}
    assert sum(map(len, found.rules.values())) == 16 - 5


def test_no_more_rules_are_read_than_a_look_has_time_for(
    container: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isolator.policy.others.MOST_RULES", 100)
    container.sh("nft 'table ip f { chain c { type filter hook forward priority 0; policy drop; }; }'")
    load(container, (f"add rule ip f c ip saddr 192.0.2.{n % 250} drop" for n in range(2000)), tmp_path)
    assert sum(map(len, ruleset(container).rules.values())) == 100
    assert [str(one.chain) for one in looked(container).blocked] == ["chain c of table ip f"]
