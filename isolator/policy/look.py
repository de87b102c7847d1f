"""One look at the node's other firewalls, after which Docker's chain is as it should be."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass

from isolator.errors import KernelRefused
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from isolator.policy.docker_user import CHAINS, Edit, edits, has_ours, is_dockers_alone
from isolator.policy.foreign import Blocked, blocked
from isolator.policy.nft import Nft
from isolator.policy.others import Chain, Ruleset, read


@dataclass(frozen=True, slots=True)
class Look:
    """What was found, and done. blocked: as it is now. ours: chains that hold rules of ours now. refused: why Docker's
    chain is not as it should be, "" if it is. waiting: chains that would be opened if the node had containers.
    seconds: that it took."""

    blocked: tuple[Blocked, ...]
    waiting: frozenset[Chain]
    ours: tuple[Chain, ...]
    edited: tuple[Edit, ...]
    refused: str
    seconds: float


def look(*, wants_accepts: bool) -> Look:
    """Put Docker's chain right and judge what there is then, in the calling thread's namespace. Raises KernelRefused.

    wants_accepts: whether ours have to be there if the obstacle is Docker's policy alone; else they are taken out.
    """
    began = time.monotonic()
    with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
        ruleset = read(netfilter, CHAINS)
        edited, refused = tuple(edits(ruleset, wanted=wants_accepts)), ""
        if edited:
            refused = _write(edited)
            ruleset = read(netfilter, CHAINS)
    found = tuple(blocked(ruleset, has_iptables=has_iptables()))
    return Look(
        found,
        waiting(ruleset, found),
        tuple(has_ours(ruleset)),
        edited,
        refused,
        time.monotonic() - began,
    )


def waiting(ruleset: Ruleset, found: Sequence[Blocked]) -> frozenset[Chain]:
    """The chains that block now and would be opened by ours."""
    return frozenset(one.chain for one in found if is_dockers_alone(ruleset, one.chain))


def has_iptables() -> bool:
    """Whether there are ``iptables-nft`` and ``ip6tables-nft``."""
    return shutil.which("iptables-nft") is not None


def _write(wanted: tuple[Edit, ...]) -> str:
    """All families in one transaction; what was refused."""
    where = " and ".join(str(edit.chain) for edit in wanted)
    try:
        Nft().run("\n".join(edit.commands for edit in wanted), "let containers pass Docker's policy", where)
    except KernelRefused as error:
        return str(error)
    return ""
