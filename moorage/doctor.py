"""What commonly keeps containers from working on a machine, looked for one by one, each with what would mend it.

Every check looks at the machine it runs on and says nothing if all is well; none changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from shlex import quote
from typing import Any

from ipam.errors import MoorageError
from ipam.isolation import STORE
from ipam.networks import list_networks
from ipam.records import Network
from ipam.store.certificates import ending_servers
from ipam.store.etcd_url import SCHEME, parse
from isolator import sysctl
from isolator.connections import LEVELS
from isolator.endpoints import ADMITTED
from isolator.errors import KernelRefused
from isolator.hostports import collisions, has_host_ip, who_listens
from isolator.netlink import Node
from isolator.netlink.socket import NETLINK_NETFILTER, NetlinkSocket
from isolator.policy.foreign import blocked
from isolator.policy.look import has_iptables, waiting
from isolator.policy.others import Ruleset, read
from moorage.cli.network import resolver_warning
from moorage.cli.session import Session, as_port_mapping


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
    if why := status.get("journal"):
        yield Finding("journal", f"{why}; until then every ADD is refused")
    for sentence in status.get("certificates", []):
        yield Finding("certificates", sentence)
    for sentence in status.get("collisions", []):
        yield Finding("pools", sentence)
    for sentence in status.get("damage", []):
        yield Finding("agent", f'{sentence}; see docs/runbook.md, "Something cannot be put back"')
    for sentence in status.get("failing", []):
        yield Finding("agent", sentence)
    for sentence in status.get("lost", []):
        yield Finding("agent", sentence)
    # An agent of an earlier version does not say why, and knows neither of the others.
    for sentence in status.get("cut_off", [f"{name} is cut off" for name in status["conflicts"]]):
        yield Finding("agent", sentence)
    for sentence in [*status.get("contested", []), *status.get("set_aside", [])]:
        yield Finding("addresses", sentence)
    if (grace := status.get("grace", {})).get("seconds"):
        yield Finding(
            "store",
            f"nothing new is taken until all nodes have asserted what they hold, or for {grace['seconds']:.0f} s: "
            f"{grace['why']}",
        )
    for sentence in status.get("identity", []):
        yield Finding("identity", sentence)
    if question := status.get("missing"):
        yield Finding("agent", question, ("moorage endpoint missing",))
    for sentence in status["fabric"].get("problems", []):
        yield Finding("fabric", sentence)
    # An agent of an earlier version knows neither.
    yield from _tunnel(status["fabric"].get("device", ""), status["fabric"].get("tunnel", {}))
    yield from _connections(status.get("connections", {}))


def servers_certificates(session: Session) -> Iterator[Finding]:
    """Do the certificates of etcd's servers last?"""
    url = session.config().store
    if url.startswith(SCHEME):
        for sentence in ending_servers(parse(url)):
            yield Finding("certificates", sentence)


def _tunnel(device: str, tunnel: Mapping[str, Any]) -> Iterator[Finding]:
    if device and tunnel.get("open"):
        yield Finding(
            "tunnel",
            "the tunnel takes packets from anybody, because the store has not said yet which nodes there are; see that "
            "it answers",
        )
    if unnamed := tunnel.get("unnamed"):
        yield Finding(
            "tunnel",
            f"the tunnel takes packets from {', '.join(unnamed)}, which no node of the store has; if those "
            "machines are gone for good, delete the firewall's table and have the agent make it anew from the store",
            (
                "systemctl stop moorage-agent",
                "nft delete table inet moorage",
                "systemctl start moorage-agent",
            ),
        )


def _connections(connections: Mapping[str, Any]) -> Iterator[Finding]:
    tracked, most = connections.get("tracked", 0), connections.get("most", 0)
    if most and tracked >= LEVELS[0] * most:
        largest = ", ".join(
            f"{one['endpoint'] or one['ip']} {one['count']}" for one in connections["largest"]
        )
        yield Finding(
            "connections",
            f"{tracked} of {most} entries of the connection table are in use, most by {largest}; when it is full the "
            "node loses packets of everybody: end what opens so many, give its network fewer, or enlarge the table",
            (
                "moorage network set NETWORK --max-connections N",
                f"sysctl -w net.netfilter.nf_conntrack_max={2 * most}",
            ),
        )


def forwarding(session: Session) -> Iterator[Finding]:
    """Does the node forward packets?"""
    why = "something changed it" if _agent_answers(session) else "the agent turns it on when it starts"
    for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
        if sysctl.read(name) == "0":
            setting = name.replace("/", ".")
            problem = f"{setting} is 0, so nothing is forwarded from or to containers; {why}"
            yield Finding("forwarding", problem, (f"sysctl -w {setting}=1",))


def firewalls(session: Session) -> Iterator[Finding]:
    """Does another firewall drop what containers send?"""
    ruleset = _other_firewalls()
    found = blocked(ruleset, has_iptables=has_iptables())
    left_to_agent = waiting(ruleset, found) if found and _opens_docker_user(session) else frozenset()
    for one in found:
        if one.chain not in left_to_agent:
            yield Finding("firewall", f"{one.chain} drops containers' traffic: {one.why}", one.commands)
    if _legacy_tables():
        yield Finding(
            "firewall",
            "there are rules of the old iptables, which nft does not show; see whether their FORWARD drops anything",
            ("iptables-legacy -S FORWARD", "ip6tables-legacy -S FORWARD"),
        )


def networks(session: Session) -> Iterator[Finding]:
    """Do containers get name servers that they reach, and is the store kept from them?"""
    try:
        known = [network for network, _ in session.run(list_networks)]
    except MoorageError as error:
        yield Finding("store", str(error))
        return
    yield from (found for network in known for found in _resolver(network))
    if session.store_is_shared:
        yield from _reaching_store(known, asks_for_login=asks_for_login(session.config().store))


def _reaching_store(known: Sequence[Network], *, asks_for_login: bool) -> Iterator[Finding]:
    """Whoever may write to the store may give away any address and let anybody call anybody."""
    reaching = [network.name for network in known if STORE in network.to_node]
    if reaching:
        yield Finding(
            "store",
            f"containers of {', '.join(reaching)} reach the store; unless they need it, keep it from them",
            tuple(f"moorage network set {quote(name)} --to-node none" for name in reaching),
        )
    if not asks_for_login:
        yield Finding(
            "store",
            "etcd asks for neither login nor certificate, and tasks with host networking are the node itself: any of "
            "them may change everything in it; give etcd users or client certificates (docs/isolation.md)",
        )


def asks_for_login(url: str) -> bool:
    """Whether the agent shows the store who it is."""
    parsed = parse(url)
    return parsed.user_file is not None or parsed.cert is not None


def _resolver(network: Network) -> Iterator[Finding]:
    if warning := resolver_warning(network):
        yield Finding("resolver", warning, (f"moorage network set {network.name} --dns IP",))


def mapped_ports(session: Session) -> Iterator[Finding]:
    """Does the node itself listen on a port that leads to a container, or is an address gone that one is mapped of?"""
    try:
        endpoints = session.ask_agent("endpoints")
    except MoorageError:
        return  # the first check says so
    with Node() as node:
        for endpoint in endpoints:
            if endpoint["state"] in ADMITTED and endpoint["port_mappings"]:
                yield from _mapped_ports(node, endpoint)


def _mapped_ports(node: Node, endpoint: Mapping[str, Any]) -> Iterator[Finding]:
    container = f"{endpoint['container_id']}/{endpoint['ifname']}"
    mappings = [as_port_mapping(row) for row in endpoint["port_mappings"]]
    families = {ip_address(ip).version for ip in endpoint["addresses"]}
    for mapping in mappings:
        if not has_host_ip(node, mapping):
            yield Finding(
                "ports",
                f"{container} has {mapping}, but this node does not have {mapping.host_ip} (any more), so "
                "nothing comes by it; give the node that address, or start the container without hostIP",
            )
    look = collisions(mappings, families)
    for protocol, why in look.unknown.items():
        yield Finding(
            "ports",
            f"whether the node itself listens on {protocol} ports that lead to {container} is not known: {why}",
            (f"modprobe {protocol}_diag",),
        )
    # Of servers that share a port by SO_REUSEPORT, one stands for all.
    for mapping, listener in {(c.mapping, str(c.listener)): c for c in reversed(look.collisions)}.values():
        yield Finding(
            "ports",
            f"{mapping.protocol} port {mapping.host_port} of this node leads to {container}, so "
            f"{who_listens(node, listener)} listens on {listener} in vain; have it listen on another "
            "port, or start the container with another host port",
        )


CHECKS: dict[str, Check] = {
    "agent": agent,
    "certificates": servers_certificates,
    "forwarding": forwarding,
    "firewalls": firewalls,
    "networks": networks,
    "ports": mapped_ports,
}


def examine(session: Session) -> list[Finding]:
    """Every finding of every check."""
    return [finding for check in CHECKS.values() for finding in check(session)]


def _other_firewalls() -> Ruleset:
    """What hooks into forwarding in this namespace. Raises MoorageError."""
    try:
        with NetlinkSocket(NETLINK_NETFILTER) as netfilter:
            return read(netfilter)
    except KernelRefused as error:
        raise MoorageError(f"the firewall's rules cannot be read: {error}; use sudo") from error


def _opens_docker_user(session: Session) -> bool:
    """Whether an agent will see to Docker's policy as soon as it has a container."""
    try:
        status = session.ask_agent("status")
    except MoorageError:
        return False
    # An agent of an earlier version leaves that chain alone.
    return bool(status.get("docker_user", {}).get("managed")) and not status["endpoints"]


def _agent_answers(session: Session) -> bool:
    try:
        session.ask_agent("status")
    except MoorageError:
        return False
    return True


def _legacy_tables() -> bool:
    """Whether the old iptables filters packets here."""
    for name in ("ip_tables_names", "ip6_tables_names"):
        file = Path("/proc/net", name)
        if file.exists() and "filter" in file.read_text().split():
            return True
    return False
