"""The journal keeps what it was given, whole, and never pretends."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
import sqlite3
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
from isolator.journal import Journal
from isolator.journal_file import SCHEMA_VERSION, is_damage
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
from isolator.written import encode_endpoint

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


BEFORE_CHECKSUMS = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE endpoints (
    container_id TEXT NOT NULL, ifname TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (container_id, ifname)
) WITHOUT ROWID;
CREATE TABLE addresses (
    ip TEXT PRIMARY KEY, record BLOB NOT NULL, revision INTEGER NOT NULL, dirty INTEGER NOT NULL
) WITHOUT ROWID;
"""
"""Tables of schema 4 and before, as far as they matter here."""


def test_a_journal_of_an_older_moorage_is_read_and_no_longer_one_of_its_own(path: Path) -> None:
    older = replace(ENDPOINT, port_mappings=(), bandwidth=UNLIMITED, engine_network="", next_hop=1, pools=())
    fields = msgspec.json.decode(encode_endpoint(older))
    for newer in ("port_mappings", "bandwidth", "engine_network", "next_hop", "pools", "lost"):
        del fields[newer]
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(BEFORE_CHECKSUMS)
        db.execute(
            "INSERT INTO meta VALUES ('schema', '1'), ('boot_id', ?), ('confirmed_seq', '12')", (BOOT,)
        )
        db.execute("INSERT INTO endpoints VALUES ('c1', 'eth0', ?)", (msgspec.json.encode(fields),))
        db.execute("INSERT INTO addresses VALUES ('10.0.0.1', ?, 7, 1)", (ADDRESS.record.encode(),))
    for _ in range(2):
        again = Journal(path, BOOT)
        assert again.load_endpoints() == [older]
        assert again.load_addresses() == [ADDRESS]
        assert (again.confirmed_seq, again.is_of_this_boot) == (12, True)
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
        journal.drop_endpoints([KEY])
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


# -- what is no damage


def test_rows_that_do_not_all_fit_are_none_of_them_written(path: Path) -> None:
    journal = Journal(path, BOOT)
    journal._db.execute(f"PRAGMA max_page_count = {journal._db.execute('PRAGMA page_count').fetchone()[0]}")
    rows = [AddressRow(ip_address(f"10.0.{n}.1"), ADDRESS.record, 1, False) for n in range(250)]
    with pytest.raises(JournalUnwritable):
        journal.save_addresses(rows)
    assert journal.load_addresses() == []
    journal.close()


def untouched(path: Path) -> bool:
    return not list(path.parent.glob("*.corrupt-*"))


def test_a_locked_journal_is_refused_naming_the_lock_and_left_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, timeout=0.1))
    Journal(path, BOOT).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(JournalUnwritable, match="end the program that has it locked"):
            Journal(path, BOOT)
    assert untouched(path)
    Journal(path, BOOT).close()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EROFS, errno.ENOSPC])
def test_a_journal_that_cannot_be_opened_is_refused_and_left_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    Journal(path, BOOT).close()

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(JournalUnwritable, match=os.strerror(number)):
            Journal(path, BOOT)
    assert untouched(path)


@pytest.mark.parametrize(
    "code",
    [
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_BUSY,
    ],
)
def test_what_sqlite_says_of_a_disk_is_no_damage(code: int) -> None:
    error = sqlite3.OperationalError("it is so")
    error.sqlite_errorcode = code
    assert not is_damage(error)


# -- that it is the file on the disk


@pytest.mark.parametrize("gone", ["the log", "all of it", "replaced by an older copy"])
def test_a_journal_whose_files_were_taken_away_is_written_anew_with_all_that_it_had(
    path: Path, gone: str
) -> None:
    journal = Journal(path, BOOT)
    journal.save_addresses([ADDRESS])
    shutil.copy(path, path.with_suffix(".older"))
    journal.save_endpoint(ENDPOINT)
    log = Path(f"{path}-wal")
    log.unlink()
    if gone != "the log":
        path.unlink()
    if gone == "replaced by an older copy":
        path.with_suffix(".older").rename(path)
    journal.save_confirmed_seq(12)
    # Not closed: an agent that is killed.
    found = path.with_name("found.db")
    shutil.copy(path, found)
    shutil.copy(log, f"{found}-wal")
    again = Journal(found, BOOT)
    assert (again.load_endpoints(), again.load_addresses(), again.confirmed_seq) == (
        [ENDPOINT],
        [ADDRESS],
        12,
    )
    again.close()
    kept = [file for file in path.parent.glob("journal.db.replaced-*") if "-shm" not in file.name]
    assert len(kept) == (gone == "replaced by an older copy")
    journal.close()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(1, 4))
def test_an_agent_that_dies_while_it_writes_its_journal_anew_leaves_all_or_what_was_taken_away(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    journal = Journal(path, BOOT)
    journal.save_endpoint(ENDPOINT)
    state_id = journal.state_id
    path.unlink()
    left, rename = [step], Path.rename

    def dies(self: Path, target: Path) -> Path:
        left[0] -= 1
        if not left[0]:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with contextlib.suppress(Killed):
        journal.keep_in_place()
    monkeypatch.undo()
    is_whole = step > 1
    journal.close()
    again = Journal(path, BOOT)
    assert (again.load_endpoints(), again.state_id == state_id) == ([ENDPOINT] if is_whole else [], is_whole)
    again.close()
    assert [file.name for file in path.parent.iterdir() if ".anew" in file.name] == []


def test_a_copy_that_was_not_needed_is_not_gone_back_to(path: Path) -> None:
    journal = Journal(path, BOOT)
    shutil.copy(path, f"{path}.anew")
    journal.save_endpoint(ENDPOINT)
    journal.close()
    again = Journal(path, BOOT)
    assert again.load_endpoints() == [ENDPOINT]
    again.close()
    path.unlink()
    Journal(path, BOOT).close()
    assert not Path(f"{path}.anew").exists()


def test_a_journal_that_cannot_be_written_anew_goes_on_where_it_is_and_is_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(path, BOOT)
    journal.save_endpoint(ENDPOINT)
    Path(f"{path}-wal").unlink()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("isolator.journal_file.write_copy", refuse)
        with pytest.raises(JournalUnwritable):
            journal.save_addresses([ADDRESS])
    assert journal.load_endpoints() == [ENDPOINT]
    journal.save_addresses([ADDRESS])
    journal.close()
    again = Journal(path, BOOT)
    assert (again.load_endpoints(), again.load_addresses()) == ([ENDPOINT], [ADDRESS])
    again.close()


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


def test_a_value_by_name_that_is_no_text_any_more_is_damage(tmp_path: Path) -> None:
    """Each of them, also what is read only after the start."""
    path = tmp_path / "journal.db"
    journal = Journal(path, BOOT)
    journal.save_node("node-1")
    journal.save_machine_id("0123456789abcdef")
    journal.save_window('{"boot_id":"boot"}')
    journal.save_instances(["instance-1"])
    journal.save_grace(b'{"until":1.5}')
    journal.save_known(b'{"cluster":"c"}')
    journal.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        values = dict(db.execute("SELECT key, value FROM meta"))
    whole = path.read_bytes()
    assert {"node", "machine_id", "window", "state_id"} <= values.keys()
    for key, value in values.items():
        text = str(value).encode()
        if len(text) > 3:  # numbers are looked at elsewhere
            assert text in whole, key
            path.write_bytes(whole.replace(text, text[:2] + b"\xbe" + text[3:]))
            damaged = Journal(path, BOOT)
            assert damaged.rebuilt, key
            damaged.close()
