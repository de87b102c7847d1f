"""When a namespace is vacant: real ones, with processes, threads and handles."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest

from ipam.boottime import boottime
from isolator.drivers.naming import mac_for
from isolator.model import Asked, Endpoint, EndpointKey, EndpointState
from isolator.netlink import Node
from isolator.vacancy import SETTLED, is_vacant, may_be_vacant
from tests.isolator.rooms import sh

pytestmark = pytest.mark.kernel

IP = ip_address("10.64.0.5")
MAC = mac_for([IP])


@pytest.fixture
def name() -> Iterator[str]:
    """A namespace that a handle holds, with an interface of ours and no process."""
    name = f"mrg-vacant-{os.urandom(4).hex()}"
    sh(f"ip netns add {name}")
    sh(f"ip link add {host_end(name)} type veth peer name eth0 address {MAC} netns {name}")
    yield name
    sh(f"ip netns delete {name} || true; ip link delete {host_end(name)} 2>/dev/null || true")


def host_end(name: str) -> str:
    """The node's end of the interface in a namespace of ours."""
    return f"mrg{name.rpartition('-')[2]}"


@pytest.fixture
def node() -> Iterator[Node]:
    with Node() as node:
        yield node


def endpoint(name: str, **changes: object) -> Endpoint:
    made = Endpoint(
        key=EndpointKey("c", "eth0"),
        state=EndpointState.ATTACHED,
        request_id="r",
        asked=Asked("boot", boottime()),
        engine="mesos",
        network="web",
        driver="routed",
        netns=f"/run/netns/{name}",
        ips=(IP,),
        host_ifname=host_end(name),
        mac=MAC,
        mtu=1500,
    )
    return replace(made, **changes)


def test_a_namespace_is_vacant_when_its_last_process_has_ended(node: Node, name: str) -> None:
    assert is_vacant(node, endpoint(name))
    living = subprocess.Popen(["ip", "netns", "exec", name, "sleep", "1000"])
    try:
        while os.path.samefile(f"/proc/{living.pid}/ns/net", "/proc/self/ns/net"):
            pass  # ip has not stepped in yet
        assert not is_vacant(node, endpoint(name))
    finally:
        living.kill()
        living.wait()
    assert is_vacant(node, endpoint(name))


def test_one_thread_inside_is_enough_to_live_there(node: Node, name: str) -> None:
    inside, leave = threading.Event(), threading.Event()

    def step_in() -> None:
        with open(f"/run/netns/{name}", "rb") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), 0x40000000) == 0
        inside.set()
        leave.wait()

    thread = threading.Thread(target=step_in)
    thread.start()
    inside.wait()
    occupied = not is_vacant(node, endpoint(name))
    leave.set()
    thread.join()
    assert occupied


def test_a_path_that_leads_elsewhere_by_now_tells_nothing(node: Node, name: str) -> None:
    assert is_vacant(node, endpoint(name))
    other = f"{host_end(name)}x"
    sh(f"ip link add {other} type veth peer name {other}p address {MAC}")
    assert not is_vacant(node, endpoint(name, host_ifname=other)), (
        "another's link, of that name and with our MAC"
    )
    sh(f"ip link delete {other}")
    assert not is_vacant(node, endpoint(name, host_ifname=other))
    assert not is_vacant(node, endpoint(name, netns="/run/netns/mrg-not-there"))
    assert not is_vacant(node, endpoint(name, netns="/proc/self/ns/net"))
    assert not is_vacant(node, endpoint(name, netns=""))


LOOK = """
import sys
from isolator.netlink import Node
from isolator.vacancy import is_vacant
from tests.isolator.test_vacancy import endpoint
with Node() as node:
    print(is_vacant(node, endpoint(sys.argv[1])))
"""


def test_from_a_pid_namespace_of_its_own_nothing_looks_vacant(name: str) -> None:
    """A process lives there, or none does: it is not seen."""
    command = ("unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", LOOK, name)
    living = subprocess.Popen(["ip", "netns", "exec", name, "sleep", "1000"])
    try:
        occupied = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    finally:
        living.kill()
        living.wait()
    empty = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (occupied, empty) == ("False\n", "False\n")


def test_another_engines_container_may_have_no_process_yet() -> None:
    assert may_be_vacant(endpoint("x"))
    assert not may_be_vacant(endpoint("x", engine="cni"))
    assert may_be_vacant(endpoint("x", engine="cni", asked=Asked("boot", boottime() - SETTLED - 1)))
