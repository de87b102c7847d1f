"""Keeping the table ``inet moorage`` as it should be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ipam.keys import IPNetwork
from isolator.model import IPAddress
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from isolator.policy import kernel, ruleset
from isolator.policy.nft import Nft


class Policy:
    """The table, in the network namespace of the thread that makes this; use it on that thread only.

    It remembers no endpoints. Every change is one transaction and may be repeated. All methods raise
    KernelRefused; its errno is ENOENT if the table is gone, which ``restore`` cures.
    """

    def __init__(self) -> None:
        self._nft = Nft()
        self._netfilter = NetlinkSocket(NETLINK_NETFILTER)
        self._fingerprint: bytes | None = None
        self._generation = -1

    def close(self) -> None:
        """Let go of the kernel; the table stays."""
        self._netfilter.close()

    def restore(
        self,
        endpoints: Iterable[tuple[str, Sequence[IPAddress]]],
        pools: Iterable[IPNetwork],
        nat_pools: Iterable[IPNetwork],
    ) -> None:
        """Make the whole table anew, at once: no packet sees a state in between, established flows go on.

        endpoints: (host_ifname, ips) of everything that may communicate.
        pools: where containers' addresses come from; traffic between them is never masqueraded.
        nat_pools: those of them whose traffic to elsewhere is.
        """
        self._nft.run(ruleset.table(endpoints, pools, nat_pools), "restore all rules")
        self._fingerprint = kernel.fingerprint(self._netfilter)

    def set_pools(self, pools: Iterable[IPNetwork], nat_pools: Iterable[IPNetwork]) -> None:
        """Replace the pools; see restore."""
        self._nft.run(ruleset.set_pools(pools, nat_pools), "replace the pools")

    def admit(self, host_ifname: str, ips: Sequence[IPAddress]) -> None:
        """Let an endpoint communicate from and to its addresses."""
        if ips:
            self._nft.run(ruleset.admit([(host_ifname, ips)]), f"admit {host_ifname}")

    def revoke(self, host_ifname: str, ips: Sequence[IPAddress]) -> None:
        """Undo ``admit``. Another endpoint's pair with the same address is not touched."""
        self.revoke_all([(host_ifname, ips)])

    def revoke_all(self, endpoints: Iterable[tuple[str, Sequence[IPAddress]]]) -> None:
        """Revoke several endpoints in one transaction."""
        commands = ruleset.revoke(endpoints)
        if commands:
            self._nft.run(commands, "revoke endpoints")

    def is_intact(self) -> bool:
        """Whether chains and rules are as ``restore`` left them: the poll of self-healing.

        About 0.02 ms while nobody changed any rule of the node. Elements are not looked at: compare
        ``elements`` for that, now and then.
        """
        generation = kernel.generation(self._netfilter)
        if generation == self._generation:
            return True
        if self._fingerprint is None or kernel.fingerprint(self._netfilter) != self._fingerprint:
            return False
        self._generation = generation
        return True

    def elements(self) -> set[tuple[str, IPAddress]]:
        """Every (host_ifname, ip) that may communicate now; empty if the table is gone."""
        return set(kernel.elements(self._netfilter))
