"""Addresses that are promised before there is a container: allocated to a uid, under a name that the engine made up.

    take, plan(), accept      lent -> allocated     the uid was told
    lend(), plan_assign       allocated -> assigned its container has it; the uid stays with it
    plan_release()            allocated -> cooling; of an assigned one only the uid goes, its endpoint keeps it
    put_back                  an assignment that did not come about: allocated as before

A uid may have several addresses and an address one uid. They are in the journal and the store like all others: a
restart, or a reboot, forgets none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ipam.errors import NotAllocated
from ipam.holdings import Holdings, given
from ipam.journal import AddressRow
from ipam.keys import IPAddress
from ipam.records import Address, AddressState, Label
from ipam.shelf import Held, cooling


@dataclass(frozen=True, slots=True)
class Promise:
    """To whom addresses are allocated, and what their endpoint is to have unless it asks for something else.

    call: 32 hex digits that name the call they were allocated in; it becomes the addresses' id.
    """

    uid: str
    call: str
    engine: str
    netgroups: tuple[str, ...] = ()
    labels: tuple[Label, ...] = ()
    reservation: str = ""


class Allocations:
    """See the module's docstring. Nothing here waits; plans change nothing."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._shelf = holdings.shelf

    def all(self) -> list[Held]:
        """Every address that is allocated here and not assigned yet."""
        return [held for held in self._shelf.held.values() if held.state is AddressState.ALLOCATED]

    def of(self, uid: str) -> list[Held]:
        """All that a uid has, with an endpoint or without."""
        return [held for held in self._shelf.held.values() if uid and _uid(held) == uid]

    def from_call(self, call: str) -> list[Held]:
        """What that call allocated and nobody used yet."""
        return [held for held in self.all() if held.record is not None and held.record.id == call]

    def uid_of(self, ip: IPAddress) -> str:
        """Whose an address is; "" if it is no uid's."""
        held = self._shelf.held.get(ip)
        return "" if held is None else _uid(held)

    def plan(self, lent: Sequence[Held], promise: Promise) -> list[AddressRow]:
        """The rows that make lent addresses allocated."""
        return given(
            lent,
            AddressState.ALLOCATED,
            id=promise.call,
            uid=promise.uid,
            container_id="",
            ifname="",
            engine=promise.engine,
            netgroups=list(promise.netgroups),
            labels=list(promise.labels),
            reservation=promise.reservation,
        )

    def lend(self, ips: Collection[IPAddress]) -> list[Held]:
        """Lend allocated addresses to the endpoint of their uid; all or none. Raises what ``check`` raises."""
        found = self.check(ips)
        for held in found:
            held.lent = True
        return found

    def check(self, ips: Collection[IPAddress]) -> list[Held]:
        """The entries of addresses that one endpoint can have.

        Raises NotAllocated naming those that are not allocated here, and why, or that are not of one uid and network.
        """
        problems = [f"{ip} {problem}" for ip in ips if (problem := self._problem(ip))]
        if problems:
            raise NotAllocated(
                f"{', '.join(problems)}; a container gets only what was allocated or reserved for it on node "
                f"{self._holdings.node} before"
            )
        found = [self._shelf.held[ip] for ip in ips]
        for what in ("uid", "network"):
            values = sorted({str(getattr(held.record, what)) for held in found})
            if len(values) > 1:
                raise NotAllocated(
                    f"{', '.join(map(str, ips))} are of several {what}s, {', '.join(values)}; one interface has the "
                    f"addresses of one {what}"
                )
        return found

    def _problem(self, ip: IPAddress) -> str:
        """Why an address cannot be given to an endpoint; "" if it can."""
        held = self._shelf.held.get(ip)
        if held is None or held.record is None:
            return "is not allocated"
        record = held.record
        if record.state is AddressState.ASSIGNED:
            return f"belongs to {record.container_id} ({record.ifname})"
        if record.state is not AddressState.ALLOCATED:
            return f"is {record.state.value} and not allocated (any more)"
        return f"is just being given to a container of {record.uid}" if held.lent else ""

    def plan_release(self, entries: Iterable[Held]) -> list[AddressRow]:
        """The rows after which these are nobody's. What is lent at this moment stays as it is."""
        return [
            AddressRow(held.ip, _released(held.record), held.revision, True)
            for held in entries
            if held.record is not None and not held.lent and _uid(held)
        ]


def _uid(held: Held) -> str:
    return held.record.uid if held.record is not None and held.record.state.is_taken else ""


def _released(record: Address) -> Address:
    return (
        cooling(record) if record.state is AddressState.ALLOCATED else record.with_(uid="", former=record.uid)
    )
