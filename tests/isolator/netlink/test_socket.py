"""The batching socket."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from isolator.errors import KernelRefused
from isolator.netlink import codec, messages
from isolator.netlink.codec import Request
from isolator.netlink.socket import NetlinkSocket
from tests.isolator.rooms import Room

pytestmark = pytest.mark.kernel


def test_a_batch_goes_on_after_a_refusal_and_then_names_it(container: Room) -> None:
    with container.do(NetlinkSocket) as route:
        bad = messages.add_address(4711, "nothing", ip_address("10.0.0.1"))
        good = messages.link_up(1, "lo")
        with pytest.raises(KernelRefused, match=r"add the address 10\.0\.0\.1 to nothing") as refused:
            route.execute([bad, messages.add_address(1, "lo", ip_address("10.0.0.2")), good])
        assert refused.value.errno == errno.ENODEV
    assert "10.0.0.2/32" in container.sh("ip addr show dev lo")


def test_an_answer_declared_fine_is_no_error(container: Room) -> None:
    with container.do(NetlinkSocket) as route:
        route.execute([messages.delete_link("nothing")])
        assert route.get(messages.get_link("nothing")) is None


def test_a_large_batch_is_all_carried_out(container: Room) -> None:
    with container.do(NetlinkSocket) as route:
        ips = [ip_address("10.0.0.0") + i for i in range(1000)]
        route.execute([messages.add_address(1, "lo", ip) for ip in ips])
    assert container.sh("ip -o -4 addr show dev lo").count("inet 10.0.") == 1000


def test_the_kernels_own_words_are_in_the_error(container: Room) -> None:
    with container.do(NetlinkSocket) as route, pytest.raises(KernelRefused, match=r"\(.+\)"):
        route.execute([messages.add_default_route(4711, "nothing", ip_address("10.0.0.1"))])


class Interrupted(NetlinkSocket):
    """A kernel whose dumps are interrupted by changes, so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def stream(self, request: Request) -> Iterator[bytes]:
        self.times -= 1
        flags = codec.NLM_F_DUMP_INTR if self.times >= 0 else 0
        yield Request(messages.RTM_NEWLINK, flags, b"body", "").encode(0, 1)
        yield Request(codec.NLMSG_DONE, 0, bytes(4), "").encode(0, 1)


def test_an_interrupted_dump_is_repeated() -> None:
    with Interrupted(3) as route:
        assert [bytes(message.body) for message in route.dump(messages.dump_links())] == [b"body"]
        assert route.times == -1


def test_a_dump_that_never_settles_is_given_up() -> None:
    with Interrupted(1000) as route, pytest.raises(KernelRefused, match="changed all the time"):
        route.dump(messages.dump_links())
