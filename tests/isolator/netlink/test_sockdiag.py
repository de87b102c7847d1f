"""Who listens, as the kernel tells of real sockets in a namespace, and as bytes where this kernel has none."""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import ip_address
from struct import pack

import pytest

from isolator.errors import KernelRefused
from isolator.netlink import sockdiag
from isolator.netlink.codec import Message, attribute
from isolator.netlink.sockdiag import Listener, dump_listeners, listeners, parse_listener
from isolator.netlink.socket import NETLINK_SOCK_DIAG, NetlinkSocket
from tests.isolator.rooms import Room

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
V4, V6 = socket.AF_INET, socket.AF_INET6


def listen(room: Room, protocol: str, ip: str, port: int, *, only_ipv6: bool = False) -> socket.socket:
    """A socket inside that can be called. ip: decides the family."""
    made = room.unbound(V6 if ":" in ip else V4, TCP if protocol == "tcp" else UDP)
    if made.family == V6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
    made.bind((ip, port))
    if protocol == "tcp":
        made.listen()
    return made


def heard(room: Room, protocol: str, *ports: int) -> set[tuple[str, int, bool]]:
    return {(str(one.ip), one.port, one.only_ipv6) for one in room.do(listeners, protocol, set(ports))}


@pytest.mark.kernel
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("ip", "only_ipv6", "found"),
    [
        ("0.0.0.0", False, "0.0.0.0"),
        ("127.0.0.53", False, "127.0.0.53"),
        ("::", False, "::"),
        ("::", True, "::"),
        ("::1", False, "::1"),
        ("::ffff:127.0.0.1", False, "127.0.0.1"),
        ("::ffff:0.0.0.0", False, "0.0.0.0"),
    ],
)
def test_a_socket_is_found_with_what_it_is_bound_to(
    container: Room, protocol: str, ip: str, only_ipv6: bool, found: str
) -> None:
    listen(container, protocol, ip, 7000, only_ipv6=only_ipv6)
    assert heard(container, protocol, 7000) == {(found, 7000, only_ipv6)}
    assert heard(container, protocol, 7000, 7001) == {(found, 7000, only_ipv6)}
    assert not heard(container, protocol, 7001)
    assert not heard(container, protocol)


@pytest.mark.kernel
def test_the_inode_is_the_one_that_the_owner_has_open(container: Room) -> None:
    made = listen(container, "tcp", "0.0.0.0", 7000)
    (found,) = container.do(listeners, "tcp", {7000})
    assert os.readlink(f"/proc/self/fd/{made.fileno()}") == f"socket:[{found.inode}]"


@pytest.mark.kernel
def test_who_is_connected_or_only_bound_does_not_listen(container: Room) -> None:
    container.unbound(V4, TCP).bind(("127.0.0.1", 7000))
    server = listen(container, "tcp", "127.0.0.1", 7001)
    client = container.unbound(V4, TCP)
    client.bind(("127.0.0.1", 7002))
    client.connect(server.getsockname())
    asking = container.unbound(V4, UDP)
    asking.bind(("0.0.0.0", 7000))
    asking.connect(("127.0.0.1", 53))
    assert heard(container, "tcp", 7000, 7001, 7002) == {("127.0.0.1", 7001, False)}
    assert not heard(container, "udp", 7000)


@pytest.mark.kernel
def test_sockets_of_other_namespaces_are_not_found(container: Room) -> None:
    with Room("other") as other:
        listen(other, "tcp", "0.0.0.0", 7000)
        assert not heard(container, "tcp", 7000)


@pytest.mark.kernel
def test_more_sockets_than_fit_one_datagram_are_all_found(container: Room) -> None:
    ports = range(7000, 7400)
    for port in ports:
        listen(container, "udp", "::", port)
    assert heard(container, "udp", *ports) == {("::", port, False) for port in ports}


@pytest.mark.kernel
@pytest.mark.parametrize("family", ["local 127.0.0.1", "local ::1"])
def test_a_tunnel_of_the_kernel_is_found_without_a_process(container: Room, family: str) -> None:
    container.sh(f"ip link add vx0 type vxlan id 5 dstport 7000 {family}; ip link set vx0 up")
    assert heard(container, "udp", 7000)


@pytest.mark.kernel
def test_a_kernel_without_sctp_has_nobody_that_listens(container: Room) -> None:
    assert not heard(container, "sctp", 7000)


@pytest.mark.kernel
def test_a_kernel_that_cannot_tell_says_so(container: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    no_kernel_has = 253
    monkeypatch.setitem(sockdiag._PROTOCOLS, "udp", (no_kernel_has, 1 << 7))
    with pytest.raises(KernelRefused, match="list who listens on udp ports") as refused:
        container.do(listeners, "udp", {7000})
    assert refused.value.errno == errno.ENOENT


def a_socket(family: int, ip: str, port: int, *attributes: bytes, inode: int = 9) -> Message:
    """struct inet_diag_msg of a listener, as the kernel sends it."""
    source = ip_address(ip).packed.ljust(16, b"\0")
    body = bytes([family, 10, 0, 0]) + pack(">HH", port, 0) + source + bytes(16 + 12 + 16) + pack("=I", inode)
    return Message(20, 0, 1, memoryview(body + b"".join(attributes)))


def sockaddr(family: int, ip: str) -> bytes:
    packed = ip_address(ip).packed
    before = pack("=H", family) + pack(">H", 99) + (bytes(4) if family == V6 else b"")
    return (before + packed).ljust(128, b"\0")


def test_a_socket_of_sctp_listens_on_every_address_that_it_is_bound_to() -> None:
    """Laid out as net/sctp/diag.c does, for want of a kernel with SCTP."""
    ips = ("192.0.2.1", "2001:db8::1")
    listed = attribute(12, sockaddr(V4, ips[0]) + sockaddr(V6, ips[1]) + bytes(128))
    found = list(parse_listener(a_socket(V6, "::", 99, attribute(11, b"\1"), listed), "sctp"))
    assert found == [Listener("sctp", ip_address(ip), 99, inode=9) for ip in ips]


def test_a_socket_is_read_from_its_bytes() -> None:
    message = a_socket(V4, "192.0.2.1", 31080, attribute(8, b"\0"), inode=77)
    assert list(parse_listener(message, "tcp")) == [
        Listener("tcp", ip_address("192.0.2.1"), 31080, False, 77)
    ]


def test_what_is_asked_for_is_filtered_by_the_kernel() -> None:
    request = dump_listeners("tcp", V6, 31080)
    assert request.kind == 20
    assert len(request.body) == 56
    assert request.body[:12] == bytes([V6, 6, 0, 0]) + pack("=I", 1 << 10) + pack(">HH", 31080, 0)


@pytest.mark.kernel
def test_the_kernel_honours_the_filters(container: Room) -> None:
    for port in (7000, 7001):
        listen(container, "tcp", "127.0.0.1", port)
    with container.do(NetlinkSocket, NETLINK_SOCK_DIAG) as diag:
        for port, expected in ((7000, 1), (0, 2)):
            assert len(diag.dump(dump_listeners("tcp", V4, port))) == expected
        assert not diag.dump(dump_listeners("tcp", V6))
        assert not diag.dump(dump_listeners("udp", V4))
