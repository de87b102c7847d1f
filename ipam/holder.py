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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import Any

import structlog

from ipam.allocations import Allocations
from ipam.catalogue import Catalogue
from ipam.coming_back import Asker, ComingBack
from ipam.continuity import Continuity
from ipam.drain import Drain, refusal
from ipam.errors import Fenced, InvalidInput, MoorageError, StoreUnavailable, TryAgain
from ipam.grace import Grace
from ipam.holdings import Conflict, Holdings, given
from ipam.journal import AddressRow, Journal
from ipam.keys import Family, IPAddress
from ipam.named import AddressRequest, Named
from ipam.namesakes import Namesakes
from ipam.outage import Outage
from ipam.pools import Geometry
from ipam.pressure import Generosity
from ipam.records import Address, AddressState, Intent, Label, Network
from ipam.refill import REFILL_PATIENCE
from ipam.return_block import return_block
from ipam.shelf import Held, Waiter, cooling, netgroups_told
from ipam.store.base import Store
from ipam.sync import IsLive, SyncReport, sync
from ipam.upkeep import Upkeep
from ipam.writer import StoreRewound, Writer

log = structlog.get_logger(__name__)

COOLDOWN = 30.0
"""Seconds between a confirmed release and reuse (docs/design.md, section 5)."""

SYNC_RETRY = 1.0
"""Seconds before a failed sync is tried again."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom addresses are assigned to; goes into their records. endpoint: into that of the first; records.Address."""

    container_id: str
    ifname: str
    engine: str
    netgroups: tuple[str, ...] = ()
    labels: tuple[Label, ...] = ()
    reservation: str = ""
    endpoint: Mapping[str, Any] = field(default_factory=dict)


class Holder:
    """See the module's docstring.

    is_live: asked, when syncing, whether an endpoint carries an address that the journal does not know.
    on_conflict: told when the store names another owner for an address that an endpoint uses.
    cooldown: seconds. preloads: not on a node that runs no containers. others_away: whether a registered node is not
    in touch with the store. yields_to: see Holdings. on_asserted: told when the store, after a doubt, has all of what
    is held here. nodes: the names of all that were heard of. namesakes: looks who else has, or had, the node's name;
    None where nobody could. state_id: see Membership. journal_was_behind: the journal that this began with was older
    than the store.
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
        preloads: bool = True,
        others_away: Callable[[], bool] = lambda: False,
        yields_to: Callable[[str], bool] = lambda _: True,
        on_asserted: Callable[[], None] = lambda: None,
        nodes: Callable[[], Collection[str]] = lambda: (),
        namesakes: Namesakes | None = None,
        state_id: str = "",
    ) -> None:
        self._store = store
        self._namesakes = namesakes
        self._catalogue = catalogue
        self._is_live = is_live
        self._on_asserted = on_asserted
        self._taken_over: Fenced | None = None
        self._outage = outage = Outage(self._on_away)
        grace = Grace(journal, boot_id, at_least=cooldown)
        self.continuity = Continuity(store, node, journal, grace, self._doubt, nodes)
        self._writer = Writer(store, node, instance, boot_id, outage, lambda: self.continuity.guard, state_id)
        self._holdings = Holdings(
            node,
            catalogue,
            journal,
            outage,
            on_conflict,
            cooldown,
            preloads,
            others_away,
            grace=grace,
            yields_to=yields_to,
        )
        self._shelf = self._holdings.shelf
        self.journal_was_behind = False
        self._upkeep = Upkeep(store, self._writer, self._holdings, self._written)
        self._coming_back = ComingBack(self._holdings)
        self._named = Named(store, self._holdings, self._coming_back)
        self._generosity = Generosity(self._holdings)
        self.drain = Drain(self._holdings, self._fail_all)
        self.allocations = Allocations(self._holdings)

    def load(self) -> None:
        """Start from the journal, before the store was heard."""
        self._holdings.load(doubted=self.continuity.doubted)

    async def sync(self) -> SyncReport:
        """Take the fence and make journal and store agree. Raises Fenced, StoreRewound, StoreUnavailable."""
        self._taken_over = None
        try:
            if self._namesakes is not None:
                await self._namesakes.look()
            report = await sync(self._store, self._writer, self._holdings, self._is_live, self.continuity)
        except Fenced as error:
            # What is warm here may be another's meanwhile.
            self._holdings.serving = False
            self._holdings.disputed = True
            if self._namesakes is not None and (
                why := await self._namesakes.refusal(had_name=self._writer.has_claimed)
            ):
                raise Fenced(why) from error
            raise
        if self._namesakes is not None:
            self._namesakes.settled()
        self.journal_was_behind = self.journal_was_behind or report.behind
        if self._taken_over is not None:
            # Told while journal and store were compared.
            self._lose_sync(self._taken_over)
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

    def unread(self, why: str) -> None:
        """What is read of the store now and then, also where nothing is written, was not answered."""
        self._outage.unread(why)

    def read(self) -> None:
        """It was."""
        self._outage.read()

    def _doubt(self, why: str) -> None:
        if self._holdings.serving:
            self._lose_sync(StoreRewound(f"the store is in doubt: {why}"))
            self._holdings.wake.set()

    def _written(self) -> None:
        # While others may have to yield, a restart has to know of the doubt.
        if not self._holdings.contested:
            self.continuity.asserted()
        self._on_asserted()

    def end_grace(self) -> None:
        """All nodes have asserted what they hold."""
        self._holdings.grace.end()
        self._holdings.wake.set()

    def fenced(self, error: Fenced) -> None:
        """Another agent is known to write for this node: nothing is given out until that is settled."""
        self._taken_over = error
        if self._holdings.serving:
            self._lose_sync(error)
            self._holdings.wake.set()

    def _lose_sync(self, error: MoorageError) -> None:
        log.warning("addresses: out of sync with the store", why=str(error))
        self._holdings.problem = str(error)
        if isinstance(error, (Fenced, StoreRewound)):
            self._holdings.serving = False
            self._holdings.disputed = True
        if isinstance(error, StoreUnavailable):
            self._on_away(str(error))
        else:
            self._fail_all(TryAgain(f"no address can be given out now: {error}"))

    def _on_away(self, problem: str) -> None:
        """Nobody waits for a store that is away; ipam/outage.py says from when on it is."""
        self._fail_all(self._nothing_warm(problem))

    def _fail_all(self, error: MoorageError) -> None:
        self._shelf.fail_waiters(error)
        for ip in list(self._holdings.asking):
            self._holdings.refuse(ip, error)
        for held in self._shelf.dirty():
            if held.lent:
                self._shelf.announce(held.ip)

    def _nothing_warm(self, problem: str) -> TryAgain:
        return TryAgain(
            f"no address is warm on node {self._holdings.node} and the store does not answer ({problem}); "
            "containers can start again when it does"
        )

    def catalogue_changed(self) -> None:
        """Networks, pools or reservations are different now."""
        self._holdings.catalogue_changed()

    @property
    def has_claimed(self) -> bool:
        """See Membership."""
        return self._writer.has_claimed

    @property
    def problem(self) -> str:
        """Why nothing but warm addresses can be given out now; "" if all is well."""
        return self._holdings.trouble

    @property
    def agrees(self) -> bool:
        """Whether journal and store were made to agree, and nothing was heard since that says otherwise; also while the
        store does not answer."""
        return not self._holdings.problem

    @property
    def serves(self) -> bool:
        """Whether what is held here is known, and this agent's to give out."""
        return self._holdings.serving

    # -- ADD

    async def take(self, request: AddressRequest) -> list[Held]:
        """Lend one address of every family the network has, or as many as are asked for, IPv4 first; all or none.

        Raises AddressTaken naming the holder, InvalidInput, Exhausted saying who holds what, TryAgain
        when the store does not answer and nothing is warm. Every lent address goes on through
        ``plan_assign`` and ``accept``, or comes back through ``put_back``.
        """
        network, netgroups = request.network, request.members_of
        self._check_giving()
        if request.keeps_warm:
            self._holdings.used.add(network.name)
            self._holdings.stock.note_add(network.name, netgroups)
        pools = self._catalogue.pools_of(network)
        if not pools:
            raise TryAgain(f"the pools of network {network.name} are gone; see `moorage network list`")
        named = await self._named.addresses(request, pools)
        missing = _missing(request, pools, named)
        only = _pool_named(request.pool, pools, network)
        lent: list[Held] = []
        waiters: list[Waiter] = []
        try:
            for ip in named:
                lent.append(await self._named.take(ip, request))
            for family in missing:
                pool = only.name if only is not None and only.family == family else None
                held = self._shelf.lend(network.name, family, pool, netgroups)
                back = held or self._coming_back.unnamed(request.asker, network.name, family, pool)
                if held is not None:
                    lent.append(held)
                elif back is not None:
                    # Nothing is warm: sooner than to wait, or to fail, it has what it had.
                    lent.append(await self._coming_back.lend(back))
                else:
                    waiters.append(Waiter(network.name, family, pool, netgroups))
            if waiters:
                lent.extend(await self._wait_for(waiters, network))
            await self._named.heard(lent)
            self._check_still_held(lent)
        except BaseException:
            for waiter in waiters:
                self._shelf.forget_waiter(waiter)
            self.put_back(lent)
            raise
        return sorted(lent, key=lambda held: held.ip.version)

    def _check_still_held(self, lent: Sequence[Held]) -> None:
        """While this ADD waited, one of them may have turned out to be another's, or not to be for containers."""
        for held in lent:
            if self._shelf.held.get(held.ip) is not held:
                raise TryAgain(f"{held.ip} was lost to another node just now; try again")
            pool = self._catalogue.pool_of(held.ip)
            if pool is not None and not pool.usable(held.ip):
                raise TryAgain(f"{held.ip} turned out just now to be used by a node's own network; try again")
        self._check_serving()

    def _check_giving(self) -> None:
        if self._holdings.drained:
            raise refusal(self._holdings.node)
        self._check_serving()

    def _check_serving(self) -> None:
        if not self._holdings.serving:
            kind = Fenced if self._holdings.disputed else TryAgain
            raise kind(f"node {self._holdings.node} gives out no address now: {self._holdings.problem}")

    async def _wait_for(self, waiters: Sequence[Waiter], network: Network) -> list[Held]:
        if self._holdings.hopeless:
            raise self._nothing_warm(self._holdings.hopeless)
        self._holdings.check_takes_new()
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

    def coming_back(self, asker: Asker, network: str) -> set[IPAddress]:
        """The addresses that cool down here and the asker had last in that network, which it may have at once."""
        return {held.ip for held in self._coming_back.of(asker, network)}

    def put_back(self, lent: Sequence[Held]) -> None:
        """An ADD did not use these after all; nothing of them had reached the kernel."""
        for held in lent:
            self._shelf.put_back(held)
        self._holdings.nudge()

    def plan_assign(self, lent: Sequence[Held], owner: Owner) -> list[AddressRow]:
        """The rows that make lent addresses assigned; changes nothing."""
        rows = given(lent, AddressState.ASSIGNED, id=uuid.uuid4().hex, **_whose(owner))
        return [
            replace(row, record=row.record.with_(endpoint=dict(owner.endpoint))) if number == 0 else row
            for number, row in enumerate(rows)
        ]

    def carry(self, ips: Sequence[IPAddress], network: str, owner: Owner) -> None:
        """Addresses that an endpoint has by what the kernel says, and that the journal does not know for its. For a
        start, before anything is given out."""
        name = uuid.uuid4().hex
        for number, ip in enumerate(ips):
            held = self._shelf.held.get(ip)
            known = held.record if held is not None and held.state is AddressState.ASSIGNED else None
            if known is not None and (known.container_id, known.ifname) == (owner.container_id, owner.ifname):
                continue
            pool = self._catalogue.pool_of(ip)
            record = Address(
                pool=pool.name if pool is not None else "",  # then once the store was heard
                state=AddressState.ASSIGNED,
                node=self._holdings.node,
                id=name,
                network=network,
                since=time.time(),
                endpoint={} if number else dict(owner.endpoint),
                **_whose(owner),
            )
            self._holdings.carry(ip, record)

    def assign(self, lent: Sequence[Held], owner: Owner) -> None:
        """Assign lent addresses that stand with no endpoint in one commit. Raises TryAgain when the journal cannot be
        written; they are put back then."""
        rows = self.plan_assign(lent, owner)
        try:
            self._holdings.journal.save_addresses(rows)
        except BaseException:
            self.put_back(lent)
            raise
        self.accept(rows)

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

    def plan_change(
        self, ips: Sequence[IPAddress], endpoint: tuple[str, str], /, **fields: Any
    ) -> list[AddressRow]:
        """The rows that change fields of the records of an endpoint's addresses; changes nothing."""
        entries = [self._shelf.held.get(ip) for ip in ips]
        return [
            AddressRow(held.ip, held.record.with_(**fields), held.revision, True)
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

    def inherit(self, row: AddressRow) -> None:
        """The store has the address under an earlier name of this machine, as ``row`` but for the node: write over it.
        The row stands in the journal already."""
        held = self._shelf.held.get(row.ip)
        if held is not None:
            held.revision, held.told = row.revision, netgroups_told(row.record)
        self.accept([row])

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

    async def return_block(
        self, intent: Intent, on_returning: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """The answer to an intent of kind `return-block`. Raises InvalidInput."""
        return await return_block(self._holdings, str(intent.evidence.get("block", "")), on_returning)

    # -- looking in

    def check_ready(self, network: str | None) -> None:
        """Raises TryAgain saying why an ADD on ``network``, or on any, could get no address now; of them Fenced."""
        self._check_giving()
        if self._holdings.hopeless and not self._is_stocked(network):
            raise self._nothing_warm(self._holdings.hopeless)
        for (name, _), error in self._holdings.exhausted().items():
            if name == network:
                raise error

    def _is_stocked(self, network: str | None) -> bool:
        """Whether an ADD on ``network``, or on any, needs nothing from the store now."""
        if network is None:
            return bool(self._shelf.all_ready())
        families = {pool.family for pool in self._catalogue.pools() if pool.network == network}
        return all(self._shelf.warm_count(network, family) for family in families)

    async def confirmed(self, ips: Iterable[IPAddress]) -> None:
        """Returns when the store has, of each of these addresses, what it should have by now."""
        self._holdings.wake.set()
        for ip in ips:
            while (held := self._shelf.held.get(ip)) is not None and held.dirty:
                await self._shelf.change_of(ip).wait()

    def held(self, ip: IPAddress) -> Held | None:
        """What this node knows of one address of its own."""
        return self._shelf.held.get(ip)

    @property
    def contested(self) -> list[Conflict]:
        """Addresses that are used here, and that the store has as those of nodes which have not looked at it yet."""
        return list(self._holdings.contested.values())

    def is_returning(self, ip: IPAddress) -> bool:
        """Whether an address lies in a block that is being returned; ipam/return_block.py."""
        return any(block.version == ip.version and ip in block for block in self._holdings.returning)

    def pools_of_blocks(self) -> set[str]:
        """The pools that this node has blocks of."""
        return {row.pool for row in self._holdings.blocks.values()}

    def assigned(self) -> dict[IPAddress, Held]:
        """Every address that is assigned here."""
        return {ip: held for ip, held in self._shelf.held.items() if held.state is AddressState.ASSIGNED}

    def unknown_to_others(self) -> list[Held]:
        """Containers' addresses of which other nodes do not know all netgroups yet: the store has not confirmed the
        record, and what it had before does not say them. After a start without the store: all that is not confirmed."""
        return [held for held in self._shelf.dirty() if self.is_unknown_to_others(held.ip)]

    def is_unknown_to_others(self, ip: IPAddress) -> bool:
        """Whether it is one of ``unknown_to_others``."""
        held = self._shelf.held.get(ip)
        return (
            held is not None
            and held.dirty
            and held.state is AddressState.ASSIGNED
            and not set(netgroups_told(held.record)) <= set(held.told)
        )

    def status(self) -> dict[str, object]:
        """Numbers for `moorage status`."""
        counts: Counter[tuple[str, int, str]] = Counter()
        for ip, held in self._shelf.held.items():
            if held.record is not None and not held.is_asked_for:
                counts[held.record.network, ip.version, held.record.use] += 1
        return {
            "in_sync": not self.problem,
            "drained": self._holdings.drained,
            "problem": self.problem,
            "fence_seq": self._writer.seq,
            "transactions": self._writer.transactions,
            "grace": {"seconds": round(self._holdings.grace.left, 1), "why": self._holdings.grace.why},
            "contested": [
                f"{conflict.ip} is used here, and the store has it on node {conflict.holder.node}, which has not "
                "looked at the store since that was in doubt; start the agent there, or if the machine is gone: "
                f"`moorage node remove {conflict.holder.node}`"
                for conflict in self.contested
            ],
            "set_aside": [
                f"the record of {ip} is not in the store ({why}); other nodes do not know who uses it: end the "
                "container and start it with fewer labels, or raise etcd's --max-request-bytes"
                for ip, why in self._holdings.set_asides.items()
            ],
            "outbox": len(self._shelf.dirty()),
            "exhausted": [
                {"network": network, "family": family, "why": str(error)}
                for (network, family), error in sorted(self._holdings.exhausted().items())
            ],
            "blocks": [str(block) for block in self._holdings.blocks],
            "addresses": [
                {"network": network, "family": family, "state": state, "count": count}
                for (network, family, state), count in sorted(counts.items())
            ],
        }


def _whose(owner: Owner) -> dict[str, Any]:
    """The fields of the records of an owner's addresses."""
    return {
        "container_id": owner.container_id,
        "ifname": owner.ifname,
        "engine": owner.engine,
        "netgroups": list(owner.netgroups),
        "labels": list(owner.labels),
        "reservation": owner.reservation,
    }


def _missing(request: AddressRequest, pools: Sequence[Geometry], named: Sequence[IPAddress]) -> list[Family]:
    """The families of the addresses to be lent beside the named ones. Raises InvalidInput."""
    families = {pool.family for pool in pools}
    wanted = dict.fromkeys(families, 1) if request.counts is None else request.counts
    have = Counter(ip.version for ip in named)
    for family, count in wanted.items():
        if count and family not in families:
            raise InvalidInput(
                f"network {request.network.name} has no IPv{family} pool, and {count} IPv{family} addresses are asked "
                "for; ask for none, or add a pool to the network"
            )
    over = [family for family, count in have.items() if count > wanted.get(family, 0)]
    if over:
        raise InvalidInput(
            f"{', '.join(map(str, named))} are more IPv{over[0]} addresses than the {wanted.get(over[0], 0)} that are "
            "asked for; ask for more, or name fewer"
        )
    return [family for family in sorted(wanted) for _ in range(wanted[family] - have[family])]


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
