"""What a driver is: how an endpoint is wired on its node.

A driver is synchronous, holds no state of its own and is idempotent: wiring what is wired, or removing
what is gone, succeeds. It runs on the agent's kernel thread, never on the event loop. Adding one is a
new file here and a line in ``drivers/__init__.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ipam.keys import IPNetwork
from isolator.model import UNLIMITED, Bandwidth, IPAddress


@dataclass(frozen=True, slots=True)
class Wiring:
    """Everything a driver needs to know of one endpoint.

    host_ifname: name of the node's end, unique on the node.
    ifname: name inside the container.
    netns: path of the container's namespace; None if it is not known any more.
    ips: IPv4 before IPv6; one of each at most, unless they were allocated.
    mac: the container end's MAC, ``aa:bb:..``.
    mtu: bytes.
    default_route: this interface wins the container's main default route whatever its name.
    bandwidth: limits on its traffic.
    next_hop: number of the one inside the container (ipam/next_hops.py).
    pools: what the container reaches by this interface and from its address, whatever holds the default route.
    alias: of the node's end, for who finds it and knows nothing of it.
    """

    host_ifname: str
    ifname: str
    netns: str | None
    ips: tuple[IPAddress, ...]
    mac: str
    mtu: int
    default_route: bool = False
    bandwidth: Bandwidth = UNLIMITED
    next_hop: int = 1
    pools: tuple[IPNetwork, ...] = ()
    alias: str = ""


CONTAINER_SIDE = "the container"
"""What sentences about the container's end begin with."""

UNSEEN = f"{CONTAINER_SIDE}'s side is not seen: "
"""What a sentence begins with that says why nobody knows what is there."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What came of a repair, as sentences: of each difference that was there before, and that is there after."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def mended(self) -> tuple[str, ...]:
        return tuple(text for text in self.before if text not in self.after)


class Driver(Protocol):
    """See the module's docstring."""

    name: str

    def setup(self, wiring: Wiring) -> None:
        """Wire it; the links go up last. A leftover of the same host_ifname is replaced.

        Raises NamespaceGone, NotANamespace, KernelRefused (interface exists already in the container,
        ...); whatever was done by then is undone before the error rises.
        """
        ...

    def withdraw(self, wiring: Wiring, *, for_good: bool = False) -> None:
        """Stop all traffic now, cheaply: host routes out, host link down. Never raises for what is gone.

        for_good: it will be removed, and says so to whoever finds it (``HostLink.is_doomed``).
        """
        ...

    def remove(self, wirings: Sequence[Wiring]) -> None:
        """Remove the interfaces, and what they left in namespaces that live on; batched, may take ~20 ms."""
        ...

    def check(self, wiring: Wiring) -> list[str]:
        """Sentences, one per difference between the wiring and the kernel; empty if all is well."""
        ...

    def damage(self, wiring: Wiring) -> list[str]:
        """Those of its differences that ``repair`` is for. Raises KernelRefused."""
        ...

    def repair(self, wiring: Wiring) -> list[str]:
        """Put back what somebody took of its links' state, addresses, routes, rules and neighbours; what the kernel
        refused of that, as sentences.

        What is there stays untouched, and so does all of it where its interface is gone. Neither end waits for the
        other: the node's is mended also where the container's cannot be. Raises KernelRefused.
        """
        ...

    def reroute(self, before: Wiring, now: Wiring) -> bool:
        """Have the container's routes follow its network's pools; says whether its interface took them: it may be down.

        before, now: what was wired, and the same with the pools it shall have. Raises KernelRefused, NamespaceGone,
        NotANamespace.
        """
        ...

    def limit_differences(self, wirings: Sequence[Wiring]) -> dict[str, list[str]]:
        """The same for limits on their traffic alone, of many at once, by host_ifname; only those that differ."""
        ...

    def restore_limits(self, wiring: Wiring) -> None:
        """Put in place what is missing of its limits; nothing if its interface is gone. Raises KernelRefused."""
        ...
