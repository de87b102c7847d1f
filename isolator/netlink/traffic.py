"""The traffic control messages we send, and read: token buckets, and redirecting what comes in.

Pure, like messages.py. The kernel shapes only what leaves an interface; what enters one is redirected to an
intermediate functional block (``ifb``), leaves that, and then goes on as if nothing had happened. The filter is
``u32`` that matches everything, because not every kernel has ``matchall``.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from struct import Struct

from isolator.netlink import codec
from isolator.netlink.codec import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Attributes,
    Message,
    Request,
    attribute,
    nested,
    text,
    u32,
)
from isolator.netlink.messages import IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINKINFO, IFLA_MTU, LINK, RTM_NEWLINK

RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_GETTFILTER = 44, 46

ROOT, INGRESS = 0xFFFFFFFF, 0xFFFFFFF1
"""Parents: where a queueing discipline sits."""

_TRAFFIC = Struct("=BxxxiIII")  # family, index, handle, parent, info
_INGRESS_HANDLE = 0xFFFF0000
_KIND, _OPTIONS = 1, 2

_RATE = "BBHhHI"  # cell log, link layer, overhead, cell align, smallest packet, bytes per second
_TBF = Struct(f"={_RATE}{_RATE}III")  # rate, peak rate, limit, buffer, mtu
_TBF_PARMS, _TBF_RATE64, _TBF_BURST = 1, 4, 6
_ETHERNET = 1  # a link layer that needs no table of transmission times
_U64 = Struct("=Q")
_MOST_U32 = 0xFFFFFFFF

_U32_SELECTOR, _U32_ACTIONS = 5, 7
_SELECTOR = Struct("=BBBxHHhhI")  # flags, offset shift, keys, offset mask, offset, 2 offsets, hash mask
_SELECTOR_KEY = Struct("=IIii")  # mask, value, offset, offset mask
_TERMINAL = 1
_ACTION_KIND, _ACTION_OPTIONS, _MIRRED_PARMS = 1, 2, 2
_MIRRED = Struct("=IIiiiiI")  # index, capabilities, action, 2 counts, what to do, link
_STOLEN, _REDIRECT_TO_EGRESS = 4, 1
_FIRST_ACTION = 1
_PRIORITY = 1


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket filter (tc-tbf(8)).

    rate: bytes per second. burst: bytes that may leave at once, at least a packet. queue: bytes that may wait.
    """

    rate: int
    burst: int
    queue: int


@dataclass(frozen=True, slots=True)
class Discipline:
    """A queueing discipline that the kernel has. rate, queue: of a token bucket, else 0."""

    index: int
    parent: int
    kind: str
    rate: int = 0
    queue: int = 0

    def is_bucket(self, bucket: Bucket) -> bool:
        """The burst is left out: the kernel tells only how long it lasts, in a unit of its own."""
        return (self.kind, self.rate, self.queue) == ("tbf", bucket.rate, bucket.queue)


def create_ifb(name: str, index: int, mtu: int) -> Request:
    """An intermediate functional block."""
    body = (
        LINK.pack(0, 0, index, 0, 0)
        + text(IFLA_IFNAME, name)
        + u32(IFLA_MTU, mtu)
        + nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "ifb"))
    )
    return Request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"create {name} to limit what comes in")


def set_bucket(index: int, name: str, bucket: Bucket) -> Request:
    """Limit what leaves a link, in place of whatever did."""
    rate = (0, _ETHERNET, 0, 0, 0, min(bucket.rate, _MOST_U32))
    parameters = _TBF.pack(*rate, *(0, 0, 0, 0, 0, 0), bucket.queue, 0, 0)
    options = attribute(_TBF_PARMS, parameters) + u32(_TBF_BURST, bucket.burst)
    if bucket.rate > _MOST_U32:
        options += attribute(_TBF_RATE64, _U64.pack(bucket.rate))
    body = _TRAFFIC.pack(0, index, 0, ROOT, 0) + text(_KIND, "tbf") + nested(_OPTIONS, options)
    return Request(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, body, f"limit what leaves {name}")


def delete_ingress(index: int, name: str) -> Request:
    """Stop redirecting what comes in."""
    body = _TRAFFIC.pack(0, index, _INGRESS_HANDLE, INGRESS, 0)
    fine = (errno.ENOENT, errno.EINVAL, errno.ENODEV)
    return Request(RTM_DELQDISC, 0, body, f"stop redirecting what comes in on {name}", fine)


def redirect_ingress(index: int, name: str, target: int) -> list[Request]:
    """Redirect everything that comes in on a link to another, which has to be up. ``delete_ingress`` first."""
    hook = _TRAFFIC.pack(0, index, _INGRESS_HANDLE, INGRESS, 0) + text(_KIND, "ingress")
    every_protocol = socket.htons(0x0003)
    everything = _SELECTOR.pack(_TERMINAL, 0, 1, 0, 0, 0, 0, 0) + _SELECTOR_KEY.pack(0, 0, 0, 0)
    action = text(_ACTION_KIND, "mirred") + nested(
        _ACTION_OPTIONS,
        attribute(_MIRRED_PARMS, _MIRRED.pack(0, 0, _STOLEN, 0, 0, _REDIRECT_TO_EGRESS, target)),
    )
    filter_ = (
        _TRAFFIC.pack(0, index, 0, _INGRESS_HANDLE, _PRIORITY << 16 | every_protocol)
        + text(_KIND, "u32")
        + nested(
            _OPTIONS,
            nested(_U32_ACTIONS, nested(_FIRST_ACTION, action)),
            attribute(_U32_SELECTOR, everything),
        )
    )
    doing = f"redirect what comes in on {name}"
    flags = NLM_F_CREATE | NLM_F_EXCL
    return [Request(RTM_NEWQDISC, flags, hook, doing), Request(RTM_NEWTFILTER, flags, filter_, doing)]


def dump_disciplines() -> Request:
    """All queueing disciplines; the kernel does not filter them."""
    return Request(RTM_GETQDISC, 0, _TRAFFIC.pack(0, 0, 0, 0, 0), "list the queueing disciplines")


def dump_ingress_filters(index: int) -> Request:
    """The filters of what comes in on a link; none if nothing can be filtered there."""
    body = _TRAFFIC.pack(0, index, 0, _INGRESS_HANDLE, 0)
    fine = (errno.ENODEV, errno.EINVAL, errno.ENOENT)
    return Request(RTM_GETTFILTER, 0, body, "list the filters of what comes in", fine)


def link_of(message: Message) -> int:
    """The link's index in RTM_NEWQDISC, without parsing the rest."""
    index: int = _TRAFFIC.unpack_from(message.body)[1]
    return index


def parse_discipline(message: Message) -> Discipline:
    """From RTM_NEWQDISC."""
    _, index, _, parent, _ = _TRAFFIC.unpack_from(message.body)
    found = codec.attributes(message.body, _TRAFFIC.size)
    kind = codec.as_text(found.get(_KIND))
    if kind != "tbf":
        return Discipline(index, parent, kind)
    options = codec.attributes(found[_OPTIONS])
    values = _TBF.unpack_from(options[_TBF_PARMS])
    rate = codec.as_u32(options.get(_TBF_RATE64), values[5])
    return Discipline(index, parent, kind, rate, queue=values[12])


def redirects_to(message: Message) -> int | None:
    """The link that RTM_NEWTFILTER redirects everything to; None if it does anything else."""
    options = _inside(codec.attributes(message.body, _TRAFFIC.size), _OPTIONS)
    action = _inside(_inside(options, _U32_ACTIONS), _FIRST_ACTION)
    parameters = _inside(action, _ACTION_OPTIONS).get(_MIRRED_PARMS)
    key = bytes(options.get(_U32_SELECTOR, b""))[_SELECTOR.size :]
    if codec.as_text(action.get(_ACTION_KIND)) != "mirred" or parameters is None or any(key[:8]):
        return None
    target: int = _MIRRED.unpack_from(parameters)[6]
    return target


def _inside(attributes: Attributes, kind: int) -> Attributes:
    """What an attribute holds; nothing if it is missing."""
    return codec.attributes(attributes[kind]) if kind in attributes else {}
