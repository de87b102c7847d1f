"""What commonly keeps containers from working on a machine, looked for one by one, each with what would mend it.

Every check looks at the machine it runs on and says nothing if all is well; none changes anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import nftables

from ipam.errors import MoorageError
from ipam.networks import list_networks
from ipam.records import Network
from isolator import sysctl
from isolator.policy.foreign import blocked
from moorage.cli.network import resolver_warning
from moorage.cli.session import Session


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong. commands: what would mend it, for a shell; () if the sentence says it."""

    check: str
    problem: str
    commands: tuple[str, ...] = ()


Check = Callable[[Session], Iterator[Finding]]


def agent(session: Session) -> Iterator[Finding]:
    """Does an agent answer, and is it content?"""
    try:
        status = session.ask_agent("status")
    except MoorageError as error:
        yield Finding("agent", str(error), ("systemctl start moorage-agent",))
        return
    if status["problem"]:
        yield Finding("agent", f"the agent is out of sync with the store: {status['problem']}")
    for sentence in status.get("collisions", []):
        yield Finding("pools", sentence)
    for name in status["conflicts"]:
        yield Finding("agent", f"{name} is cut off because its address belongs to another container; end it")


def forwarding(_: Session) -> Iterator[Finding]:
    """Does the node forward packets?"""
    for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
        if sysctl.read(name) == "0":
            setting = name.replace("/", ".")
            problem = f"{setting} is 0, so nothing is forwarded from or to containers; something changed it"
            yield Finding("forwarding", problem, (f"sysctl -w {setting}=1",))


def firewalls(_: Session) -> Iterator[Finding]:
    """Does another firewall drop what containers send?"""
    for found in blocked(_ruleset(), has_iptables=shutil.which("iptables-nft") is not None):
        yield Finding("firewall", f"{found.chain} drops containers' traffic: {found.why}", found.commands)
    if _legacy_tables():
        yield Finding(
            "firewall",
            "there are rules of the old iptables, which nft does not show; see whether their FORWARD drops anything",
            ("iptables-legacy -S FORWARD", "ip6tables-legacy -S FORWARD"),
        )


def resolvers(session: Session) -> Iterator[Finding]:
    """Do containers get name servers that they reach?"""
    try:
        networks = session.run(list_networks)
    except MoorageError as error:
        yield Finding("store", str(error))
        return
    yield from (found for network, _ in networks for found in _resolver(network))


def _resolver(network: Network) -> Iterator[Finding]:
    if warning := resolver_warning(network):
        yield Finding("resolver", warning, (f"moorage network set {network.name} --dns IP",))


CHECKS: dict[str, Check] = {
    "agent": agent,
    "forwarding": forwarding,
    "firewalls": firewalls,
    "resolvers": resolvers,
}


def examine(session: Session) -> list[Finding]:
    """Every finding of every check."""
    return [finding for check in CHECKS.values() for finding in check(session)]


class _Library(Protocol):
    """What we use of the binding, which has no types."""

    def set_json_output(self, on: bool) -> bool: ...

    def cmd(self, cmdline: str) -> tuple[int, str, str]: ...


def _ruleset() -> dict[str, Any]:
    """All nft rules of this namespace. Raises MoorageError."""
    library = cast("_Library", nftables.Nftables())
    library.set_json_output(True)
    code, output, words = library.cmd("list ruleset")
    if code:
        raise MoorageError(f"the firewall's rules cannot be read: {words.strip()}; use sudo")
    return dict(json.loads(output)) if output else {}


def _legacy_tables() -> bool:
    """Whether the old iptables filters packets here."""
    for name in ("ip_tables_names", "ip6_tables_names"):
        file = Path("/proc/net", name)
        if file.exists() and "filter" in file.read_text().split():
            return True
    return False
