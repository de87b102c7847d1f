"""``moorage ip``: addresses and reservations."""

from __future__ import annotations

from typing import Any

import click

from ipam import addresses, checks, intents, reservations
from ipam.checks import CheckReport, Finding
from ipam.errors import MoorageError, NotFound
from ipam.networks import get_network, list_networks
from ipam.nodes import check_node
from ipam.nodes_networks import read_nodes_networks
from ipam.pools import geometry
from ipam.records import Address, AddressState, Intent, IntentKind, Pool, Reservation
from ipam.store.base import Store
from moorage.cli.output import Column, age, fields, words
from moorage.cli.session import IP, IPAddress, Session, pass_session

FREE = "free"


@click.group("ip", short_help="Addresses and reservations.")
def ip() -> None:
    """Addresses: who has which, and which are reserved.

    \b
    Example:
      moorage ip list --network web
      moorage ip reserve 10.64.0.10 --key web-front
    """


def row(address: IPAddress, record: Address) -> dict[str, Any]:
    """An address as JSON has it."""
    return {"address": str(address), **fields(record)}


@ip.command("list", short_help="List addresses that are in use.")
@click.option("--network", metavar="NAME", help="Only of this network.  [default: all]")
@click.option("--node", metavar="NAME", help="Only of this node.  [default: all]")
@click.option(
    "--state",
    type=click.Choice([state.value for state in AddressState]),
    help="Only in this state.  [default: all]",
)
@pass_session
def list_(session: Session, network: str | None, node: str | None, state: str | None) -> None:
    """List addresses that are in use.

    They are assigned to an endpoint, allocated to a uid that has no container yet, warm on a node, or cooling
    after use.

    \b
    Example:
      moorage ip list --state assigned -o json
    """

    async def act(store: Store) -> list[dict[str, Any]]:
        found = addresses.list_addresses(store, network=network, node=node, state=state)
        rows = [row(address, record) async for address, record, _ in found]
        if not rows and network is not None:
            await get_network(store, network)
        if not rows and node is not None:
            await check_node(store, node)
        return rows

    session.out.rows(
        session.run(act),
        [
            Column("address"),
            Column("state"),
            Column("network"),
            Column("node"),
            Column("container", lambda r: words(r["container_id"] or r["uid"])),
            Column("ifname"),
            Column("netgroups"),
            Column("app"),
            Column("age", lambda r: age(r["since"])),
        ],
        none="No address is in use" + (" that matches." if network or node or state else "."),
    )


@ip.command(short_help="Show one address.")
@click.argument("address", metavar="IP", type=IP)
@pass_session
def show(session: Session, address: IPAddress) -> None:
    """Show one address: its state, its holder, its reservation.

    \b
    Example:
      moorage ip show 10.64.0.5
    """

    async def act(store: Store) -> dict[str, Any]:
        found = await addresses.get_address(store, address)
        reservation = await reservations.get_reservation(store, address)
        if found is not None:
            shown = row(address, found[0])
        else:
            pool = await pool_of(store, address)
            shape = geometry(pool)
            whose = (await read_nodes_networks(store)).why_closed(address, shape)
            shown = {
                "address": str(address),
                "state": "excluded" if whose or not shape.usable(address) else FREE,
                "pool": pool.name,
                "network": pool.network,
                **({"used_by": whose} if whose else {}),
            }
        return {**shown, "reservation": fields(reservation) if reservation else None}

    session.out.record(session.run(act))


async def pool_of(store: Store, address: IPAddress) -> Pool:
    """The pool that has ``address``. Raises NotFound naming the pools."""
    pools = [pool for _, found in await list_networks(store) for pool in found]
    for pool in pools:
        if address in geometry(pool).cidr:
            return pool
    known = ", ".join(pool.cidr for pool in pools) or "none yet"
    raise NotFound(f"{address} is in no pool (pools: {known}); correct the address")


def reservation_row(address: IPAddress, record: Reservation) -> dict[str, Any]:
    """A reservation as JSON has it."""
    return {"address": str(address), **fields(record)}


@ip.command(short_help="Keep an address for whoever presents a key.")
@click.argument("address", metavar="IP", type=IP)
@click.option("--key", required=True, help="What an app presents as label moorage.reservation.")
@click.option("--note", default="", show_default=False, help="Why, for other operators.  [default: none]")
@pass_session
def reserve(session: Session, address: IPAddress, key: str, note: str) -> None:
    """Keep an address for whoever presents a key: a static address that survives its app's restarts.

    An endpoint that has the address now keeps it until it ends.

    \b
    Example:
      moorage ip reserve 10.64.0.10 --key web-front --note "in the firewall of partner X"
    """

    async def act(store: Store) -> Reservation:
        return await reservations.reserve(store, address, key, note)

    record = session.run(act)
    session.out.done(
        f"{address} of network {record.network} is kept for label moorage.reservation={record.key}",
        reservation_row(address, record),
    )


@ip.command(short_help="End a reservation.")
@click.argument("address", metavar="IP", type=IP)
@pass_session
def unreserve(session: Session, address: IPAddress) -> None:
    """End a reservation. An endpoint that has the address keeps it until it ends.

    \b
    Example:
      moorage ip unreserve 10.64.0.10
    """

    async def act(store: Store) -> None:
        await reservations.unreserve(store, address)

    session.run(act)
    session.out.done(f"{address} is not reserved any more", {"address": str(address), "reserved": False})


@ip.command("reservations", short_help="List reservations.")
@click.option("--network", metavar="NAME", help="Only of this network.  [default: all]")
@pass_session
def reservations_(session: Session, network: str | None) -> None:
    """List reservations, whether their addresses are in use or not.

    \b
    Example:
      moorage ip reservations --network web
    """
    found = session.run(reservations.list_reservations)
    session.out.rows(
        [reservation_row(a, record) for a, record in found if network in (None, record.network)],
        [Column("address"), Column("key"), Column("network"), Column("note")],
        none="No address is reserved.",
    )


@ip.command(short_help="Have an address released that is left over.")
@click.argument("address", metavar="IP", type=IP)
@click.option("--force", is_flag=True, help="Release it even if its container lives: it is cut off.")
@pass_session
def release(session: Session, address: IPAddress, force: bool) -> None:
    """Have an address released that is left over.

    Only its node's agent releases an address. Without --force it first looks whether the
    container is gone, and keeps the address if not.

    \b
    Examples:
      moorage ip release 10.64.0.5
      moorage ip release 10.64.0.5 --force
    """

    async def act(store: Store) -> tuple[str, dict[str, Any]]:
        found = await addresses.get_address(store, address)
        if found is None:
            pool = await pool_of(store, address)
            raise NotFound(
                f"{address} of network {pool.network} is free already; there is nothing to release"
            )
        record, revision = found
        if not record.state.is_taken:
            raise NotFound(
                f"{address} is {record.state} on node {record.node}, no container has it; "
                "its agent gives it back by itself"
            )
        intent = Intent(
            kind=IntentKind.RELEASE if force else IntentKind.VERIFY,
            ip=str(address),
            id=record.id,
            mod_revision=revision,
            evidence={"asked by": "moorage ip release"},
        )
        return record.node, await intents.ask(store, record.node, intent)

    node, answer = session.run(act)
    why = words(answer.get("why"))
    if not answer.get("done"):
        raise MoorageError(f"node {node} kept {address}: {why}")
    session.out.done(
        f"{address} released by node {node}" + (f": {why}" if answer.get("why") else ""),
        {"address": str(address), "node": node, **answer},
    )


@ip.command(short_help="Check that store, nodes and kernels agree.")
@click.option("--repair", is_flag=True, help="Do what is provably safe; what is left is printed.")
@pass_session
def check(session: Session, repair: bool) -> None:
    """Check that the store, the nodes' journals and their kernels agree.

    Looks twice, two seconds apart, without any lock; each running agent answers for its own node. Exit
    1 if something is wrong and was not repaired. The invariants are explained in docs/invariants.md.

    \b
    Examples:
      moorage ip check
      moorage ip check --repair
    """

    async def act(store: Store) -> CheckReport:
        return await checks.check(store, repair=repair)

    report = session.run(act)
    report.notes = [*report.notes, *_own_agents_note(session, report.notes)]
    left = [finding for finding in report.findings if finding not in report.repaired]
    if session.out.as_json:
        session.out.record(
            {
                "addresses": report.addresses,
                "nodes_asked": report.nodes_asked,
                "nodes_silent": report.nodes_silent,
                "findings": [finding_row(finding) for finding in left],
                "repaired": [finding_row(finding) for finding in report.repaired],
                "notes": report.notes,
            }
        )
    else:
        print_report(report, left, repair)
    click.get_current_context().exit(1 if left else 0)


def _own_agents_note(session: Session, notes: list[str]) -> list[str]:
    """Another machine's agent answers for the name of one that is fenced, and knows nothing of what that one has."""
    try:
        status = session.ask_agent("status")
    except MoorageError:
        return []  # the command may be run anywhere
    problem = status["problem"]
    if not problem or any(problem in note for note in notes):
        return []
    return [
        f"this machine's agent, of node {status['node']}, is not in sync, so what it has was not looked at: {problem}"
    ]


def finding_row(finding: Finding) -> dict[str, Any]:
    """A finding as JSON has it."""
    return {
        "invariant": finding.invariant,
        "subject": finding.subject,
        "problem": finding.problem,
        "evidence": finding.evidence,
        "repair": finding.repair,
    }


def print_report(report: CheckReport, left: list[Finding], repair: bool) -> None:
    """A paragraph a finding, a line a repair, and the sum."""
    for finding in left:
        click.echo(f"invariant {finding.invariant}: {finding.subject}: {words(finding.problem)}")
        for name, value in finding.evidence.items():
            click.echo(f"    {name}: {words(value)}")
        if finding.repair:
            click.echo(f"    {'left to you' if repair else 'repair'}: {words(finding.repair)}")
    for finding in report.repaired:
        click.echo(f"repaired: {finding.subject}: {words(finding.repair or finding.problem)}")
    for note in report.notes:
        click.echo(f"note: {words(note)}")
    advice = "" if repair or not left else "; `moorage ip check --repair` does what is provably safe"
    click.echo(
        f"{report.addresses} addresses, {report.nodes_asked} nodes asked: "
        + (f"{len(left)} violations{advice}" if left else "no violation")
    )
