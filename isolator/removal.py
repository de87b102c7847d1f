"""How an endpoint ends, the other way of an ADD:

    begin(endpoint)   journal 'detaching', routes withdrawn and policy revoked; its caller is answered
    run()             off the caller's path and in batches: interfaces and connections removed, journal rows and
                      addresses released
    ended(key)        waits for that

What the kernel refuses is tried again until it is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from ipam.holder import Holder
from isolator.drivers.naming import host_ifname, shaper_ifname
from isolator.errors import JournalUnwritable
from isolator.journal import Journal
from isolator.kernel import Kernel
from isolator.model import Endpoint, EndpointKey, EndpointState
from isolator.steps import reached

log = structlog.get_logger(__name__)

REAP_TOGETHER = 0.03
"""Seconds in which removals gather: one batch costs the kernel about as much as one interface, and holds up
whoever attaches meanwhile."""

REMOVE_RETRY = 1.0
"""Seconds before interfaces are removed again after the kernel refused it."""

END_PATIENCE = 5.0
"""Seconds that whoever needs an endpoint to be gone waits for it; removing takes some 20 ms."""


class Removal:
    """See the module's docstring. endpoints: all of this node, which the ended ones leave. on_removed: told of each."""

    def __init__(
        self,
        kernel: Kernel,
        journal: Journal,
        holder: Holder,
        endpoints: dict[EndpointKey, Endpoint],
        on_removed: Callable[[EndpointKey], object],
    ) -> None:
        self._kernel = kernel
        self._journal = journal
        self._holder = holder
        self._endpoints = endpoints
        self._on_removed = on_removed
        self._doomed: dict[EndpointKey, Endpoint] = {}
        self._reap = asyncio.Event()
        self._gone: dict[EndpointKey, asyncio.Event] = {}
        self._undropped: set[EndpointKey] = set()

    async def begin(self, endpoint: Endpoint) -> None:
        """Journal 'detaching', cut it off, and leave the rest to ``run``. Never fails."""
        if endpoint.key in self._doomed:
            return
        doomed = replace(endpoint, state=EndpointState.DETACHING)
        self._endpoints[endpoint.key] = doomed
        try:
            self._journal.save_endpoint(doomed)
        except JournalUnwritable as error:
            # A restart finds it again from kernel and store.
            log.warning("DEL goes on without the journal", endpoint=str(endpoint.key), why=str(error))
        reached("detach:journalled")
        try:
            await self._kernel.disconnect(doomed)
        except Exception as error:
            # Whatever it was, the reaper removes the interface, and revokes its addresses once more.
            log.error("endpoint is not cut off yet", endpoint=str(endpoint.key), why=repr(error))
        finally:
            self._doomed[endpoint.key] = doomed
            self._gone.setdefault(endpoint.key, asyncio.Event())
            self._reap.set()
        reached("detach:withdrawn")

    async def ended(self, key: EndpointKey) -> None:
        """Wait until nothing is left of it. Raises TimeoutError."""
        event = self._gone.get(key)
        if event is not None:
            async with asyncio.timeout(END_PATIENCE):
                await event.wait()

    async def run(self) -> None:
        """Remove what was cut off, in batches, until cancelled."""
        self._reap.set()
        again: asyncio.TimerHandle | None = None
        while True:
            await self._reap.wait()
            await asyncio.sleep(REAP_TOGETHER)
            self._reap.clear()
            batch = list(self._doomed.values())
            if not await self._removed(batch):
                # One that the kernel refuses must not hold up the others.
                for endpoint in batch:
                    await self._removed([endpoint])
            self._drop_rest()
            if again is not None:
                again.cancel()  # one at a time, however often something wakes this
            again = None
            if self._doomed or self._undropped:
                again = asyncio.get_running_loop().call_later(REMOVE_RETRY, self._reap.set)

    def _drop_rest(self) -> None:
        """Rows of ended endpoints that the journal could not let go of: a start would take them for attached."""
        # One that was attached anew has written its row over the old one.
        self._undropped -= self._endpoints.keys()
        if not self._undropped:
            return
        try:
            self._journal.drop_endpoints(self._undropped)
        except JournalUnwritable:
            return  # it was said when it began
        log.info("endpoints dropped from the journal, which can be written again", count=len(self._undropped))
        self._undropped.clear()

    async def _removed(self, batch: Sequence[Endpoint]) -> bool:
        if not batch:
            return True
        try:
            await self._kernel.remove(batch)
        except Exception as error:
            names = ", ".join(str(endpoint.key) for endpoint in batch)
            log.error("interfaces are not removed; tried again", endpoints=names, why=repr(error))
            return False
        reached("detach:removed")
        self._release(batch)
        return True

    def _release(self, batch: Sequence[Endpoint]) -> None:
        rows = [row for e in batch for row in self._holder.plan_release(e.ips, e.key)]
        try:
            with self._journal.transaction():
                self._journal.drop_endpoints(endpoint.key for endpoint in batch)
                self._journal.save_addresses(rows)
        except JournalUnwritable as error:
            # The store is told all the same. A restart with the old journal finds the interface gone and
            # releases once more.
            log.warning("release is not journalled; tried again", count=len(batch), why=str(error))
            self._undropped |= {endpoint.key for endpoint in batch}
        self._holder.accept(rows)
        for endpoint in batch:
            del self._endpoints[endpoint.key]
            del self._doomed[endpoint.key]
            self._on_removed(endpoint.key)
            self._gone.pop(endpoint.key).set()
            log.info("endpoint removed", endpoint=str(endpoint.key), ips=[str(ip) for ip in endpoint.ips])
        reached("detach:released")

    def forget(self, endpoint: Endpoint) -> None:
        """An endpoint of which nothing can be left in the kernel: its boot is over."""
        self._doomed[endpoint.key] = endpoint
        self._gone.setdefault(endpoint.key, asyncio.Event())
        self._release([endpoint])

    async def remove_stray(self, key: EndpointKey) -> None:
        """The journal does not know it; its name is enough to find what may be left of it."""
        name = host_ifname(key)
        shaper = shaper_ifname(name)
        if name in await self._kernel.links() or shaper in await self._kernel.shapers():
            await self._kernel.delete_links([name, shaper])
