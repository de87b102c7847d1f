"""Which mappings are refused because of the node itself: by the rule, and on a real node with real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from ipam.errors import InvalidInput
from isolator.errors import PortTaken
from isolator.holders import MOST_NAMED, holders
from isolator.hostports import (
    collisions,
    first_collision,
    refuse_families,
    refuse_tunnel,
    takes,
    who_listens,
)
from isolator.model import Asked, AttachSpec, EndpointKey, PortMapping
from isolator.netlink import sockdiag
from isolator.netlink.sockdiag import Listener
from tests.isolator.rooms import Machine, Room
from tests.patience import PATIENCE

BOTH = (4, 6)

LISTEN = """
import socket, sys, time
protocol, ip, port, only_ipv6 = sys.argv[1:]
family = socket.AF_INET6 if ":" in ip else socket.AF_INET
made = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
if family == socket.AF_INET6:
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6 == "True")
made.bind((ip, int(port)))
if protocol == "tcp":
    made.listen()
print(flush=True)
time.sleep(3600)
"""

Listen = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def listen(machine: Machine) -> Iterator[Listen]:
    """Starts processes of the node that listen."""
    started: list[subprocess.Popen[bytes]] = []

    def start(
        protocol: str, ip: str, port: int, *, only_ipv6: bool = False, room: Room = machine
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", LISTEN, protocol, ip, str(port), str(only_ipv6)]
        process = room.do(subprocess.Popen, command, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def mapping(host_ip: str | None = None, protocol: str = "tcp", port: int = 7000) -> PortMapping:
    return PortMapping(protocol, port, 80, None if host_ip is None else ip_address(host_ip))


def spec(*mappings: PortMapping) -> AttachSpec:
    return AttachSpec(
        EndpointKey("c1", "eth0"), "r", Asked("b", 1), "cni", "web", "/n", port_mappings=mappings
    )


# mapped at, families of the endpoint, bound to, only IPv6, whether the listener loses the port
RULE = [
    (None, BOTH, "0.0.0.0", False, True),
    (None, BOTH, "::", False, True),
    (None, BOTH, "::", True, True),
    (None, BOTH, "127.0.0.53", False, True),
    (None, BOTH, "192.0.2.1", False, True),
    (None, BOTH, "2001:db8::1", False, True),
    (None, BOTH, "::1", False, False),
    (None, BOTH, "fe80::1", False, False),
    (None, BOTH, "224.0.0.251", False, False),
    (None, BOTH, "ff02::fb", False, False),
    (None, (4,), "::", False, True),
    (None, (4,), "::", True, False),
    (None, (4,), "2001:db8::1", False, False),
    (None, (6,), "0.0.0.0", False, False),
    (None, (6,), "::", True, True),
    ("0.0.0.0", BOTH, "::", False, True),
    ("0.0.0.0", BOTH, "::", True, False),
    ("0.0.0.0", BOTH, "192.0.2.1", False, True),
    ("0.0.0.0", BOTH, "2001:db8::1", False, False),
    ("::", BOTH, "0.0.0.0", False, False),
    ("::", BOTH, "2001:db8::1", False, True),
    ("::", BOTH, "::1", False, False),
    ("192.0.2.1", BOTH, "0.0.0.0", False, True),
    ("192.0.2.1", BOTH, "::", False, True),
    ("192.0.2.1", BOTH, "::", True, False),
    ("192.0.2.1", BOTH, "192.0.2.1", False, True),
    ("192.0.2.1", BOTH, "192.0.2.3", False, False),
    ("192.0.2.1", BOTH, "127.0.0.1", False, False),
    ("2001:db8::1", BOTH, "0.0.0.0", False, False),
    ("2001:db8::1", BOTH, "::", False, True),
    ("2001:db8::1", BOTH, "2001:db8::2", False, False),
    ("127.0.0.1", BOTH, "127.0.0.1", False, True),
    ("127.0.0.1", BOTH, "127.0.0.53", False, False),
]


@pytest.mark.parametrize(("at", "families", "bound", "only_ipv6", "loses"), RULE)
def test_a_mapping_takes_a_port_from_whoever_would_hear_what_it_leads_away(
    at: str | None, families: tuple[int, ...], bound: str, only_ipv6: bool, loses: bool
) -> None:
    listener = Listener("tcp", ip_address(bound), 7000, only_ipv6)
    assert takes(mapping(at), families, listener) is loses
    assert not takes(mapping(at, port=7001), families, listener)
    assert not takes(mapping(at, "udp"), families, listener)


@pytest.mark.kernel
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("at", "bound", "only_ipv6", "loses"),
    [
        (at, bound, only_ipv6, loses)
        for at, families, bound, only_ipv6, loses in RULE
        if families == BOTH and bound in ("0.0.0.0", "::", "::1", "127.0.0.1", "192.0.2.1", "2001:db8::1")
    ],
)
def test_a_process_that_would_lose_its_port_is_named(
    machine: Machine, listen: Listen, protocol: str, at: str | None, bound: str, only_ipv6: bool, loses: bool
) -> None:
    process = listen(protocol, bound, 7000, only_ipv6=only_ipv6)
    found = machine.do(first_collision, machine.node, spec(mapping(at, protocol)), BOTH)
    assert (found is not None) is loses
    if found is not None:
        assert machine.do(who_listens, machine.node, found.listener).endswith(f"(pid {process.pid})")


@pytest.mark.kernel
def test_a_process_inside_a_container_is_not_the_nodes(
    machine: Machine, container: Room, listen: Listen
) -> None:
    listen("tcp", "0.0.0.0", 7000, room=container)
    assert not machine.do(collisions, [mapping()], BOTH).collisions


@pytest.mark.kernel
def test_of_many_mappings_those_that_collide_are_found(machine: Machine, listen: Listen) -> None:
    listen("tcp", "0.0.0.0", 7003)
    listen("udp", "::", 7005)
    mappings = [mapping(protocol=protocol, port=7000 + i) for protocol in ("tcp", "udp") for i in range(100)]
    assert {found.mapping for found in machine.do(collisions, mappings, BOTH).collisions} == {
        mapping(port=7003),
        mapping(protocol="udp", port=7005),
    }


@pytest.mark.kernel
def test_a_protocol_that_the_kernel_cannot_tell_of_hides_no_other(
    machine: Machine, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen("tcp", "0.0.0.0", 7000)
    no_kernel_has = 253
    monkeypatch.setitem(sockdiag._PROTOCOLS, "udp", (no_kernel_has, 1 << 7))
    look = machine.do(collisions, [mapping(protocol="udp"), mapping()], BOTH)
    assert [found.mapping for found in look.collisions] == [mapping()]
    assert list(look.unknown) == ["udp"]
    udp_alone = spec(mapping(protocol="udp"))
    assert machine.do(first_collision, machine.node, udp_alone, BOTH) is None, "no reason to map nothing"


@pytest.mark.kernel
def test_the_kernels_own_tunnel_is_named_by_its_device(machine: Machine) -> None:
    machine.sh("ip link add theirs type vxlan id 7 dstport 8472 local 192.0.2.1; ip link set theirs up")
    (found,) = machine.do(collisions, [mapping(protocol="udp", port=8472)], BOTH).collisions
    assert "tunnel device theirs" in machine.do(who_listens, machine.node, found.listener)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("host_ip", "has"),
    [
        ("192.0.2.1", True),
        ("2001:db8::1", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("0.0.0.0", True),
        ("::", True),
        (None, True),
        ("203.0.113.7", True),
        ("192.0.2.2", False),
        ("192.0.2.255", False),
        ("198.51.100.1", False),
        ("255.255.255.255", False),
        ("2001:db8::2", False),
        ("2001:db8:ffff::1", False),
        ("::1", False),
        ("10.0.0.5", False),
        ("fd00::5", False),
    ],
)
def test_a_host_ip_is_an_address_of_the_node_or_refused(
    machine: Machine, container: Room, host_ip: str | None, has: bool
) -> None:
    """Its own, on any link or by a local route; not its neighbours', nor its containers'."""
    machine.sh("ip route add local 203.0.113.0/24 dev lo; ip route del default; ip -6 route del default")
    machine.attach(container, "eth0", "10.0.0.5", "fd00::5")
    if has:
        assert machine.do(first_collision, machine.node, spec(mapping(host_ip)), BOTH) is None
    else:
        with pytest.raises(InvalidInput, match=f"does not have the address {host_ip}"):
            machine.do(first_collision, machine.node, spec(mapping(host_ip)), BOTH)


@pytest.mark.parametrize("host_ip", [None, "192.0.2.1", "2001:db8::1"])
def test_the_tunnels_port_is_nobodys_whether_there_is_a_tunnel_or_not(host_ip: str | None) -> None:
    with pytest.raises(PortTaken, match="--vxlan-port"):
        refuse_tunnel(spec(mapping(host_ip, "udp", 4789)), 4789)
    refuse_tunnel(spec(mapping(host_ip, "tcp", 4789), mapping(host_ip, "udp", 4788)), 4789)


def test_a_host_ip_of_a_family_that_the_endpoint_has_not_is_refused() -> None:
    refuse_families(spec(mapping(), mapping("192.0.2.1")), {4})
    for host_ip in ("2001:db8::1", "::"):
        with pytest.raises(InvalidInput, match="has no IPv6"):
            refuse_families(spec(mapping(host_ip)), {4})


FORKS = """
import os, pathlib, socket, time
made = socket.socket()
pathlib.Path("/proc/self/comm").write_bytes(b"a\\x1b[1m b")
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        time.sleep(3600)
    children.append(child)
print(os.fstat(made.fileno()).st_ino, *children, flush=True)
time.sleep(3600)
"""


def test_of_processes_that_share_a_socket_some_are_named_by_what_can_be_printed() -> None:
    with server_of_many() as (inode, pids):
        found = holders(inode)
        assert found == [f"a?[1m b (pid {pid})" for pid in sorted(pids)[:MOST_NAMED]]
    assert not holders(inode)


@contextlib.contextmanager
def server_of_many() -> Iterator[tuple[int, list[int]]]:
    """The inode of a socket, and the pids of all that have it open."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            inode, *children = map(int, process.stdout.readline().split())
            yield inode, [process.pid, *children]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    # Children of a process that was killed end on their own time.
    deadline = time.monotonic() + PATIENCE
    while holders(inode) and time.monotonic() < deadline:
        time.sleep(0.01)
