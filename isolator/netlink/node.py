"""The node's own network namespace, and those of containers, as the kernel thread sees them.

A container's namespace is only ever known by a path. It is opened without O_CREAT (a library that
creates what is missing would make a *new* namespace), must be a network namespace and not the node's
own. It is never identified by its inode number alone: the kernel reuses those at once. But where a path goes by a
process, whose number is reused too, the inode pins it (``pinned``): while our interface is in a namespace, that is
there and no other has its inode.

To work inside, the kernel thread steps in with setns(2), opens its socket (which stays inside for good)
and steps back. Nothing else may happen on a thread that could not step back, so then the process dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
import sys
from collections.abc import Iterator
from typing import NoReturn, Self

from ipam.errors import TryAgain
from isolator.errors import KernelRefused, NamespaceGone, NotANamespace
from isolator.netlink.seal import Seal
from isolator.netlink.socket import NetlinkSocket

_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703
_PINNED = re.compile(r"(/proc/[0-9]+/ns/net)#([0-9]+)", re.ASCII)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.setns.restype = ctypes.c_int


class Namespace:
    """An open network namespace of a container; closes its descriptor when left as a context."""

    def __init__(self, path: str, fd: int, home: int) -> None:
        self.path = path
        self.fd = fd
        self._home = home

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Run the block, on this thread, inside the namespace: its sockets and /proc/sys/net are seen."""
        if number := _setns(self.fd):
            raise KernelRefused(f"could not enter {self.path}: {os.strerror(number)}", errno=number)
        try:
            yield
        finally:
            if number := _setns(self._home):
                _die(f"could not leave {self.path} again: {os.strerror(number)}")


class Node:
    """The network namespace of the thread that makes it, and that thread's rtnetlink socket there.

    seal: of what its links' aliases say; without one nothing is believed that others said.
    """

    def __init__(self, seal: Seal | None = None) -> None:
        self.seal = seal or Seal(os.urandom(32))
        self._fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._fd)
        self._identity = (status.st_dev, status.st_ino)  # holds as long as the descriptor is open
        self.route = NetlinkSocket()

    def close(self) -> None:
        """Close socket and namespace."""
        self.route.close()
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def open_namespace(self, path: str) -> Namespace:
        """Open a container's namespace; a path as ``pinned`` makes it leads to that very namespace or nowhere.

        Raises NamespaceGone if there is nothing (any more), NotANamespace if it is something else or
        the node's own, KernelRefused if it cannot be opened.
        """
        path, inode = unpinned(path)
        try:
            # O_NONBLOCK: whatever the path names, opening it must not wait.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH, errno.ENOTDIR):
                raise NamespaceGone(
                    f"the network namespace {path} does not exist (any more): the container has ended, or whoever made "
                    "that path took it away"
                ) from error
            number = error.errno or 0
            if number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise TryAgain(
                    f"could not open the network namespace {path}: {error.strerror}; raise LimitNOFILE, or the "
                    "memory, of the agent's unit if this stays"
                ) from error
            raise KernelRefused(
                f"could not open the network namespace {path}: {error.strerror}; see that the agent runs as root, with "
                "the capabilities of packaging/moorage-agent.service",
                errno=number,
            ) from error
        try:
            self._verify(path, fd)
            if inode not in (None, os.fstat(fd).st_ino):
                raise NamespaceGone(
                    f"the process of {path} has ended, and another has its number; so has the container"
                )
        except BaseException:
            os.close(fd)
            raise
        return Namespace(path, fd, self._fd)

    def _verify(self, path: str, fd: int) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or _namespace_type(fd) != _CLONE_NEWNET:
            raise NotANamespace(
                f"{path} is not a network namespace; pass the path of the container's, as in /proc/<pid>/ns/net"
            )
        if (status.st_dev, status.st_ino) == self._identity:
            raise NotANamespace(
                f"{path} is the node's own network namespace; the container must be given one of its own"
            )


def pinned(namespace: Namespace) -> str:
    """Its path, for use later, if it goes by a process: numbers of processes are used again."""
    return f"{namespace.path}#{os.fstat(namespace.fd).st_ino}"


def unpinned(path: str) -> tuple[str, int | None]:
    """A path and the inode it has to lead to, None if it was not pinned."""
    match = _PINNED.fullmatch(path)
    return (path, None) if match is None else (match[1], int(match[2]))


def _namespace_type(fd: int) -> int:
    """Its CLONE_NEW* flag; 0 if it is no namespace at all (the nsfs magic does not tell them apart)."""
    try:
        return fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:
        return 0


def _setns(fd: int) -> int:
    """0, or the errno."""
    return 0 if _libc.setns(fd, _CLONE_NEWNET) == 0 else ctypes.get_errno()


def _die(reason: str) -> NoReturn:
    sys.stderr.write(f"moorage: {reason}; a thread lost in a container's namespace cannot go on\n")
    sys.stderr.flush()
    os.abort()
