"""Addresses asked for by name: static ones, and those of a reservation.

warm here                     lent at once; announced to others than those: once other nodes have heard that it is
                              not, and refused while one of them is away
free                          asked for from the store, for this ADD alone
cooling here, asker's own     taken at once by who had it last: ipam/coming_back.py
cooling here, reserved        taken without a cooldown under the key it was released under
in use here, reserved         waited for until its container is gone
another node's                talked about with its agent: ipam/handover.py
anything else                 refused, naming the holder
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ipam import keys
from ipam.catalogue import Reserved
from ipam.coming_back import NOBODY, Asker, ComingBack
from ipam.errors import AddressTaken, InvalidInput, MoorageError, StoreError, TryAgain
from ipam.handover import GIVE_UP_WITHIN, hand_over
from ipam.holdings import HeldElsewhere, Holdings, held_by
from ipam.keys import Family, IPAddress
from ipam.pools import Geometry
from ipam.records import AddressState, Network
from ipam.refill import REFILL_PATIENCE
from ipam.shelf import Held
from ipam.store.base import Store

HANDOVER_PATIENCE = 20.0
"""Seconds an ADD with a reservation waits for the address's last holder to be gone."""


@dataclass(frozen=True, slots=True)
class AddressRequest:
    """What an ADD asks of IPAM.

    ips: static addresses, at most one a family unless there are counts. pool: only from the pool of that name.
    reservation: key of a reservation; its addresses, where it has any, are used.
    keeps_warm: whether addresses of the network are kept ready here from now on.
    counts: how many addresses of each family; None is one of each that the network has.
    netgroups: what who gets them will be a member of; None is the network's own.
    asker: who had some of them last, perhaps.
    """

    network: Network
    ips: tuple[IPAddress, ...] = ()
    reservation: str | None = None
    pool: str | None = None
    keeps_warm: bool = True
    counts: Mapping[Family, int] | None = None
    netgroups: tuple[str, ...] | None = None
    asker: Asker = NOBODY

    @property
    def members_of(self) -> tuple[str, ...]:
        return (self.network.name,) if self.netgroups is None else self.netgroups


class Named:
    """See the module's docstring."""

    def __init__(self, store: Store, holdings: Holdings, coming_back: ComingBack) -> None:
        self._store = store
        self._holdings = holdings
        self._coming_back = coming_back
        self._shelf = holdings.shelf

    async def addresses(self, request: AddressRequest, pools: Sequence[Geometry]) -> list[IPAddress]:
        """What is asked for by name or by reservation. Raises InvalidInput, AddressTaken, TryAgain."""
        if request.reservation is not None and not self._reserved(request):
            await self._holdings.catalogue.look_again(f"the reservation {request.reservation!r}")
        return self._choose(request, pools, await self._elsewhere(request))

    async def _elsewhere(self, request: AddressRequest) -> set[IPAddress]:
        """Of a reservation with several addresses, those that other nodes hold, if the store answers."""
        unknown = [r.ip for r in self._reserved(request) if r.ip not in self._shelf.held]
        if len(unknown) < 2 or self._holdings.trouble:
            return set()
        try:
            found = await asyncio.gather(*(self._store.get(keys.address_key(ip)) for ip in unknown))
        except StoreError:
            return set()
        return {ip for ip, kv in zip(unknown, found, strict=True) if kv is not None}

    def _choose(
        self, request: AddressRequest, pools: Sequence[Geometry], elsewhere: Collection[IPAddress]
    ) -> list[IPAddress]:
        """The addresses asked for by name, and by reservation in families of which none is named.

        Raises InvalidInput, AddressTaken.
        """
        network = request.network
        kept: dict[Family, IPAddress] = {}
        if request.reservation is not None:
            reserved = self._reserved(request)
            if not reserved:
                raise InvalidInput(
                    f"no address of network {network.name} is reserved under the key {request.reservation!r}; "
                    "reserve one with `moorage ip reserve IP --key KEY`"
                )
            for entry in sorted(reserved, key=lambda r: self._distance(r.ip, elsewhere)):
                kept.setdefault(entry.ip.version, entry.ip)
        if request.counts is None and len({ip.version for ip in request.ips}) < len(set(request.ips)):
            raise InvalidInput(
                f"{', '.join(map(str, request.ips))} are two addresses of one family; ask for one of each at most"
            )
        for ip in request.ips:
            pool = next((p for p in pools if p.family == ip.version and ip in p.cidr), None)
            if pool is None:
                raise InvalidInput(
                    f"{ip} is in no pool of network {network.name}; its pools are "
                    f"{', '.join(str(p.cidr) for p in pools)}"
                )
            self._check_usable(ip, pool)
            reservation = self._holdings.catalogue.reserved(ip)
            if reservation is not None and reservation.reservation.key != request.reservation:
                raise AddressTaken(
                    f"{ip} is reserved; ask for it with the label moorage.reservation and its key, "
                    "or ask for another address"
                )
            kept.pop(ip.version, None)
        wanted = [ip for ip in kept.values() if self._is_wanted(ip, request)]
        for ip in wanted:
            if (pool := next((p for p in pools if ip in p.cidr), None)) is not None:
                self._check_usable(ip, pool)
        return [*dict.fromkeys(request.ips), *wanted]

    def _check_usable(self, ip: IPAddress, pool: Geometry) -> None:
        if pool.usable(ip):
            return
        if whose := self._holdings.catalogue.around.why_closed(ip, pool):
            raise InvalidInput(
                f"{ip} of pool {pool.cidr} is given to nobody, because it is in use outside of moorage: {whose}; ask "
                "for another address"
            )
        raise InvalidInput(f"{ip} is excluded from pool {pool.cidr}; ask for another address")

    @staticmethod
    def _is_wanted(ip: IPAddress, request: AddressRequest) -> bool:
        """Whether a reservation's address is of a family that is asked for."""
        return request.counts is None or request.counts.get(ip.version, 0) > 0

    def _reserved(self, request: AddressRequest) -> list[Reserved]:
        if request.reservation is None:
            return []
        return self._holdings.catalogue.reserved_under(request.reservation, request.network.name)

    def _distance(self, ip: IPAddress, elsewhere: Collection[IPAddress]) -> int:
        """Sorts the addresses of one reservation: what can be had at once comes first."""
        held = self._shelf.held.get(ip)
        if held is None:
            return 3 if ip in elsewhere else 0
        return 2 if held.lent or (held.state is not None and held.state.is_taken) else 1

    async def take(self, ip: IPAddress, request: AddressRequest) -> Held:
        """Lend it. Before it is used ``heard`` has to return."""
        kept = self._holdings.catalogue.reserved(ip)
        reserved = kept is not None and kept.reservation.key == request.reservation
        now = asyncio.get_running_loop().time()
        deadline = now + HANDOVER_PATIENCE
        handed_over_by = deadline if reserved else now + GIVE_UP_WITHIN
        while True:
            held = self._shelf.held.get(ip)
            if held is None or (held.is_asked_for and not held.lent):
                try:
                    return self._fitting(await self._ask_for(ip, held, request), request)
                except HeldElsewhere as taken:
                    await hand_over(
                        self._store, taken, request.reservation if reserved else None, handed_over_by
                    )
                    continue
            if self._coming_back.is_for(held, request.asker, request.network.name):
                return await self._coming_back.lend(held)
            ready = not held.dirty and not held.lent
            if ready and held.state is AddressState.WARM:
                return self._fitting(self._shelf.lend_this(held), request)
            record = held.record
            if ready and reserved and record is not None and record.reservation == request.reservation:
                if held.state is AddressState.COOLING:
                    # Same key; interface and conntrack entries are gone, the store confirmed: no cooldown.
                    return self._shelf.lend_this(held)
            elif not reserved and not (held.state is AddressState.WARM and held.dirty and not held.lent):
                # (A warm one that the store has not confirmed yet is waited for.)
                raise self._taken(held)
            changed = self._shelf.change_of(ip)
            try:
                async with asyncio.timeout_at(deadline):
                    await changed.wait()
            except TimeoutError:
                raise self._taken(held) from None

    def _fitting(self, held: Held, request: AddressRequest) -> Held:
        """A lent address; one that was announced as what its container is not in becomes plain, see ``heard``."""
        if held.fits(request.members_of):
            return held
        if problem := self._holdings.why_not_renounced(held):
            self._shelf.put_back(held)
            raise TryAgain(problem)
        self._shelf.renounce(held)
        self._holdings.wake.set()
        return held

    async def heard(self, lent: Sequence[Held]) -> None:
        """Returns when other nodes have heard of lent addresses that they are announced no more. Raises TryAgain."""
        now = asyncio.get_running_loop().time
        deadline = now() + REFILL_PATIENCE
        for held in lent:
            while self._shelf.held.get(held.ip) is held and (
                held.is_silent or (held.dirty and held.state is AddressState.WARM)
            ):
                if now() >= deadline or (held.dirty and self._holdings.hopeless):
                    raise TryAgain(f"the store did not answer for {held.ip} in time; try again")
                if held.ready_at is not None and held.ready_at <= now():
                    self._shelf.note_heard(held)
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min(held.ready_at or deadline, deadline)):
                        await self._shelf.change_of(held.ip).wait()

    def _taken(self, held: Held) -> MoorageError:
        record = held.record
        if record is None:
            return TryAgain(f"{held.ip} is being given back to its pool; try again")
        if held.is_withdrawn:
            return TryAgain(f"{held.ip} is being given back to its pool; try again in two seconds")
        if held.state is AddressState.COOLING:
            now = asyncio.get_running_loop().time()
            ready_at = held.ready_at if held.ready_at is not None else now + self._holdings.cooldown
            return TryAgain(
                f"{held.ip} was released just now and cools down for another {max(ready_at - now, 0):.0f} s; "
                "try again then, or use a reservation, which needs no cooldown"
            )
        if held.lent:
            return AddressTaken(
                f"{held.ip} is just being given to another container; ask for another address"
            )
        return AddressTaken(held_by(held.ip, record))

    async def _ask_for(self, ip: IPAddress, held: Held | None, request: AddressRequest) -> Held:
        """Get one certain address from the store."""
        if self._holdings.hopeless:
            raise TryAgain(
                f"{ip} is not warm on node {self._holdings.node} and the store does not answer "
                f"({self._holdings.hopeless}); try again when it does"
            )
        self._holdings.check_takes_new()
        pool = self._holdings.catalogue.pool_of(ip)
        if pool is None:
            raise InvalidInput(f"{ip} is in no pool any more; ask for another address")
        if pool.disabled:
            raise InvalidInput(
                f"the pool {pool.cidr} of {ip} is disabled; ask for an address of another pool"
            )
        if held is None:
            held = self._holdings.ask_for(ip, request.network.name, pool)
        held.lent = True
        asked: asyncio.Future[Held] = asyncio.get_running_loop().create_future()
        self._holdings.asking[ip] = asked
        if self._holdings.catalogue.reserved(ip) is not None:
            # _choose() has compared the key.
            self._holdings.keyed.add(ip)
        self._holdings.wake.set()
        try:
            async with asyncio.timeout(REFILL_PATIENCE):
                return await asked
        except BaseException as error:
            # Granted in the same moment or later: then it is shelved, or freed if it is not for anybody.
            if self._holdings.asking.get(ip) is asked:
                del self._holdings.asking[ip]
            self._shelf.put_back(held)
            self._holdings.wake.set()
            if isinstance(error, TimeoutError):
                raise TryAgain(f"the store did not answer for {ip} in time; try again") from error
            raise
        finally:
            self._holdings.keyed.discard(ip)
