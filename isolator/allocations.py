"""Addresses that an engine has before it has a container for them (docs/engines/net-modules.md).

    allocate()    warm ------> allocated to a uid          journal first, as an ADD does
    attach()      allocated -> assigned to an endpoint     isolator/endpoints.py
    release()     allocated -> cooling
    expire()      the same, for those that nobody came for within TTL seconds

What an endpoint has is not released here, whoever asks: an engine says so before the container's interface is gone.
It cools down when the endpoint ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence

import structlog

from ipam.catalogue import Catalogue
from ipam.holder import Allocation, Holder
from ipam.keys import IPAddress
from ipam.named import AddressRequest
from ipam.records import Address, Network
from ipam.shelf import Held
from isolator.authorise import authorise_addresses, authorise_netgroups
from isolator.errors import JournalUnwritable
from isolator.identity import boottime
from isolator.journal import Journal
from isolator.model import AllocateSpec, Asked
from isolator.steps import reached

log = structlog.get_logger(__name__)

TTL = 300.0
"""Seconds in which an allocated address has to become an endpoint's: an engine that lost its state, or whose framework
went away, never says that it does not need one any more. Fetching a container's image takes place before."""

EXPIRE_EVERY = 5.0
"""Seconds between looks for those that were not."""


class Allocations:
    """See the module's docstring. boot_id: of this boot. ttl: seconds."""

    def __init__(
        self, boot_id: str, journal: Journal, catalogue: Catalogue, holder: Holder, *, ttl: float = TTL
    ) -> None:
        self._boot_id = boot_id
        self._journal = journal
        self._catalogue = catalogue
        self._holder = holder
        self._ttl = ttl
        self._deadlines: dict[tuple[IPAddress, str], float] = {}

    def known(self, ips: Collection[IPAddress]) -> dict[IPAddress, Address]:
        """What is recorded of those of the addresses that are allocated here."""
        return {ip: record for ip, record in self._holder.allocated().items() if ip in ips}

    async def allocate(self, spec: AllocateSpec) -> tuple[IPAddress, ...]:
        """All addresses that are asked for, or none; the same request again gets the same answer.

        Certain ones that the uid has already are as good as allocated. Raises NotFound (network), Refused,
        InvalidInput, AddressTaken, Exhausted, TryAgain, JournalUnwritable.
        """
        before = [ip for ip, record in self._holder.allocated().items() if record.id == spec.request_id]
        if before:
            return _in_order(before)
        network = await self._catalogue.network(spec.network)
        await self._authorise(spec, network)
        lent = await self._lend(spec, network)
        allocation = Allocation(
            id=spec.request_id,
            uid=spec.uid,
            engine=spec.engine,
            netgroups=spec.netgroups,
            labels=spec.labels,
            reservation=spec.reservation or "",
        )
        try:
            self._holder.check_still_held(lent)
            rows = self._holder.plan_allocate(lent, allocation)
            self._journal.save_addresses(rows)
        except BaseException:
            self._holder.put_back(lent)
            raise
        self._holder.accept(rows)
        reached("allocate:journalled")
        log.info(
            "addresses allocated", uid=spec.uid, ips=[str(held.ip) for held in lent], network=network.name
        )
        return _in_order([held.ip for held in lent])

    async def _authorise(self, spec: AllocateSpec, network: Network) -> None:
        who = f"uid {spec.uid}"
        authorise_netgroups(who, spec.netgroups, network)
        reserved: set[IPAddress] = set()
        if spec.ips and spec.reservation is not None:
            if not self._catalogue.reserved_under(spec.reservation, network.name):
                await self._catalogue.look_again()
            reserved = {r.ip for r in self._catalogue.reserved_under(spec.reservation, network.name)}
        authorise_addresses(who, spec.ips, network, self._catalogue.pools_of(network), reserved)

    async def _lend(self, spec: AllocateSpec, network: Network) -> list[Held]:
        """All at once: those that have to be fetched come with one refill."""
        its_own = {ip for ip, record in self.known(spec.ips).items() if record.uid == spec.uid}
        requests = [
            AddressRequest(network, ips=(ip,), reservation=spec.reservation, families=frozenset({ip.version}))
            for ip in spec.ips
            if ip not in its_own
        ]
        for family, count in spec.counts.items():
            requests += [
                AddressRequest(
                    network,
                    reservation=None if number else spec.reservation,
                    pool=spec.pool,
                    families=frozenset({family}),
                )
                for number in range(count)
            ]
        takes = [asyncio.ensure_future(self._holder.take(request)) for request in requests]
        try:
            return [held for lent in await asyncio.gather(*takes) for held in lent]
        except BaseException:
            for take in takes:
                take.cancel()
            for outcome in await asyncio.gather(*takes, return_exceptions=True):
                if not isinstance(outcome, BaseException):
                    self._holder.put_back(outcome)
            raise

    def release(self, uid: str, ips: Collection[IPAddress], asked: Asked) -> tuple[IPAddress, ...]:
        """Give back what was allocated to ``uid``, or is among ``ips``, before it was asked for; succeeds always.

        Returns the addresses that are given back by it. Others, and what an endpoint has, are left as they are.
        """
        moment = self._moment(asked)
        return self._give_back(
            {
                ip: record
                for ip, record in self._holder.allocated().items()
                if (ip in ips or (uid and record.uid == uid)) and record.since <= moment
            },
            "addresses released",
        )

    def _moment(self, asked: Asked) -> float:
        """When a call left its caller, by the wall clock; the start of this boot if it was in an earlier one."""
        ago = (boottime() - (asked.at if asked.boot_id == self._boot_id else 0)) / 1e9
        return time.time() - max(ago, 0.0)

    def _give_back(self, leaving: Mapping[IPAddress, Address], what: str) -> tuple[IPAddress, ...]:
        rows = self._holder.plan_deallocate(list(leaving))
        if not rows:
            return ()
        try:
            self._journal.save_addresses(rows)
        except JournalUnwritable as error:
            # The store is told all the same; a restart with the old journal lets them expire.
            log.warning("release is not journalled", count=len(rows), why=str(error))
        self._holder.accept(rows)
        reached("release:journalled")
        log.info(
            what,
            ips=[str(row.ip) for row in rows],
            uids=sorted({record.uid for record in leaving.values()}),
        )
        return _in_order([row.ip for row in rows])

    async def expire(self) -> None:
        """Give back what nobody came for in time, until cancelled."""
        while True:
            self._give_back(self._overdue(), "allocated addresses were not used; released")
            await asyncio.sleep(min(EXPIRE_EVERY, self._ttl))

    def _overdue(self) -> dict[IPAddress, Address]:
        """By the wall clock until this agent has seen an allocation, and by its own from then on."""
        now, wall = asyncio.get_running_loop().time(), time.time()
        allocated = self._holder.allocated()
        self._deadlines = {
            (ip, record.id): self._deadlines.get(
                (ip, record.id), now + self._ttl - min(max(wall - record.since, 0.0), self._ttl)
            )
            for ip, record in allocated.items()
        }
        return {ip: record for ip, record in allocated.items() if self._deadlines[ip, record.id] <= now}


def _in_order(ips: Sequence[IPAddress]) -> tuple[IPAddress, ...]:
    return tuple(sorted(ips, key=lambda ip: (ip.version, int(ip))))
