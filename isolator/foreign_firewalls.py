"""Other firewalls, watched while the agent runs: whether they drop containers' traffic, and what is done about it.

    every second     did anybody else change any rule of the node (a number, 0.02 ms)? If not, nothing is read.
    if so            what forwarding goes through is read (policy/others.py) and judged (policy/foreign.py)
    Docker's policy  our accepts are put into DOCKER-USER, and taken out again (policy/docker_user.py)
    all others       told in ``moorage status`` and, when that begins, changes or ends, in the log

Looks take no more than ``SHARE`` of the time, however large those tables are and however often they change: a firewall
that changes every second is looked at every second while a look takes less than 20 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import structlog

from isolator.kernel import Kernel
from isolator.policy.foreign import Blocked
from isolator.policy.look import Look
from isolator.policy.others import Chain

log = structlog.get_logger(__name__)

LOOK_EVERY = 1.0
"""Seconds between questions whether somebody changed anything."""

SHARE = 0.02
"""Of the time that looks may take: one of 100 ms is followed by the next after 5 s."""


class ForeignFirewalls:
    """See the module's docstring. has_containers: whether the node has any now. manages: whether DOCKER-USER is left to
    the agent."""

    def __init__(self, kernel: Kernel, has_containers: Callable[[], bool], *, manages: bool) -> None:
        self._kernel = kernel
        self._has_containers = has_containers
        self._manages = manages
        self._woken = asyncio.Event()
        self._seen: tuple[int, bool] | None = None
        self._not_before = 0.0
        self._ours: tuple[Chain, ...] = ()
        self._told: dict[Chain, Blocked] = {}
        self._refused = ""

    def containers_came(self) -> None:
        """If these are the node's first ones, Docker's chain is opened now, and not within a second."""
        if self._seen is not None and not self._seen[1]:
            self._woken.set()

    @property
    def obstacles(self) -> list[Blocked]:
        """Chains that drop containers' traffic."""
        return list(self._told.values())

    def status(self) -> dict[str, Any]:
        """firewalls: chains that drop containers' traffic. docker_user: whether that chain is left to the agent, and
        which chains hold rules of its own now."""
        return {
            "firewalls": [
                {"chain": str(one.chain), "why": one.why, "commands": list(one.commands)}
                for one in self._told.values()
            ],
            "docker_user": {"managed": self._manages, "chains": [str(chain) for chain in self._ours]},
        }

    async def run(self) -> None:
        """Watch until cancelled. Raises KernelRefused."""
        clock = asyncio.get_running_loop().time
        while True:
            wait = LOOK_EVERY
            if not await self._is_settled():
                if clock() >= self._not_before:
                    await self._look()
                else:
                    wait = min(wait, self._not_before - clock())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._woken.wait()
            self._woken.clear()

    def _wants_accepts(self) -> bool:
        return self._manages and self._has_containers()

    async def _is_settled(self) -> bool:
        return self._seen == (await self._kernel.changes_of_others(), self._wants_accepts())

    async def _look(self) -> None:
        wants = self._wants_accepts()
        # Asked for before anything is read: what changes meanwhile is looked at again.
        now = (await self._kernel.changes_of_others(), wants)
        found = await self._kernel.look_at_firewalls(wants_accepts=wants)
        self._not_before = asyncio.get_running_loop().time() + found.seconds / SHARE
        self._ours = found.ours
        self._tell_edits(found, wants)
        self._tell(self._obstacles(found, wants))
        # What was refused is tried again.
        self._seen = None if found.refused else now

    def _obstacles(self, found: Look, wants: bool) -> dict[Chain, Blocked]:
        """What is to be told. What the agent will see to when there are containers is no obstacle."""
        chains = {one.chain: one for one in found.blocked}
        for chain in found.waiting:
            if self._manages and not wants:
                chains.pop(chain)
            elif found.refused:
                chains[chain] = replace(chains[chain], why=f"{chains[chain].why}; {found.refused}")
        return chains

    def _tell_edits(self, found: Look, wants: bool) -> None:
        if found.refused and found.refused != self._refused:
            log.warning("Docker's policy cannot be passed", why=found.refused)
        self._refused = found.refused
        for edit in found.edited:
            if edit.lines:
                log.warning(
                    "Docker's policy drops containers' traffic; they are let pass by rules in DOCKER-USER",
                    chain=str(edit.chain),
                    rules=[f"{line.direction} {line.name} {line.verdict}" for line in edit.lines],
                )
            else:
                why = (
                    "Docker's policy does not drop any more, or somebody else has rules in FORWARD, so that the policy "
                    "may be theirs"
                )
                if not wants:
                    why = "the node has no containers" if self._manages else "manage_docker_user is false"
                (log.warning if wants else log.info)(
                    "rules taken out of DOCKER-USER", chain=str(edit.chain), why=why
                )

    def _tell(self, now: dict[Chain, Blocked]) -> None:
        before, self._told = self._told, now
        for chain, one in now.items():
            if before.get(chain) != one:
                log.warning(
                    "another firewall drops containers' traffic",
                    chain=str(chain),
                    why=one.why,
                    commands=list(one.commands),
                )
        for chain in before.keys() - now.keys():
            log.info("another firewall lets containers' traffic pass again", chain=str(chain))
