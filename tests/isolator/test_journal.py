"""The journal keeps what it was given, whole, and never pretends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec
import pytest

from ipam.errors import StoreError
from ipam.journal import AddressRow, BlockRow
from ipam.records import Address, AddressState, Label
from isolator.errors import JournalUnwritable
from isolator.journal import SCHEMA_VERSION, Journal
from isolator.model import (
    UNLIMITED,
    Asked,
    Bandwidth,
    Endpoint,
    EndpointKey,
    EndpointState,
    Limit,
    PortMapping,
)

BOOT = "5c5a1c1e-0000-4000-8000-000000000001"
KEY = EndpointKey("c1", "eth0")
ENDPOINT = Endpoint(
    key=KEY,
    state=EndpointState.ATTACHED,
    request_id="r1",
    asked=Asked(BOOT, 12345),
    engine="mesos",
    network="web",
    driver="routed",
    netns="/run/netns/x",
    ips=(ip_address("10.0.0.1"), ip_address("fd00::1")),
    host_ifname="mrgabc",
    mac="02:00:00:00:00:01",
    mtu=1450,
    netgroups=("web", "db"),
    labels=(Label("dup", "1"), Label("dup", "2"), Label("empty", ""), Label("none")),
    default_route=True,
    nameservers=("10.0.0.53",),
    search=("svc.internal",),
    since=1.5,
    port_mappings=(
        PortMapping("tcp", 31080, 80),
        PortMapping("udp", 53, 5353, ip_address("192.0.2.1")),
        PortMapping("sctp", 9, 9, ip_address("::")),
    ),
    bandwidth=Bandwidth(ingress=Limit(10**7), egress=Limit(10**6, 80_000)),
    engine_network="web-of-the-engine",
    next_hop=254,
    pools=(ip_network("10.0.0.0/24"), ip_network("fd00::/64")),
)
ADDRESS = AddressRow(
    ip_address("10.0.0.1"),
    Address(pool="10.0.0.0-24", state=AddressState.ASSIGNED, node="a", id="i", unknown={"later": [1]}),
    7,
    True,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.db"


def test_everything_written_is_there_when_it_is_opened_again(path: Path) -> None:
    journal = Journal(path, BOOT)
    block = BlockRow(ip_network("10.0.0.0/26"), "10.0.0.0-24", 3)
    with journal.transaction():
        journal.save_endpoint(ENDPOINT)
        journal.save_addresses([ADDRESS])
        journal.save_block(block)
        journal.save_cache([("networks/web", b"{}", 4)], [])
        journal.save_tombstone(KEY, Asked(BOOT, 99))
        journal.save_confirmed_seq(12)
    journal.close()

    again = Journal(path, BOOT)
    assert again.load_endpoints() == [ENDPOINT]
    assert again.load_addresses() == [ADDRESS]
    assert again.load_blocks() == [block]
    assert again.load_cache() == [("networks/web", b"{}", 4)]
    assert again.load_tombstones() == {KEY: Asked(BOOT, 99)}
    assert again.confirmed_seq == 12
    again.close()


def test_a_journal_of_an_older_moorage_is_read_and_no_longer_one_of_its_own(path: Path) -> None:
    journal = Journal(path, BOOT)
    older = replace(ENDPOINT, port_mappings=(), bandwidth=UNLIMITED, engine_network="", next_hop=1, pools=())
    journal.save_endpoint(older)
    fields = msgspec.json.decode(journal._db.execute("SELECT value FROM endpoints").fetchone()[0])
    for newer in ("port_mappings", "bandwidth", "engine_network", "next_hop", "pools"):
        del fields[newer]
    journal._db.execute("UPDATE endpoints SET value = ?", (msgspec.json.encode(fields),))
    journal._set_meta("schema", "1")
    journal.close()
    again = Journal(path, BOOT)
    assert again.load_endpoints() == [older]
    assert again._meta("schema") == str(SCHEMA_VERSION)
    assert not again.rebuilt
    again.close()


def test_it_is_of_this_boot_only_once_it_agreed_with_the_store(path: Path) -> None:
    journal = Journal(path, "another boot")
    journal.own_boot()
    journal.close()
    for _ in range(2):
        # However often an agent starts without hearing the store.
        journal = Journal(path, BOOT)
        assert not journal.is_of_this_boot
        journal.close()
    journal = Journal(path, BOOT)
    journal.own_boot()
    journal.close()
    journal = Journal(path, BOOT)
    assert journal.is_of_this_boot
    journal.close()


def test_it_opens_on_a_full_disk_once_it_exists(path: Path) -> None:
    journal = Journal(path, BOOT)
    journal.own_boot()
    journal.save_endpoint(ENDPOINT)
    before = journal._db.total_changes
    journal.close()
    again = Journal(path, BOOT)
    again.own_boot()
    assert (again._db.total_changes, before > 0) == (0, True)
    again.close()


def test_a_new_journal_is_of_no_boot_and_private(path: Path) -> None:
    journal = Journal(path, BOOT)
    assert not journal.is_of_this_boot
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    journal.close()


def test_a_transaction_that_raises_leaves_nothing(path: Path) -> None:
    journal = Journal(path, BOOT)
    with pytest.raises(ZeroDivisionError), journal.transaction():
        journal.save_endpoint(ENDPOINT)
        with journal.transaction():
            journal.save_addresses([ADDRESS])
        raise ZeroDivisionError
    assert journal.load_endpoints() == []
    assert journal.load_addresses() == []
    journal.close()


def test_a_write_that_the_disk_refuses_changes_nothing_and_names_the_file(path: Path) -> None:
    journal = Journal(path, BOOT)
    journal.save_endpoint(ENDPOINT)
    journal._db.execute(f"PRAGMA max_page_count = {journal._db.execute('PRAGMA page_count').fetchone()[0]}")
    rows = [AddressRow(ip_address(f"10.0.{n}.1"), ADDRESS.record, 1, False) for n in range(250)]
    with pytest.raises(JournalUnwritable, match=str(path)), journal.transaction():
        journal.drop_endpoint(KEY)
        journal.save_addresses(rows)
    assert journal.load_endpoints() == [ENDPOINT]
    assert journal.load_addresses() == []
    journal.close()


@pytest.mark.parametrize("damage", ["overwritten", "cut", "one row"])
def test_a_damaged_journal_is_kept_aside_and_begun_anew(path: Path, damage: str) -> None:
    journal = Journal(path, BOOT)
    journal.save_endpoint(ENDPOINT)
    if damage == "one row":
        journal._db.execute("UPDATE endpoints SET value = 'nonsense'")
    journal.close()
    if damage == "overwritten":
        path.write_bytes(b"no database at all" * 1000)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: 3 * 4096])
    again = Journal(path, BOOT)
    assert again.rebuilt
    assert again.load_endpoints() == []
    assert not again.is_of_this_boot
    assert len(list(path.parent.glob("journal.db.corrupt-*"))) >= 1
    again.close()


def test_a_journal_of_a_newer_moorage_is_refused_and_left_alone(path: Path) -> None:
    journal = Journal(path, BOOT)
    journal._set_meta("schema", "99")
    journal.close()
    with pytest.raises(StoreError, match="newer moorage"):
        Journal(path, BOOT)
    assert not list(path.parent.glob("*.corrupt-*"))


def test_every_commit_survives_kill_9(path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from tests.isolator.test_journal import ENDPOINT, BOOT
from isolator.journal import Journal
from isolator.model import EndpointKey
from dataclasses import replace
journal = Journal(Path({str(path)!r}), BOOT)
for n in range(100000):
    journal.save_endpoint(replace(ENDPOINT, key=EndpointKey(f"c{{n}}", "eth0")))
    print(n, flush=True)
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert writer.stdout is not None
    seen = 0
    for line in writer.stdout:
        seen = int(line)
        if seen == 300:
            os.kill(writer.pid, signal.SIGKILL)
            break
    rest = writer.stdout.read().split()
    writer.stdout.close()
    writer.wait()
    last = int(rest[-1]) if rest else seen
    journal = Journal(path, BOOT)
    kept = {endpoint.key.container_id for endpoint in journal.load_endpoints()}
    assert {f"c{n}" for n in range(last + 1)} <= kept
    journal.close()
