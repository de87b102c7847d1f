"""From where an agent may look at its endpoints, and what it does not see from there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipam.errors import InvalidInput
from isolator.journal import Journal
from isolator.model import Asked, Endpoint, EndpointKey, EndpointState
from isolator.window import INITIAL_PID_NAMESPACE, Window, blind, enter, window

BOOT = "boot-1"
HERE = Window(BOOT, "net:1", INITIAL_PID_NAMESPACE)
ENDPOINT = Endpoint(
    key=EndpointKey("c1", "eth0"),
    state=EndpointState.ATTACHED,
    request_id="r",
    asked=Asked(BOOT, 1),
    engine="cni",
    network="web",
    driver="routed",
    netns="/run/netns/c1",
    ips=(ip_address("10.0.0.1"),),
    host_ifname="mrg1",
    mac="0a:58:0a:00:00:01",
    mtu=1500,
)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """Of an agent that ran HERE."""
    journal = Journal(tmp_path / "journal.db", BOOT)
    enter(journal, HERE, tmp_path)
    yield journal
    journal.close()


def test_an_agent_with_endpoints_starts_in_no_other_network_namespace_of_the_same_boot(
    journal: Journal,
) -> None:
    journal.save_endpoint(ENDPOINT)
    with pytest.raises(InvalidInput, match="in another network namespace") as refused:
        enter(journal, replace(HERE, network="net:2"), Path("/var/lib/moorage"))
    assert "a container that was started anew, move /var/lib/moorage/journal.db* away" in str(refused.value)
    enter(journal, HERE, Path())


def test_an_agent_in_a_container_has_another_pid_namespace_at_each_start(journal: Journal) -> None:
    journal.save_endpoint(ENDPOINT)
    for number in (4, 5):
        inside = replace(HERE, processes=f"pid:[{number}]")
        enter(journal, inside, Path())
        assert blind(inside)
    enter(journal, HERE, Path())


def test_an_agent_without_endpoints_may_be_moved(journal: Journal) -> None:
    moved = replace(HERE, network="net:2")
    enter(journal, moved, Path())
    journal.save_endpoint(ENDPOINT)
    enter(journal, moved, Path())
    with pytest.raises(InvalidInput):
        enter(journal, HERE, Path())


def test_after_a_boot_every_namespace_is_another_one(journal: Journal) -> None:
    journal.save_endpoint(ENDPOINT)
    enter(journal, Window("boot-2", "net:7", "pid:[5]"), Path())


def test_a_journal_of_an_earlier_version_is_gone_on_with_anywhere(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db", BOOT)
    journal.save_endpoint(ENDPOINT)
    enter(journal, HERE, tmp_path)
    assert journal.window
    journal.close()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("rw,relatime", ""),
        ("rw,hidepid=0", ""),
        ("rw,hidepid=off", ""),
        ("rw,hidepid=invisible", "hidepid=invisible"),
    ],
)
def test_processes_that_proc_hides_are_not_seen(options: str, why: str) -> None:
    assert blind(HERE, [f"proc /proc proc {options} 0 0", "tmpfs /tmp tmpfs rw 0 0"]).endswith(why)


def test_in_a_pid_namespace_of_its_own_an_agent_does_not_see_the_others() -> None:
    assert blind(replace(HERE, processes="pid:[4]"))
    assert blind(replace(HERE, processes="")), "that of another one is mounted"


LOOK = (
    "from isolator.window import blind, window; print(blind(window('boot')), window('boot').network, sep='|')"
)


@pytest.mark.kernel
@pytest.mark.parametrize("mounts", [(), ("--mount-proc",)], ids=["the host's /proc", "its own /proc"])
def test_a_real_pid_namespace_is_known(mounts: tuple[str, ...]) -> None:
    command = ("unshare", "--pid", "--fork", *mounts, sys.executable, "-c", LOOK)
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert said == f"it runs in a PID namespace of its own|{window('boot').network}"


@pytest.mark.kernel
def test_a_real_network_namespace_is_another_window() -> None:
    name = f"mrg-window-{os.urandom(3).hex()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        command = ("nsenter", f"--net=/run/netns/{name}", sys.executable, "-c", LOOK)
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    assert said.partition("|")[2] != window("boot").network
