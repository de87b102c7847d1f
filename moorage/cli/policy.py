"""``moorage policy``: who may call whom, and why."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

import click

from ipam import keys
from ipam.errors import InvalidInput, TryAgain
from ipam.isolation import underlay_of_node
from ipam.keys import IPAddress
from ipam.networks import list_networks
from ipam.nodes_networks import NodesNetworks
from ipam.pools import geometry
from ipam.records import Address, Node
from ipam.store.base import Store, read_prefix
from isolator.policy.callers import Clause, Nodes, Sharing
from isolator.policy.question import (
    Known,
    addresses_of_nodes,
    callers_of,
    cure,
    may_call,
    netgroups_of,
    unbound_source,
)
from isolator.registered import stores_of
from moorage.cli.containers import Stored, addresses_named, all_addresses, ips_named
from moorage.cli.output import Column
from moorage.cli.session import Session, as_port_mapping, packet_of, packet_options, pass_session
from netmodules.labels import wants_default_route


@click.group(short_help="Who may call whom, and why.")
def policy() -> None:
    """Policy: which containers may call which, and why.

    \b
    Example:
      moorage policy test 10.64.0.5 10.64.0.9
    """


async def known_of(store: Store, stored: dict[IPAddress, Stored]) -> Known:
    """All that decides about calls."""
    networks = await list_networks(store)
    kvs, _ = await read_prefix(store, keys.NODES)
    nodes = [Node.decode(kv.key, kv.value) for kv in kvs]
    around = NodesNetworks(nodes)
    addresses = {ip: found.record for ip, found in stored.items()}
    return Known(
        addresses=addresses,
        networks={network.name: network for network, _ in networks},
        pools=[part for _, pools in networks for pool in pools for part in around.open_parts(geometry(pool))],
        nodes=addresses_of_nodes(nodes, addresses),
        underlays=frozenset(ip for node in nodes for ip in underlay_of_node(node)),
        tunnels=frozenset(node.vxlan_port for node in nodes if node.vxlan_port),
        stores=frozenset(stores_of(nodes)),
        pools_of={network.name: [geometry(pool).cidr for pool in pools] for network, pools in networks},
    )


@policy.command(short_help="Say whether one may call another, and why.")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@packet_options
@pass_session
def test(session: Session, source: str, target: str, port: int | None, proto: str) -> None:
    """Say whether SRC may begin a connection to DST, and why.

    SRC and DST are IP addresses or CONTAINER[/IFNAME], of any node. Netgroups hold for every port; a port
    matters where it is a tunnel's or the store's, and where DST is this machine's own address and the port is
    mapped to a container. What is denied is followed by the command that would allow it. Exit 1 if anything
    is denied.

    It is judged for a packet from SRC. A container on several networks sends what nobody bound to an address by the
    interface that is on DST's network, else by that of its default route; where this is not SRC, it is said.

    This is what should be. Whether the nodes do it, and where a packet ends: moorage endpoint trace SRC DST.

    \b
    Examples:
      moorage policy test 4f7a 9c02/eth0
      moorage policy test 192.0.2.7 10.64.0.5
      moorage policy test 192.0.2.7 192.0.2.1 --port 31080
    """

    packet = packet_of(proto, port)

    async def act(store: Store) -> list[dict[str, Any]]:
        stored = await all_addresses(store)
        known = await known_of(store, stored)
        return [
            {
                "source": str(one),
                "target": str(other),
                "allowed": verdict.allowed,
                "why": verdict.why,
                "drop": verdict.drop,
                "command": cure(known, one, other, packet),
                "node": known.nodes.get(other, ""),
                "unbound": _unbound(known, one, other),
            }
            for one in ips_named(stored, source)
            for other in ips_named(stored, target)
            if one.version == other.version
            for verdict in [may_call(known, one, other, packet)]
        ]

    rows = session.run(act)
    if not rows:
        raise InvalidInput(f"{source} and {target} have no address of the same family; name others")
    for row in rows:
        if port is not None and not row["drop"]:
            row["why"] = why_by_port(session, row, port, proto)
    if session.out.as_json:
        session.out.rows(rows, [], none="")
    else:
        for row in rows:
            verdict = "allowed" if row["allowed"] else "denied"
            click.echo(f"{row['source']} -> {row['target']}: {verdict}: {row['why']}")
            if row["unbound"] and row["unbound"]["source"] != row["source"]:
                click.echo(
                    f"    what is not bound to {row['source']} leaves by {row['unbound']['interface']} from "
                    f"{row['unbound']['source']} instead"
                )
            if row["command"]:
                click.echo(f"    {row['command']}")
    click.get_current_context().exit(0 if all(row["allowed"] for row in rows) else 1)


def _unbound(known: Known, source: IPAddress, target: IPAddress) -> dict[str, str] | None:
    found = unbound_source(known, source, target, lambda record: wants_default_route(record.labels))
    return None if found is None else {"interface": found.ifname, "source": str(found.source)}


def why_by_port(session: Session, row: Mapping[str, Any], port: int, proto: str) -> str:
    """The reason once the port is looked at: only the node whose address is called knows where its ports lead."""
    what = f"whether {proto} port {port} is mapped to a container there"
    try:
        own = session.ask_agent("status")["own_addresses"]
        if row["target"] in own or is_local(row["target"]):
            return mapped(session, row["target"], port, proto) or (
                f"{row['why']}; {proto} port {port} is not mapped to a container"
            )
    except TryAgain:
        what += " is not known, since no agent answers here"
    return f"{row['why']}; {what}: ask on node {row['node']}" if row["node"] else str(row["why"])


def is_local(ip: str) -> bool:
    """Whether an address is this machine's, on any of its interfaces: only then can a socket have it."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((ip, 0))
        except OSError:
            return False
    return True


def mapped(session: Session, target: str, port: int, proto: str) -> str:
    """Where a port of this machine's address leads; "" if it is not mapped. Raises TryAgain."""
    ip = ip_address(target)
    for endpoint in session.ask_agent("endpoints"):
        if all(ip_address(own).version != ip.version for own in endpoint["addresses"]):
            continue
        for mapping in map(as_port_mapping, endpoint["port_mappings"]):
            if mapping.covers(ip) and (mapping.protocol, mapping.host_port) == (proto, port):
                return (
                    f"{proto} port {port} is mapped to {endpoint['container_id']}/{endpoint['ifname']}, "
                    "and everybody may call a mapped port"
                )
    return ""


@policy.command(short_help="Show who may call an endpoint.")
@click.argument("name", metavar="ENDPOINT")
@pass_session
def show(session: Session, name: str) -> None:
    """Show who may call an endpoint, of any node: CONTAINER[/IFNAME] or its IP address.

    \b
    Examples:
      moorage policy show 4f7a/eth0
      moorage policy show 10.64.0.5 -o json
    """

    async def act(store: Store) -> list[dict[str, Any]]:
        stored = await all_addresses(store)
        known = await known_of(store, stored)
        found = [stored[ip] for ip in ips_named(stored, name) if known.endpoint(ip) is not None]
        if not found:
            found = addresses_named(stored, name)
        return [_row(known, one) for one in found]

    rows = session.run(act)
    if session.out.as_json:
        session.out.rows(rows, [], none="")
        return
    for number, row in enumerate(rows):
        if number:
            click.echo()
        session.out.record({key: value for key, value in row.items() if key != "callers"})
        click.echo()
        session.out.rows(row["callers"], [Column("who"), Column("addresses")], none="Nobody may call it.")


def _row(known: Known, one: Stored) -> dict[str, Any]:
    record = one.record
    return {
        "address": str(one.ip),
        "container_id": record.container_id,
        "ifname": record.ifname,
        "node": record.node,
        "network": record.network,
        "netgroups": list(netgroups_of(record)),
        "callers": [
            {
                "who": "its own node",
                "addresses": [str(ip) for ip in _nodes(known, one) if known.nodes[ip] == record.node],
            },
            *(
                {"who": _who(clause), "addresses": _covered(known, one, clause)}
                for clause in callers_of(known, record)
            ),
        ],
    }


def _who(clause: Clause) -> str:
    match clause:
        case Sharing(netgroup):
            return f"members of the netgroup {netgroup}"
        case Nodes():
            return "every node"
        case _:
            return str(clause)


def _covered(known: Known, one: Stored, clause: Clause) -> list[str]:
    """The addresses that a clause stands for, of the same family; [] where they cannot be listed."""
    match clause:
        case Sharing(netgroup):
            return [
                str(ip)
                for ip, record in sorted(
                    known.addresses.items(), key=lambda item: (item[0].version, item[0].packed)
                )
                if ip.version == one.ip.version and ip != one.ip and _is_in(known, ip, record, netgroup)
            ]
        case Nodes():
            return [str(ip) for ip in _nodes(known, one)]
        case _:
            return []


def _is_in(known: Known, ip: IPAddress, record: Address, netgroup: str) -> bool:
    return known.endpoint(ip) is not None and netgroup in netgroups_of(record)


def _nodes(known: Known, one: Stored) -> list[IPAddress]:
    return sorted((ip for ip in known.nodes if ip.version == one.ip.version), key=lambda ip: ip.packed)
