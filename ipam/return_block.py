"""Returning one block because an operator asks for it: the agent's side of `moorage block release`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from ipaddress import ip_network
from typing import Any

from ipam.errors import InvalidInput
from ipam.holdings import Holdings
from ipam.keys import IPNetwork
from ipam.records import AddressState

RETURN_WITHIN = 3.0
"""Seconds until the answer, whether the store has confirmed or not."""

LOOK = 0.01
"""Seconds between looks whether the block is returned."""


async def return_block(
    holdings: Holdings, text: str, on_returning: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Free what is warm in a block and return it. {"done", "why": what is in it}. Raises InvalidInput.

    on_returning: told when it may be returned but for the node's own address, which is to move elsewhere.
    """
    try:
        block = ip_network(text)
    except ValueError as error:
        raise InvalidInput(f"{text!r} is no block ({error}); correct the request") from error
    if holdings.problem:
        return {"done": False, "why": f"node {holdings.node} is out of sync: {holdings.problem}"}
    if block not in holdings.blocks:
        return {"done": False, "why": f"node {holdings.node} does not own it any more"}
    if used := _in_use(holdings, block):
        return {"done": False, "why": f"{', '.join(used)}; end those containers, or wait for the cooldown"}
    holdings.returning.add(block)
    try:
        for held in list(holdings.shelf.held.values()):
            if held.state is AddressState.WARM and held.ip.version == block.version and held.ip in block:
                holdings.shelf.withdraw(held)
        holdings.wake.set()
        on_returning()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETURN_WITHIN):
                while True:
                    if block not in holdings.blocks:
                        return {"done": True}
                    await asyncio.sleep(LOOK)
    finally:
        holdings.returning.discard(block)
        holdings.wake.set()
    used = _in_use(holdings, block) or ["it holds addresses of other nodes, or the store does not answer"]
    return {"done": False, "why": ", ".join(used)}


def _in_use(holdings: Holdings, block: IPNetwork) -> list[str]:
    """What in a block cannot be freed: all but warm addresses that nobody is about to use, and those that go back."""
    return [
        f"{ip} is {'being given out' if held.lent or held.record is None else held.record.state.value}"
        + (
            f" to {held.record.container_id or held.record.uid}"
            if held.record and held.record.state.is_taken
            else ""
        )
        for ip, held in sorted(holdings.shelf.held.items(), key=lambda item: int(item[0]))
        if ip.version == block.version
        and ip in block
        and (held.lent or held.dirty or held.state is not AddressState.WARM)
        and not held.is_withdrawn
        and not (held.record is not None and held.record.is_nodes_own)
    ]
