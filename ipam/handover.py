"""Handing over: one certain address that another node holds, for a container here that asks for it by name.

there it is                what happens
warm, node alive           the node is asked to give it up; it is never robbed
warm, node not alive       refused: nobody else can say that it is unused
cooling, same reservation  the node is asked too: interface and connections are gone, the store confirmed
cooling                    refused for now; for a second or two if nobody had it
assigned                   refused; a reservation waits for its last holder to be gone
"""

from __future__ import annotations

import asyncio

from ipam import keys
from ipam.errors import AddressTaken, TryAgain
from ipam.holdings import HeldElsewhere
from ipam.intents import ask
from ipam.records import AddressState, Intent, IntentKind
from ipam.store.base import Store

GIVE_UP_WITHIN = 3.0
"""Seconds another node has to give up a warm address (docs/design.md, section 5)."""

LOOK_AGAIN = 0.2
"""Seconds between looks at an address that is waited for."""


async def hand_over(store: Store, taken: HeldElsewhere, reservation: str | None, deadline: float) -> None:
    """Returns when it may be worth asking for the address once more.

    reservation: the key of the address's reservation, if the asker presented it. deadline: event loop's clock.
    Raises AddressTaken or TryAgain saying who has it and why it is not given up, StoreUnavailable.
    """
    ip, holder = taken.ip, taken.holder
    left = deadline - asyncio.get_running_loop().time()
    same_key = reservation is not None and holder.reservation == reservation
    if left <= 0:
        raise _refusal(taken)
    if holder.state is AddressState.WARM or (holder.state is AddressState.COOLING and same_key):
        if await store.get(keys.ALIVE + holder.node) is None:
            raise _dead(taken)
        intent = Intent(
            kind=IntentKind.GIVE_BACK,
            ip=str(ip),
            mod_revision=taken.revision,
            evidence={"reservation": reservation or ""},
        )
        answer = await ask(store, holder.node, intent, min(left, GIVE_UP_WITHIN))
        if answer.get("done"):
            return
        if reservation is None:
            why = answer.get("why", f"{ip} is not given up by node {holder.node}")
            raise AddressTaken(f"{why}; ask for another address, or try again later")
        await asyncio.sleep(min(left, LOOK_AGAIN))
    elif reservation is None or not await _changes(store, taken, deadline):
        raise _refusal(taken)


async def _changes(store: Store, taken: HeldElsewhere, deadline: float) -> bool:
    """Whether something else stands there before the deadline."""
    now = asyncio.get_running_loop().time
    while True:
        found = await store.get(keys.address_key(taken.ip))
        if found is None or found.mod_revision != taken.revision:
            return True
        if now() >= deadline:
            return False
        await asyncio.sleep(LOOK_AGAIN)


def _refusal(taken: HeldElsewhere) -> TryAgain | AddressTaken:
    if taken.holder.is_withdrawn:
        return TryAgain(
            f"{taken.ip} is being given back to its pool by node {taken.holder.node}; try again in two seconds"
        )
    if taken.holder.state is AddressState.COOLING:
        return TryAgain(
            f"{taken.ip} was released on node {taken.holder.node} and cools down there; try again in half a "
            "minute, or use a reservation, which needs no cooldown"
        )
    return taken


def _dead(taken: HeldElsewhere) -> AddressTaken:
    return AddressTaken(
        f"{taken.ip} is {taken.holder.state.value} on node {taken.holder.node}, whose agent is not running, and "
        "nobody else can say that it is unused; start that agent, or ask for another address"
    )
