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
    seconds: that reading took."""

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
    with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
        began = time.monotonic()
        ruleset = read(netfilter, CHAINS)
        seconds = time.monotonic() - began
        outcome = {edit: _write(edit) for edit in edits(ruleset, wanted=wants_accepts)}
        if outcome:
            ruleset = read(netfilter, CHAINS)
    found = tuple(blocked(ruleset, has_iptables=has_iptables()))
    return Look(
        found,
        waiting(ruleset, found),
        tuple(has_ours(ruleset)),
        tuple(edit for edit, refused in outcome.items() if not refused),
        "; ".join(filter(None, outcome.values())),
        seconds,
    )


def waiting(ruleset: Ruleset, found: Sequence[Blocked]) -> frozenset[Chain]:
    """The chains that block now and would be opened by ours."""
    return frozenset(one.chain for one in found if is_dockers_alone(ruleset, one.chain))


def has_iptables() -> bool:
    """Whether there are ``iptables-nft`` and ``ip6tables-nft``."""
    return shutil.which("iptables-nft") is not None


def _write(edit: Edit) -> str:
    """In one transaction; what was refused. One family's refusal is none of the other's business."""
    try:
        Nft().run(edit.commands, "let containers pass Docker's policy", str(edit.chain))
    except KernelRefused as error:
        return str(error)
    return ""
