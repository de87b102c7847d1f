"""The claim to be the only agent of a network namespace: an empty table of nf_tables that belongs to a socket.

    nft list table inet moorage-agent    ->  table inet moorage-agent { # progname moorage; flags owner }

Of all that vanishes with its process, it is what belongs to the network namespace (a file does not: two agents of one
namespace may have two file systems) and takes CAP_NET_ADMIN there (an abstract socket does not: anybody could hold its
name, and no agent would start). Nobody else changes or flushes it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from pathlib import Path
from typing import Self

from isolator.errors import AgentBusy, KernelRefused
from isolator.holders import holders
from isolator.netlink import codec
from isolator.netlink.codec import Request
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket

TABLE = "moorage-agent"

_INET = 1
_SUBSYSTEM = 10
_NEWTABLE, _GETTABLE = (_SUBSYSTEM << 8 | kind for kind in (0, 1))
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NAME, _FLAGS, _OWNER = 1, 2, 7  # NFTA_TABLE_*
_F_OWNER = 2
_HEADER = struct.Struct(">BBH")
_SEQ = 2

_SOCKETS = Path("/proc/thread-self/net/netlink")


class Claim:
    """Held until it is closed, or the process ends. In the network namespace that the calling thread is in."""

    def __init__(self) -> None:
        """Raises AgentBusy naming who holds it, KernelRefused."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        try:
            self._socket.bind((0, 0))
            if refused := self._take():
                raise _busy(refused)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give it up."""
        self._socket.close()

    def _take(self) -> int:
        """0, or the errno."""
        body = codec.text(_NAME, TABLE) + codec.attribute(_FLAGS, _F_OWNER.to_bytes(4, "big"))
        new = Request(
            _NEWTABLE, codec.NLM_F_CREATE | codec.NLM_F_EXCL, _HEADER.pack(_INET, 0, 0) + body, "claim"
        )
        begin, end = (
            Request(kind, 0, _HEADER.pack(0, 0, _SUBSYSTEM), "claim") for kind in (_BATCH_BEGIN, _BATCH_END)
        )
        flag = codec.NLM_F_REQUEST
        self._socket.send(
            begin.encode(flag, _SEQ - 1)
            + new.encode(flag | codec.NLM_F_ACK, _SEQ)
            + end.encode(flag, _SEQ + 1)
        )
        # Whatever is refused, the whole batch too, is answered at once.
        message = next(codec.messages(self._socket.recv(16384)))
        return -int(codec.S32.unpack_from(message.body)[0])


def _busy(number: int) -> AgentBusy | KernelRefused:
    """What it means that the claim was refused."""
    request = Request(
        _GETTABLE,
        0,
        _HEADER.pack(_INET, 0, 0) + codec.text(_NAME, TABLE),
        f"look at the table inet {TABLE}",
        (errno.ENOENT, errno.EPERM),
    )
    found = None
    if number in (errno.EPERM, errno.EEXIST, errno.EBUSY):
        with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
            found = netfilter.get(request)
    if found is None:
        return KernelRefused(
            f"could not claim this network namespace: {os.strerror(number)}; the agent needs CAP_NET_ADMIN in it and "
            "nf_tables of Linux 5.12 or later",
            errno=number,
        )
    owner = codec.attributes(found.body, 4).get(_OWNER)
    if owner is None:
        return AgentBusy(
            f"somebody made a table inet {TABLE}, by which agents claim this network namespace, and no running process "
            f"holds it; delete it: nft delete table inet {TABLE}"
        )
    return AgentBusy(
        f"another moorage agent runs in this network namespace: {_holder(int.from_bytes(owner, 'big'))}; stop it "
        "first, or start this one in a namespace of its own"
    )


def _holder(port: int) -> str:
    """Who has the netlink socket of that port."""
    for line in _SOCKETS.read_text().splitlines()[1:]:
        _, protocol, number, *_, inode = line.split()
        is_it = (int(protocol), int(number)) == (NETLINK_NETFILTER, port)
        if is_it and (found := holders(int(inode))):
            return ", ".join(found)
    return "a process that is not seen from here, perhaps of a container on the node's network"
