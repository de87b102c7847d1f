"""An address that cools down goes back at once to the container, and the interface, or to the uid, that had it last.

The cooldown protects whoever had an address from what was meant for the next owner, and the next owner from what was
meant for the last. Here they are the same, and it begins only when the interface and its connections are gone on this
node. The store's record goes from ``cooling``, or from ``assigned`` if the release was not sent yet, to ``assigned`` in
one step that compares the key's revision; nobody else can have it in between. So it needs no answer of the store.
Why, and what an ADD that names no address gets: docs/decisions/an-address-comes-back.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from ipam.holdings import Holdings
from ipam.keys import Family
from ipam.records import Address, AddressState
from ipam.shelf import Held

IN_FLIGHT = 3.0
"""Seconds an address is waited for whose release was sent and not answered; then nobody knows who has heard of it."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks for addresses: a container's interface, or a uid of an engine that asks before there is one."""

    container_id: str = ""
    ifname: str = ""
    uid: str = ""

    def had(self, record: Address) -> bool:
        """Whether it had the address of that record last."""
        if self.container_id and (record.container_id, record.ifname) == (self.container_id, self.ifname):
            return True
        return bool(self.uid) and record.former == self.uid


NOBODY = Asker()
"""Who had nothing before."""


class ComingBack:
    """See the module's docstring."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._shelf = holdings.shelf

    def is_for(self, held: Held, asker: Asker, network: str) -> bool:
        """Whether an address cools down here, lent to nobody, that the asker had last in that network."""
        record = held.record
        return (
            record is not None
            and record.state is AddressState.COOLING
            and record.network == network
            and not held.lent
            and asker.had(record)
        )

    def of(self, asker: Asker, network: str) -> Iterator[Held]:
        """All such addresses."""
        return (held for held in self._shelf.held.values() if self.is_for(held, asker, network))

    def unnamed(self, asker: Asker, network: str, family: Family, pool: str | None) -> Held | None:
        """The one that the asker had last of those that anybody may have. pool: the only one it may be of."""
        fitting = [
            held
            for held in self.of(asker, network)
            if held.ip.version == family
            and (pool is None or held.is_of(pool))
            and self._holdings.may_be_warm(held)
        ]
        return max(fitting, key=lambda held: held.record.since if held.record else 0.0, default=None)

    async def lend(self, held: Held) -> Held:
        """Lend one of them. Waits for its release if that was sent, for IN_FLIGHT seconds at most."""
        self._shelf.lend_this(held)
        try:
            async with asyncio.timeout(IN_FLIGHT):
                while held.is_uncertain:
                    await self._shelf.change_of(held.ip).wait()
        except TimeoutError:
            # Others take it for what it was, or have heard already that it is a member of nothing.
            held.told = ()
        except BaseException:
            self._shelf.put_back(held)
            raise
        return held
