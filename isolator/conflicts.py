"""Addresses of endpoints here that the store says are somebody else's.

the holder is                                   the endpoint
the same container, on this very machine        keeps it, and is never cut off: the record was written under an
                                                earlier name of this node, and is this node's from now on
that, and the other name's agent may be alive   keeps it until that is known
a node that has not looked at a store in doubt  keeps it; where that node is this very machine under an earlier name,
                                                nobody else will look: the record is this node's from now on
anybody else                                    is cut off; once the address is free, or its own in the store
                                                again, it takes it back and is connected again
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import structlog

from ipam import keys
from ipam.catalogue import Catalogue
from ipam.errors import MoorageError
from ipam.holder import Holder
from ipam.holdings import Conflict, held_by
from ipam.journal import AddressRow
from ipam.keys import Family, IPAddress
from ipam.named import AddressRequest
from ipam.namesakes import Namesakes
from ipam.records import Address, AddressState
from ipam.store.base import Store
from isolator.endpoints import Endpoints, owner
from isolator.journal import Journal
from isolator.model import Endpoint, EndpointKey, EndpointState

log = structlog.get_logger(__name__)

LOOK_EVERY = 3.0
"""Seconds between looks whether what was cut off has its addresses again."""

RETRY = 1.0
"""Seconds before a conflict is judged once more."""


class Conflicts:
    """See the module's docstring."""

    def __init__(
        self,
        store: Store,
        journal: Journal,
        catalogue: Catalogue,
        holder: Holder,
        endpoints: Endpoints,
        namesakes: Namesakes,
        node: str,
    ) -> None:
        self._store = store
        self._journal = journal
        self._catalogue = catalogue
        self._holder = holder
        self._endpoints = endpoints
        self._namesakes = namesakes
        self._node = node
        self._news: asyncio.Queue[Conflict] = asyncio.Queue()
        self._freed: set[EndpointKey] = set()
        self._why: dict[EndpointKey, str] = {}

    def note(self, conflict: Conflict) -> None:
        """The store names another holder of an address that an endpoint here uses."""
        self._news.put_nowait(conflict)

    async def run(self) -> None:
        """Judge them until cancelled."""
        while True:
            conflict = await self._news.get()
            if not await self._settled(conflict):
                asyncio.get_running_loop().call_later(RETRY, self._news.put_nowait, conflict)

    async def bring_back(self) -> None:
        """Connect again what can be, and inherit what an earlier name of this machine contests, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await self._inherit_contested()
            await self._bring_back()

    def problems(self) -> list[str]:
        """Sentences about endpoints that are cut off: what keeps each from being connected again."""
        return [
            f"{endpoint.key} is cut off: {self._why.get(endpoint.key, 'its address belongs to another container')}; it "
            "is connected again when the address is free; end it if its app cannot wait"
            for endpoint in self._cut_off()
        ]

    def _cut_off(self) -> list[Endpoint]:
        return [e for e in self._endpoints.all() if e.state is EndpointState.CONFLICT]

    # -- judging

    async def _settled(self, conflict: Conflict) -> bool:
        endpoint = self._endpoints.of_ip(conflict.ip)
        if endpoint is None or self._is_held(conflict.ip, endpoint):
            return True
        if _is_same(conflict.holder, endpoint):
            try:
                if not await self._is_theirs(conflict.ip, endpoint):
                    return self._is_held(conflict.ip, endpoint) or endpoint.key in self._freed
            except MoorageError as error:
                log.warning("conflict is not judged yet", endpoint=str(endpoint.key), why=str(error))
                return False
        return await self._endpoints.cut_off(conflict)

    async def _is_theirs(self, ip: IPAddress, endpoint: Endpoint) -> bool:
        """Whether the store's holder is another container, or on another machine; if not, its record is made ours as
        soon as that is certain. Raises MoorageError."""
        kv = await self._store.get(keys.address_key(ip))
        record = None if kv is None else Address.decode(kv.key, kv.value)
        if kv is None or record is None:
            # Freed since: this endpoint uses it, and nobody else does.
            self._freed.add(endpoint.key)
            return False
        if not _is_same(record, endpoint):
            return True
        here = await self._namesakes.is_this_machine(record.node)
        if here:
            await self._inherit(endpoint, AddressRow(ip, record, kv.mod_revision, True))
        return here is False

    async def _inherit(self, endpoint: Endpoint, stored: AddressRow) -> None:
        async with self._endpoints.unchanged(endpoint) as is_there:
            if not is_there:
                return  # ended meanwhile, perhaps
            row = AddressRow(stored.ip, stored.record.with_(node=self._node), stored.revision, True)
            self._journal.save_addresses([row])
            self._holder.inherit(row)
        log.warning(
            "address was this machine's under another name; it is this node's from now on",
            ip=str(stored.ip),
            endpoint=str(endpoint.key),
            was=stored.record.node,
        )

    async def _inherit_contested(self) -> None:
        for conflict in self._holder.contested:
            endpoint = self._endpoints.of_ip(conflict.ip)
            if endpoint is not None and _is_same(conflict.holder, endpoint):
                try:
                    await self._is_theirs(conflict.ip, endpoint)
                except MoorageError as error:
                    log.warning("contest is not judged yet", endpoint=str(endpoint.key), why=str(error))

    def _is_held(self, ip: IPAddress, endpoint: Endpoint) -> bool:
        """Whether this node holds it for the endpoint."""
        held = self._holder.held(ip)
        return held is not None and held.record is not None and _is_same(held.record, endpoint)

    # -- the way back

    async def _bring_back(self) -> None:
        endpoints = [
            e for e in self._endpoints.all() if e.state is EndpointState.CONFLICT or e.key in self._freed
        ]
        self._why = {e.key: self._why[e.key] for e in endpoints if e.key in self._why}
        self._freed &= {e.key for e in endpoints}
        for endpoint in endpoints:
            if self._holder.problem:
                return
            try:
                await self._regain(endpoint)
                if all(self._is_confirmed(ip, endpoint) for ip in endpoint.ips):
                    self._freed.discard(endpoint.key)
                    await self._endpoints.reconnect(endpoint)
            except MoorageError as error:
                self._why[endpoint.key] = str(error)

    async def _regain(self, endpoint: Endpoint) -> None:
        """Hold its addresses again. Raises MoorageError naming who has one, or why it is not to be had now."""
        free = []
        for ip in endpoint.ips:
            if self._is_held(ip, endpoint):
                continue
            kv = await self._store.get(keys.address_key(ip))
            record = None if kv is None else Address.decode(kv.key, kv.value)
            if record is not None and _is_same(record, endpoint):
                if await self._is_theirs(ip, endpoint):
                    self._why[endpoint.key] = held_by(ip, record)
            elif record is not None and endpoint.state is not EndpointState.CONFLICT:
                self._freed.discard(endpoint.key)
                self.note(Conflict(ip, record))
            else:
                free.append(ip)
        if free:
            await self._take(endpoint, free)

    async def _take(self, endpoint: Endpoint, ips: Sequence[IPAddress]) -> None:
        """As an ADD takes addresses that it names. Raises MoorageError."""
        counts: dict[Family, int] = Counter(ip.version for ip in ips)
        lent = await self._holder.take(
            AddressRequest(
                network=await self._catalogue.network(endpoint.network),
                ips=tuple(ips),
                keeps_warm=False,
                counts=counts,
                netgroups=endpoint.netgroups,
            )
        )
        is_there = False
        try:
            async with self._endpoints.unchanged(endpoint) as is_there:
                if is_there:
                    self._holder.assign(lent, owner(endpoint))
        finally:
            if not is_there:  # ended meanwhile, perhaps
                self._holder.put_back(lent)

    def _is_confirmed(self, ip: IPAddress, endpoint: Endpoint) -> bool:
        held = self._holder.held(ip)
        return held is not None and not held.dirty and self._is_held(ip, endpoint)


def _is_same(record: Address, endpoint: Endpoint) -> bool:
    """Whether an address is assigned to this very container and interface."""
    return record.state is AddressState.ASSIGNED and (record.container_id, record.ifname) == tuple(
        endpoint.key
    )
