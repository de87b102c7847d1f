"""The reading side of the spool: what is believed, what is moved aside, and when it is carried out."""

import asyncio
import os
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipam.supervision import Supervision
from isolator.model import EndpointKey
from netmodules import frame
from netmodules.spool import NETMODULES, Entry, Spool, SpoolWatcher
from tests.patience import PATIENCE

KEY = EndpointKey("c0ffee", "eth0")
OTHER = EndpointKey("c0ffee", "eth1")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "spool"
    path.mkdir(mode=0o700)
    return path


def name_of(key: EndpointKey, call_id: str) -> str:
    return f"{zlib.crc32(str(key).encode()):08x}-{call_id}.del"


def content(key: EndpointKey = KEY, call_id: str = "0" * 32, **fields: bytes) -> bytes:
    return frame.encode(
        {
            "call": b"cni",
            "request": call_id.encode(),
            "boot": b"1111-2222",
            "started": b"7",
            "env.CNI_COMMAND": b"DEL",
            "env.CNI_CONTAINERID": key.container_id.encode(),
            "env.CNI_IFNAME": key.ifname.encode(),
            "stdin": b"garbage",
            **{name.replace("__", "."): value for name, value in fields.items()},
        }
    )


def leave(directory: Path, key: EndpointKey = KEY, call_id: str = "0" * 32, **fields: bytes) -> Path:
    path = directory / name_of(key, call_id)
    path.write_bytes(content(key, call_id, **fields))
    return path


def bad(directory: Path) -> list[str]:
    return os.listdir(directory / "bad") if (directory / "bad").exists() else []


def test_a_spool_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    assert Spool(tmp_path / "none").entries() == []


def test_entries_come_in_the_order_of_their_calls_for_one_key_or_all(directory: Path) -> None:
    leave(directory, KEY, "2" * 32, started=b"9")
    leave(directory, OTHER, "1" * 32, started=b"8")
    leave(directory, KEY, "3" * 32, started=b"10")
    spool = Spool(directory)
    assert [entry.request.request_id[0] for entry in spool.entries()] == ["1", "2", "3"]
    assert [entry.request.request_id[0] for entry in spool.entries(KEY)] == ["2", "3"]
    assert [entry.key for entry in spool.entries(OTHER)] == [OTHER]


def test_removing_twice_is_fine(directory: Path) -> None:
    path = leave(directory)
    [entry] = Spool(directory).entries()
    for _ in range(2):
        Spool(directory).remove(entry)
    assert not path.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage",
        b"XXXX" + content()[4:],
        content()[:-1],
        content() + b"x",
        frame.MAGIC + b"\xff\xff\xff\xff",
        frame.encode({}),
        content(call=b"admin"),
        content(env__CNI_COMMAND=b"ADD"),
        content(env__CNI_CONTAINERID=b"../../etc"),
        content(env__CNI_CONTAINERID=b"another"),
        content(request=b"1" * 32),
        content(started=b"soon"),
        frame.encode({"stdin": b"x" * frame.MAX_PAYLOAD}),
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_what_cannot_be_believed_is_moved_aside_and_the_rest_is_read(directory: Path, raw: bytes) -> None:
    path = directory / name_of(KEY, "0" * 32)
    path.write_bytes(raw)
    leave(directory, OTHER)
    assert [entry.key for entry in Spool(directory).entries()] == [OTHER]
    assert not path.exists()
    assert [name.partition("-")[2] for name in bad(directory)] == [path.name]


def test_links_pipes_directories_and_files_of_others_are_moved_aside(directory: Path) -> None:
    target = directory.parent / "target"
    target.write_bytes(content())
    (directory / "a.del").symlink_to(target)
    os.mkfifo(directory / "b.del")
    (directory / "c.del").mkdir()
    (directory / "d.del").symlink_to("nowhere")
    spool = Spool(directory)
    assert spool.entries() == []
    assert len(bad(directory)) == 4
    assert target.exists()
    leave(directory)
    spool._uid = os.geteuid() + 1
    assert spool.entries() == []
    assert len(bad(directory)) == 5


def test_files_being_written_are_left_alone_until_they_are_old(directory: Path) -> None:
    fresh = directory / (".fresh")
    fresh.write_bytes(b"half")
    dead = directory / ".dead"
    dead.write_bytes(b"half")
    os.utime(dead, (1, 1))
    assert Spool(directory).entries() == []
    assert (fresh.exists(), dead.exists()) == (True, False)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary() | st.dictionaries(st.text(max_size=5), st.binary(max_size=9)).map(frame.encode))
def test_no_content_stops_the_reader(directory: Path, raw: bytes) -> None:
    (directory / name_of(KEY, "0" * 32)).write_bytes(raw)
    assert Spool(directory).entries() == []


class Carrier:
    """Carries out entries by remembering them."""

    def __init__(self) -> None:
        self.done: list[Entry] = []
        self.failures = 0

    async def __call__(self, entry: Entry) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("not now")
        self.done.append(entry)


async def test_new_entries_are_carried_out_and_removed_until_the_watcher_is_stopped(directory: Path) -> None:
    carrier = Carrier()
    watcher = SpoolWatcher(Spool(directory), carrier, Supervision())
    await watcher.start()
    await asyncio.sleep(0.05)
    path = leave(directory)
    async with asyncio.timeout(PATIENCE):
        while path.exists():
            await asyncio.sleep(0.01)
    assert [entry.key for entry in carrier.done] == [KEY]
    await watcher.stop()
    path = leave(directory)
    await asyncio.sleep(0.3)
    assert path.exists()


async def test_an_entry_that_fails_stays_and_is_tried_again_without_holding_up_others(
    directory: Path,
) -> None:
    carrier = Carrier()
    carrier.failures = 3
    leave(directory, KEY)
    leave(directory, OTHER)
    watcher = SpoolWatcher(Spool(directory), carrier, Supervision(), interval=0.02)
    await watcher.start()
    async with asyncio.timeout(PATIENCE):
        while Spool(directory).entries():
            await asyncio.sleep(0.01)
    await watcher.stop()
    assert {entry.key for entry in carrier.done} == {KEY, OTHER}


async def test_drain_does_one_keys_entries_now_and_passes_failure_on(directory: Path) -> None:
    carrier = Carrier()
    watcher = SpoolWatcher(Spool(directory), carrier, Supervision())
    mine, theirs = leave(directory, KEY), leave(directory, OTHER)
    carrier.failures = 1
    with pytest.raises(OSError, match="not now"):
        await watcher.drain(KEY)
    assert mine.exists()
    await watcher.drain(KEY)
    assert (mine.exists(), theirs.exists()) == (False, True)
    await watcher.drain()
    assert [entry.key for entry in carrier.done] == [KEY, OTHER]


async def test_an_entry_is_never_carried_out_twice_at_once(directory: Path) -> None:
    seen: list[Entry] = []

    async def slow(entry: Entry) -> None:
        seen.append(entry)
        await asyncio.sleep(0.05)

    watcher = SpoolWatcher(Spool(directory), slow, Supervision(), interval=0.01)
    leave(directory)
    await watcher.start()
    await asyncio.gather(*(watcher.drain(KEY) for _ in range(5)))
    await watcher.stop()
    assert len(seen) == 1


@pytest.mark.parametrize("what", ["link", "writable"])
def test_a_spool_that_others_could_have_filled_is_not_used(tmp_path: Path, what: str) -> None:
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    directory = tmp_path / "spool"
    if what == "link":
        directory.symlink_to(real)
    else:
        directory = real
        real.chmod(0o777)
    (real / "evil.del").write_bytes(b"evil")
    assert Spool(directory).entries() == []
    assert (real / "evil.del").exists()
    assert not (real / "bad").exists()


def test_nothing_is_moved_aside_through_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o700)
    (spool / "bad").symlink_to(elsewhere)
    (spool / "evil.del").write_bytes(b"evil")
    assert Spool(spool).entries() == []
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("command", ["release", "cleanup"])
def test_calls_of_net_modules_are_read_in_the_order_they_were_made_in(directory: Path, command: str) -> None:
    for number, at in ((1, 20), (2, 10)):
        leave_call(directory, command, f"{number:032x}", at)
    entries = Spool(directory).entries(NETMODULES)
    assert [entry.request.asked.at for entry in entries] == [10, 20]
    assert {entry.request.command for entry in entries} == {command}


def test_a_call_of_net_modules_that_takes_something_is_not_believed(directory: Path) -> None:
    leave_call(directory, "isolate", f"{1:032x}", 10)
    assert Spool(directory).entries() == []
    assert len(bad(directory)) == 1


def leave_call(directory: Path, command: str, call_id: str, at: int) -> None:
    fields = {
        "call": b"netmodules",
        "request": call_id.encode(),
        "boot": b"1111-2222",
        "started": b"%d" % at,
        "env.NETMODULES_COMMAND": command.encode(),
        "stdin": b"{}",
    }
    (directory / name_of(NETMODULES, call_id)).write_bytes(frame.encode(fields))
