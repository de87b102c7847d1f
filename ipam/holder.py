"""The holder: how an ADD gets this node's addresses and a DEL gives them back.

    take()            lends warm addresses; waits for the next refill if there are none
    plan_assign()     the rows that the caller commits to the journal together with its endpoint
    accept()          they stand in the journal: the store is told behind the caller's back
    plan_release(), accept()    the same way back; the cooldown starts when the store has confirmed

``serve()`` keeps it going: sync with the store, then upkeep, and again whenever the fence moved.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import structlog

from ipam import keys
from ipam.catalogue import Catalogue, Reserved
from ipam.drain import Drain, refusal
from ipam.errors import AddressTaken, Fenced, InvalidInput, MoorageError, StoreError, TryAgain
from ipam.handover import GIVE_UP_WITHIN, hand_over
from ipam.holdings import Conflict, HeldElsewhere, Holdings, cooling, held_by
from ipam.journal import AddressRow, Journal
from ipam.keys import Family, IPAddress
from ipam.pools import Geometry
from ipam.pressure import Generosity
from ipam.records import AddressState, Intent, Label, Network
from ipam.return_block import return_block
from ipam.shelf import Held, Waiter
from ipam.store.base import Store
from ipam.sync import IsLive, SyncReport, sync
from ipam.upkeep import REFILL_PATIENCE, Upkeep
from ipam.writer import StoreRewound, Writer

log = structlog.get_logger(__name__)

COOLDOWN = 30.0
"""Seconds between a confirmed release and reuse (docs/design.md, section 5)."""

HANDOVER_PATIENCE = 20.0
"""Seconds an ADD with a reservation waits for the address's last holder to be gone."""

SYNC_RETRY = 1.0
"""Seconds before a failed sync is tried again."""


@dataclass(frozen=True, slots=True)
class AddressRequest:
    """What an ADD asks of IPAM.

    ips: static addresses, at most one a family. pool: only from the pool of that name.
    reservation: key of a reservation; its addresses, where it has any, are used.
    keeps_warm: whether addresses of the network are kept ready here from now on.
    """

    network: Network
    ips: tuple[IPAddress, ...] = ()
    reservation: str | None = None
    pool: str | None = None
    keeps_warm: bool = True


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom an address is assigned to; goes into its record."""

    container_id: str
    ifname: str
    engine: str
    netgroups: tuple[str, ...] = ()
    labels: tuple[Label, ...] = ()
    reservation: str = ""


class Holder:
    """See the module's docstring.

    is_live: asked, when syncing, whether an endpoint carries an address that the journal does not know.
    on_conflict: told when the store names another owner for an address that an endpoint uses.
    cooldown: seconds.
    """

    def __init__(
        self,
        node: str,
        store: Store,
        catalogue: Catalogue,
        journal: Journal,
        *,
        instance: str,
        boot_id: str,
        is_live: IsLive,
        on_conflict: Callable[[Conflict], None],
        cooldown: float = COOLDOWN,
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._is_live = is_live
        self._writer = Writer(store, node, instance, boot_id, self._on_trouble)
        self._holdings = Holdings(node, catalogue, journal, on_conflict, cooldown)
        self._shelf = self._holdings.shelf
        self._upkeep = Upkeep(store, self._writer, self._holdings)
        self._generosity = Generosity(self._holdings)
        self.drain = Drain(self._holdings, self._fail_all)

    def load(self) -> None:
        """Start from the journal, before the store was heard."""
        self._holdings.load()

    async def sync(self) -> SyncReport:
        """Take the fence and make journal and store agree. Raises Fenced, StoreUnavailable."""
        try:
            report = await sync(self._store, self._writer, self._holdings, self._is_live)
        except Fenced:
            # What is warm here may be another's meanwhile.
            self._holdings.serving = False
            raise
        if report.adopted or report.released or report.asserted or report.lost:
            log.info(
                "journal and store agree again",
                adopted=len(report.adopted),
                released=len(report.released),
                asserted=len(report.asserted),
                lost=len(report.lost),
            )
        return report

    async def serve(self) -> None:
        """Sync, write and refill until cancelled; trouble with the store is logged and outlived."""
        while True:
            try:
                if self._holdings.problem:
                    await self.sync()
                await self._upkeep.run()
            except MoorageError as error:
                self._lose_sync(error)
                await asyncio.sleep(SYNC_RETRY)

    def fenced(self, error: Fenced) -> None:
        """Another agent is known to write for this node: nothing is given out until that is settled."""
        if self._holdings.serving:
            self._lose_sync(error)
            self._holdings.wake.set()

    def _lose_sync(self, error: MoorageError) -> None:
        log.warning("addresses: out of sync with the store", why=str(error))
        self._holdings.problem = str(error)
        if isinstance(error, (Fenced, StoreRewound)):
            self._holdings.serving = False
        self._fail_all(TryAgain(f"no address can be given out now: {error}"))

    def _on_trouble(self, problem: str) -> None:
        self._fail_all(self._nothing_warm(problem))

    def _fail_all(self, error: MoorageError) -> None:
        """Nobody waits for a store that does not answer."""
        self._shelf.fail_waiters(error)
        for ip in list(self._holdings.asking):
            self._holdings.refuse(ip, error)

    def _nothing_warm(self, problem: str) -> TryAgain:
        return TryAgain(
            f"no address is warm on node {self._holdings.node} and the store does not answer ({problem}); "
            "containers can start again when it does"
        )

    def catalogue_changed(self) -> None:
        """Networks, pools or reservations are different now."""
        self._holdings.open_spaces()
        self._holdings.wake.set()

    @property
    def problem(self) -> str:
        """Why nothing but warm addresses can be given out now; "" if all is well."""
        return self._holdings.problem or self._writer.trouble

    # -- ADD

    async def take(self, request: AddressRequest) -> list[Held]:
        """Lend one address of every family the network has, IPv4 first; all or none.

        Raises AddressTaken naming the holder, InvalidInput, Exhausted saying who holds what, TryAgain
        when the store does not answer and nothing is warm. Every lent address goes on through
        ``plan_assign`` and ``accept``, or comes back through ``put_back``.
        """
        network = request.network
        if self._holdings.drained:
            raise refusal(self._holdings.node)
        if not self._holdings.serving:
            raise TryAgain(f"node {self._holdings.node} gives out no address now: {self._holdings.problem}")
        if request.keeps_warm:
            self._holdings.used.add(network.name)
        pools = self._catalogue.pools_of(network)
        if not pools:
            raise TryAgain(f"the pools of network {network.name} are gone; see `moorage network list`")
        if request.reservation is not None and not self._reserved(request):
            await self._catalogue.look_again()
        named = self._named(request, pools, await self._elsewhere(request))
        only = _pool_named(request.pool, pools, network)
        lent: list[Held] = []
        waiters: list[Waiter] = []
        try:
            for ip in named.values():
                lent.append(await self._take_named(ip, request))
            for family in sorted({p.family for p in pools} - set(named)):
                pool = only.name if only is not None and only.family == family else None
                held = self._shelf.lend(network.name, family, pool)
                if held is not None:
                    lent.append(held)
                else:
                    waiters.append(Waiter(network.name, family, pool))
            if waiters:
                lent.extend(await self._wait_for(waiters, network))
            self._check_still_held(lent)
        except BaseException:
            for waiter in waiters:
                self._shelf.forget_waiter(waiter)
            self.put_back(lent)
            raise
        return sorted(lent, key=lambda held: held.ip.version)

    def _check_still_held(self, lent: Sequence[Held]) -> None:
        """A sync that ran while this ADD waited may have found one of them to be another's."""
        for held in lent:
            if self._shelf.held.get(held.ip) is not held:
                raise TryAgain(f"{held.ip} was lost to another node just now; try again")
        if not self._holdings.serving:
            raise TryAgain(f"node {self._holdings.node} gives out no address now: {self._holdings.problem}")

    def _check_no_grace(self) -> None:
        left = self._holdings.no_new_until - asyncio.get_running_loop().time()
        if left > 0:
            raise TryAgain(
                f"the store was restored from a backup, or node {self._holdings.node} was removed from it; nothing "
                f"new is taken for another {left:.0f} s, so that other nodes can say what they hold; try again then"
            )

    async def _wait_for(self, waiters: Sequence[Waiter], network: Network) -> list[Held]:
        if self.problem:
            raise self._nothing_warm(self.problem)
        self._check_no_grace()
        for waiter in waiters:
            self._shelf.wait(waiter)
        self._holdings.wake.set()
        try:
            async with asyncio.timeout(REFILL_PATIENCE):
                return [await waiter.granted for waiter in waiters]
        except TimeoutError as error:
            raise TryAgain(
                f"no address of network {network.name} became ready within {REFILL_PATIENCE:.0f} s on node "
                f"{self._holdings.node}; see `moorage status` and `moorage network show {network.name}`"
            ) from error

    async def _elsewhere(self, request: AddressRequest) -> set[IPAddress]:
        """Of a reservation with several addresses, those that other nodes hold, if the store answers."""
        unknown = [r.ip for r in self._reserved(request) if r.ip not in self._shelf.held]
        if len(unknown) < 2 or self.problem:
            return set()
        try:
            found = await asyncio.gather(*(self._store.get(keys.address_key(ip)) for ip in unknown))
        except StoreError:
            return set()
        return {ip for ip, kv in zip(unknown, found, strict=True) if kv is not None}

    def _named(
        self, request: AddressRequest, pools: Sequence[Geometry], elsewhere: Collection[IPAddress]
    ) -> dict[Family, IPAddress]:
        """The addresses asked for by name or by reservation, by family. Raises InvalidInput, AddressTaken."""
        network = request.network
        named: dict[Family, IPAddress] = {}
        if request.reservation is not None:
            reserved = self._reserved(request)
            if not reserved:
                raise InvalidInput(
                    f"no address of network {network.name} is reserved under the key {request.reservation!r}; "
                    "reserve one with `moorage ip reserve IP --key KEY`"
                )
            for entry in sorted(reserved, key=lambda r: self._distance(r.ip, elsewhere)):
                named.setdefault(entry.ip.version, entry.ip)
        if len({ip.version for ip in request.ips}) < len(set(request.ips)):
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
            if not pool.usable(ip):
                raise InvalidInput(f"{ip} is excluded from pool {pool.cidr}; ask for another address")
            kept = self._catalogue.reserved(ip)
            if kept is not None and kept.reservation.key != request.reservation:
                raise AddressTaken(
                    f"{ip} is reserved; ask for it with the label moorage.reservation and its key, "
                    "or ask for another address"
                )
            named[ip.version] = ip
        return named

    def _reserved(self, request: AddressRequest) -> list[Reserved]:
        if request.reservation is None:
            return []
        return self._catalogue.reserved_under(request.reservation, request.network.name)

    def _distance(self, ip: IPAddress, elsewhere: Collection[IPAddress]) -> int:
        """Sorts the addresses of one reservation: what can be had at once comes first."""
        held = self._shelf.held.get(ip)
        if held is None:
            return 3 if ip in elsewhere else 0
        return 1 if held.state is not AddressState.ASSIGNED and not held.lent else 2

    async def _take_named(self, ip: IPAddress, request: AddressRequest) -> Held:
        kept = self._catalogue.reserved(ip)
        reserved = kept is not None and kept.reservation.key == request.reservation
        now = asyncio.get_running_loop().time()
        deadline = now + HANDOVER_PATIENCE
        handed_over_by = deadline if reserved else now + GIVE_UP_WITHIN
        while True:
            held = self._shelf.held.get(ip)
            if held is None or (held.is_asked_for and not held.lent):
                try:
                    return await self._ask_for(ip, held, request)
                except HeldElsewhere as taken:
                    await hand_over(
                        self._store, taken, request.reservation if reserved else None, handed_over_by
                    )
                    continue
            ready = not held.dirty and not held.lent
            if ready and held.state is AddressState.WARM:
                return self._shelf.lend_this(held)
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

    def _taken(self, held: Held) -> MoorageError:
        record = held.record
        if record is None:
            return TryAgain(f"{held.ip} is being given back to its pool; try again")
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
        if self.problem:
            raise TryAgain(
                f"{ip} is not warm on node {self._holdings.node} and the store does not answer "
                f"({self.problem}); try again when it does"
            )
        self._check_no_grace()
        pool = self._catalogue.pool_of(ip)
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
        if self._catalogue.reserved(ip) is not None:
            # _named() has compared the key.
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

    def put_back(self, lent: Sequence[Held]) -> None:
        """An ADD did not use these after all; nothing of them had reached the kernel."""
        for held in lent:
            self._shelf.put_back(held)
        self._holdings.nudge()

    def plan_assign(self, lent: Sequence[Held], owner: Owner) -> list[AddressRow]:
        """The rows that make lent addresses assigned; changes nothing."""
        assignment, now = uuid.uuid4().hex, time.time()
        return [
            AddressRow(
                held.ip,
                held.record.with_(
                    state=AddressState.ASSIGNED,
                    id=assignment,
                    container_id=owner.container_id,
                    ifname=owner.ifname,
                    engine=owner.engine,
                    netgroups=list(owner.netgroups),
                    labels=list(owner.labels),
                    reservation=owner.reservation,
                    app="",
                    task="",
                    framework="",
                    since=now,
                ),
                held.revision,
                True,
            )
            for held in lent
            if held.record is not None
        ]

    # -- DEL

    def plan_release(
        self, ips: Sequence[IPAddress], endpoint: tuple[str, str] | None = None
    ) -> list[AddressRow]:
        """The rows that make assigned addresses cooling; changes nothing.

        Left out are those that are not assigned, or not to ``endpoint`` (container id, interface) if it is given.
        """
        entries = [self._shelf.held.get(ip) for ip in ips]
        return [
            AddressRow(held.ip, cooling(held.record), held.revision, True)
            for held in entries
            if held is not None
            and held.record is not None
            and held.state is AddressState.ASSIGNED
            and endpoint in (None, (held.record.container_id, held.record.ifname))
        ]

    def plan_netgroups(
        self, ips: Sequence[IPAddress], endpoint: tuple[str, str], netgroups: Sequence[str]
    ) -> list[AddressRow]:
        """The rows that give an endpoint's addresses other netgroups; changes nothing."""
        entries = [self._shelf.held.get(ip) for ip in ips]
        return [
            AddressRow(held.ip, held.record.with_(netgroups=list(netgroups)), held.revision, True)
            for held in entries
            if held is not None
            and held.record is not None
            and held.state is AddressState.ASSIGNED
            and endpoint == (held.record.container_id, held.record.ifname)
        ]

    def accept(self, rows: Sequence[AddressRow]) -> None:
        """Rows of a plan stand in the journal, or will when its disk is mended: tell the store."""
        for row in rows:
            held = self._shelf.held.get(row.ip)
            if held is None:
                # Lost since it was planned. The store is asked all the same, and says whose it is.
                held = Held(row.ip, row.record, row.revision)
                self._shelf.add(held)
            held.lent = False
            held.journalled = True
            self._shelf.want(held, row.record)
        self._holdings.nudge()

    def give_up(self, ip: IPAddress) -> None:
        """An address that nothing uses any more is free at once, without a cooldown."""
        held = self._shelf.held.get(ip)
        if held is not None and held.record is not None:
            self._shelf.want(held, None)
            self._holdings.nudge()

    # -- what other nodes ask for

    async def give_back(self, intent: Intent) -> dict[str, Any]:
        """The answer to an intent of kind `give-back`: one address (``ip``), or what is not needed of a pool.

        {"done": whether all of it is gone now, "freed": how many, "why": why not}. Raises InvalidInput.
        """
        if self.problem:
            return {"done": False, "why": f"node {self._holdings.node} is out of sync: {self.problem}"}
        evidence = intent.evidence
        if not intent.ip:
            return await self._generosity.give_back_pool(str(evidence.get("pool", "")))
        try:
            ip = ip_address(intent.ip)
        except ValueError as error:
            raise InvalidInput(f"{intent.ip!r} is no IP address ({error}); correct the request") from error
        key = str(evidence.get("reservation", ""))
        return await self._generosity.give_back_ip(ip, intent.mod_revision, key)

    async def return_block(self, intent: Intent) -> dict[str, Any]:
        """The answer to an intent of kind `return-block`. Raises InvalidInput."""
        return await return_block(self._holdings, str(intent.evidence.get("block", "")))

    # -- looking in

    def has_warm(self, network: str | None) -> bool:
        """Whether an ADD on ``network``, or on any, needs nothing from the store now."""
        return self._holdings.serving and any(
            held.state is AddressState.WARM
            and not held.lent
            and held.revision > 0
            and held.record is not None
            and network in (None, held.record.network)
            for held in self._shelf.held.values()
        )

    def held(self, ip: IPAddress) -> Held | None:
        """What this node knows of one address of its own."""
        return self._shelf.held.get(ip)

    def pools_of_blocks(self) -> set[str]:
        """The pools that this node has blocks of."""
        return {row.pool for row in self._holdings.blocks.values()}

    def assigned(self) -> dict[IPAddress, Held]:
        """Every address that is assigned here."""
        return {ip: held for ip, held in self._shelf.held.items() if held.state is AddressState.ASSIGNED}

    def status(self) -> dict[str, object]:
        """Numbers for `moorage status`."""
        counts: Counter[tuple[str, int, str]] = Counter()
        for ip, held in self._shelf.held.items():
            if held.record is not None and not held.is_asked_for:
                counts[held.record.network, ip.version, held.record.state.value] += 1
        return {
            "in_sync": not self.problem,
            "drained": self._holdings.drained,
            "problem": self.problem,
            "fence_seq": self._writer.seq,
            "transactions": self._writer.transactions,
            "outbox": len(self._shelf.dirty()),
            "blocks": [str(block) for block in self._holdings.blocks],
            "addresses": [
                {"network": network, "family": family, "state": state, "count": count}
                for (network, family, state), count in sorted(counts.items())
            ],
        }


def _pool_named(name: str | None, pools: Sequence[Geometry], network: Network) -> Geometry | None:
    """The pool an ADD named by its name or CIDR. Raises InvalidInput naming the network's pools."""
    if name is None:
        return None
    for pool in pools:
        if name in (pool.name, str(pool.cidr)):
            return pool
    raise InvalidInput(
        f"network {network.name} has no pool {name!r}; it has {', '.join(str(p.cidr) for p in pools)}"
    )
