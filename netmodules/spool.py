"""The spool: DELs, and the like, that hooks left while no agent answered (netmodules/hook.py writes them).

    <socket dir>/spool/<crc32 of container_id/ifname>-<request id>.del    one request frame
                       <crc32 of netmodules/calls>-<request id>.del       a release or cleanup of net-modules
                       .<request id>                                     being written
                       bad/                                              what could not be believed

An entry is acted on only if it is a regular file of the agent's own user, holds one whole frame of such a call
and is named after what it holds; anything else is moved aside, to be looked at, and never stops the rest.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from ipam.errors import MoorageError
from ipam.supervision import Supervision
from isolator.model import EndpointKey
from netmodules import frame
from netmodules.cni.environment import read_key
from netmodules.request import Request, parse_request

log = structlog.get_logger(__name__)

SUFFIX = ".del"
NETMODULES = EndpointKey("netmodules", "calls")
"""In place of an endpoint's key: all calls of net-modules are carried out in one order."""

# Seconds after which a file that a hook was writing belongs to a hook that died.
TEMPORARY_AGE = 60.0


LOOK_AGAIN = 5.0
"""Seconds at most between looks at a spool that cannot be read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A DEL, or the like, that waits to be carried out."""

    path: Path
    key: EndpointKey
    request: Request


class Spool:
    """The reading side of one spool directory, which need not exist."""

    def __init__(self, directory: Path) -> None:
        self._distrusted: set[Path] = set()
        self._directory = directory
        self._uid = os.geteuid()

    def entries(self, key: EndpointKey | None = None) -> list[Entry]:
        """All entries, or one endpoint's, in the order the calls were made; bad ones are moved aside."""
        prefix = f"{_digest(key)}-" if key else ""
        try:
            if not _is_private(self._directory):
                self._distrust(self._directory)
                return []
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        found = [self._entry(name) for name in names if name.startswith(prefix)]
        wanted = [entry for entry in found if entry is not None and key in (None, entry.key)]
        return sorted(wanted, key=lambda entry: (entry.request.asked.boot_id, entry.request.asked.at))

    def remove(self, entry: Entry) -> None:
        """Forget a DEL that was carried out; its hook may have removed it already."""
        entry.path.unlink(missing_ok=True)

    def _entry(self, name: str) -> Entry | None:
        path = self._directory / name
        if name.startswith("."):
            _remove_if_old(path)
            return None
        if not name.endswith(SUFFIX):
            return None
        try:
            return self._read(path)
        except FileNotFoundError:
            return None
        except (ValueError, OSError, MoorageError) as error:
            self._move_aside(path, str(error))
            return None

    def _read(self, path: Path) -> Entry:
        """Raises ValueError, OSError or MoorageError saying why the file cannot be believed."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise ValueError("not a regular file")
            if facts.st_uid != self._uid:
                raise ValueError(f"owned by uid {facts.st_uid}, not {self._uid}")
            raw = os.read(descriptor, frame.HEADER + frame.MAX_PAYLOAD + 1)
        finally:
            os.close(descriptor)
        header, payload = raw[: frame.HEADER], raw[frame.HEADER :]
        if frame.payload_length(header) != len(payload):
            raise ValueError("frame cut short or too long")
        request = parse_request(frame.decode(payload))
        key = _key(request)
        if path.name != f"{_digest(key)}-{request.request_id}{SUFFIX}":
            raise ValueError("its name does not belong to what it holds")
        return Entry(path, key, request)

    def _distrust(self, directory: Path) -> None:
        """Say once that others could have put anything there, or could lead us elsewhere through it."""
        if directory not in self._distrusted:
            self._distrusted.add(directory)
            log.error(
                "spool is not used: it is no directory of ours that only we may write", path=str(directory)
            )

    def _move_aside(self, path: Path, why: str) -> None:
        bad = self._directory / "bad"
        try:
            bad.mkdir(mode=0o700, exist_ok=True)
            if not _is_private(bad):
                self._distrust(bad)
                return
            path.rename(bad / f"{time.time_ns()}-{path.name}")
            log.warning("spool entry moved aside", path=str(path), to=str(bad), why=why)
        except OSError as error:
            log.error("bad spool entry cannot be moved aside", path=str(path), why=why, error=str(error))


def _is_private(directory: Path) -> bool:
    """A real directory, ours, and writable by nobody else. Raises FileNotFoundError."""
    facts = directory.lstat()
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o022


class SpoolWatcher:
    """Carries out entries as they appear.

    handle: carries out one entry. If it raises, the entry stays and is tried again, ever more slowly.
    interval: seconds between looks. A look at an empty directory costs 10 us; inotify would save nothing that
        can be measured.
    """

    SLOWEST = 30.0

    def __init__(
        self,
        spool: Spool,
        handle: Callable[[Entry], Awaitable[None]],
        supervision: Supervision,
        *,
        interval: float = 0.25,
    ) -> None:
        self._supervision = supervision
        self._spool = spool
        self._handle = handle
        self._interval = interval
        self._task: asyncio.Task[None] | None = None
        self._one_at_a_time = asyncio.Lock()
        self._again: dict[Path, tuple[float, float]] = {}

    async def start(self) -> None:
        """Begin to watch."""
        self._task = self._supervision.start("spool", self._watch, longest=LOOK_AGAIN)

    async def stop(self) -> None:
        """Stop watching, after the entry at hand."""
        if self._task is None:
            return
        async with self._one_at_a_time:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None

    async def drain(self, key: EndpointKey | None = None) -> None:
        """Carry out all entries, or one endpoint's, now. Raises what ``handle`` raised first."""
        if not self._spool.entries(key):
            return
        async with self._one_at_a_time:
            for entry in self._spool.entries(key):
                await self._handle(entry)
                self._spool.remove(entry)
                self._again.pop(entry.path, None)

    async def _watch(self) -> None:
        while True:
            entries = self._spool.entries()
            for entry in entries:
                if time.monotonic() >= self._again.get(entry.path, (0.0, 0.0))[0]:
                    await self._try(entry)
            if not entries:
                self._again.clear()
            await asyncio.sleep(self._interval)

    async def _try(self, entry: Entry) -> None:
        try:
            await self.drain(entry.key)
        except Exception as error:
            pause = min(max(self._again.get(entry.path, (0.0, 0.0))[1] * 2, self._interval), self.SLOWEST)
            self._again[entry.path] = (time.monotonic() + pause, pause)
            log.exception(
                "a spooled call could not be carried out; it will be tried again",
                key=str(entry.key),
                error=str(error),
                seconds=pause,
            )


def _key(request: Request) -> EndpointKey:
    """Whose entries are carried out in order. Raises ValueError, BadEnvironment."""
    match request.call, request.command:
        case "cni", "DEL":
            return read_key(request.env)
        case "netmodules", "release" | "cleanup":
            return NETMODULES
    raise ValueError("not a call that may be left in the spool")


def _digest(key: EndpointKey) -> str:
    """The part of a file's name that says whose it is; the hook computes the same."""
    return f"{zlib.crc32(str(key).encode('utf-8', 'surrogateescape')):08x}"


def _remove_if_old(path: Path) -> None:
    """A hook writes its file within milliseconds."""
    try:
        if time.time() - path.lstat().st_mtime > TEMPORARY_AGE:
            path.unlink()
    except OSError as error:
        log.debug("temporary spool file left alone", path=str(path), error=str(error))
