"""``moorage endpoint``: the interfaces of this machine's containers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ipam import intents
from ipam.errors import MoorageError, NotFound
from ipam.netgroups import parse_netgroup
from ipam.records import Intent, IntentKind
from ipam.store.base import Store
from moorage import tracing
from moorage.cli.containers import addresses_named, all_addresses
from moorage.cli.output import Column, age, print_json, words
from moorage.cli.session import Session, packet_of, packet_options, pass_session


@click.group(short_help="Interfaces of this machine's containers.")
def endpoint() -> None:
    """Endpoints: the interfaces of this machine's containers, as its agent knows them.

    \b
    Example:
      moorage endpoint list
    """


@endpoint.command("list", short_help="List this machine's endpoints.")
@click.option("--network", metavar="NAME", help="Only of this network.  [default: all]")
@pass_session
def list_(session: Session, network: str | None) -> None:
    """List this machine's endpoints.

    \b
    Example:
      moorage endpoint list -o json
    """
    found = [e for e in session.ask_agent("endpoints") if network in (None, e["network"])]
    session.out.rows(
        found,
        [
            Column("container", lambda r: words(r.get("container_id"))),
            Column("ifname"),
            Column("state"),
            Column("network"),
            Column("addresses"),
            Column("host_ifname"),
            Column("engine"),
            Column("netgroups"),
            Column("age", lambda r: age(r.get("since"))),
        ],
        none="No endpoint on this machine" + (f" in network {network}." if network else "."),
    )


@endpoint.command(short_help="Show the endpoints of one container.")
@click.argument("name", metavar="CONTAINER[/IFNAME]")
@pass_session
def show(session: Session, name: str) -> None:
    """Show the endpoints of one container, or one of them.

    CONTAINER may be the beginning of a container's id if only one container's begins so. As JSON
    this is an object if IFNAME is given, else an array of them.

    \b
    Examples:
      moorage endpoint show 4f7a
      moorage endpoint show 4f7a/eth0 -o json
    """
    container, _, ifname = name.partition("/")
    found = matching(session.ask_agent("endpoints"), container, ifname)
    if session.out.as_json and not ifname:
        session.out.rows(found, [], none="")
        return
    for number, one in enumerate(found):
        if number:
            click.echo()
        session.out.record(one)


@endpoint.command(short_help="Containers whose interfaces were gone when the agent started.")
@click.argument("names", metavar="[CONTAINER[/IFNAME]]...", nargs=-1)
@click.option("--release", is_flag=True, help="They have ended: release their addresses.")
@click.option("--keep", is_flag=True, help="They live: ask no more until the agent's next start.")
@pass_session
def missing(session: Session, names: tuple[str, ...], release: bool, keep: bool) -> None:
    """Show the containers whose interfaces were all gone when the agent started, or say what became of them.

    Their addresses are kept, because it may be the agent that does not see them: start it where it ran before, if
    it was moved. What their engine says, a DEL or a GC, holds without this command. One whose interface is seen
    again is connected again, and not released.

    \b
    Examples:
      moorage endpoint missing
      moorage endpoint missing --release
      moorage endpoint missing --keep 4f7a
    """
    if release and keep:
        raise click.UsageError("--release and --keep say the opposite of each other; leave one out")
    found = session.ask_agent("missing")
    chosen = [one for name in names for one in _missing(session, found, name)] or found
    if not (release or keep):
        session.out.rows(
            chosen,
            [
                Column("container", lambda r: words(r.get("container_id"))),
                Column("ifname"),
                Column("addresses"),
            ],
            none="No container of this machine is missing.",
        )
        return
    keys = [(one["container_id"], one["ifname"]) for one in chosen]
    answer, what = ("release", "released") if release else ("keep", "kept")
    done = session.ask_agent("missing", answer=answer, keys=keys) if keys else []
    answered = {(one["container_id"], one["ifname"]) for one in done}
    seen = [f"{container}/{ifname}" for container, ifname in keys if (container, ifname) not in answered]
    said = f"the addresses of {len({container for container, _ in answered})} containers are {what}"
    if seen:
        said += f"; seen again meanwhile, so not released: {', '.join(seen)}"
    session.out.done(said, {"answer": answer, "count": len(done), "seen_again": seen})


def _missing(session: Session, found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Those of the missing endpoints that a name means. Raises NotFound."""
    container, _, ifname = name.partition("/")
    try:
        return matching(found, container, ifname)
    except NotFound:
        other = matching(session.ask_agent("endpoints"), container, ifname)[0]
        raise NotFound(
            f"{other['container_id']}/{other['ifname']} is {other['state']}, not missing; see `moorage endpoint "
            "missing` for those that are"
        ) from None


@endpoint.command("set-netgroups", short_help="Give a running container other netgroups.")
@click.argument("name", metavar="CONTAINER[/IFNAME]")
@click.argument("netgroups", metavar="[NETGROUP]...", nargs=-1)
@pass_session
def set_netgroups(session: Session, name: str, netgroups: tuple[str, ...]) -> None:
    """Give a running container, of any node, other netgroups; its network has to allow them.

    They take the place of those it has; none at all is its network's own name. What it had with endpoints it
    shares no netgroup with any more is cut off at once. The app's next container has what its labels say.

    \b
    Examples:
      moorage endpoint set-netgroups 4f7a web db
      moorage endpoint set-netgroups 4f7a/eth0
    """
    wanted = [parse_netgroup("a netgroup", text) for text in netgroups]

    async def act(store: Store) -> list[dict[str, Any]]:
        changed: dict[str, dict[str, Any]] = {}
        for found in addresses_named(await all_addresses(store), name):
            record = found.record
            if record.ifname in changed:
                continue  # the other family's address of the same endpoint
            intent = Intent(
                kind=IntentKind.LABELS,
                ip=str(found.ip),
                id=record.id,
                mod_revision=found.revision,
                evidence={"netgroups": list(wanted)},
            )
            answer = await intents.ask(store, record.node, intent)
            if not answer.get("done"):
                raise MoorageError(f"node {record.node} left {name} as it is: {words(answer.get('why'))}")
            changed[record.ifname] = {
                "container_id": record.container_id,
                "ifname": record.ifname,
                "node": record.node,
                "netgroups": list(wanted) or [record.network],
            }
        return list(changed.values())

    for row in session.run(act):
        session.out.done(
            f"{row['container_id']}/{row['ifname']} on node {row['node']} is in {', '.join(row['netgroups'])} now",
            row,
        )


@endpoint.command(short_help="Say how a packet would go, and where it ends.")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@packet_options
@click.pass_context
@pass_session
def trace(
    session: Session, ctx: click.Context, source: str, target: str, port: int | None, proto: str
) -> None:
    """Say hop by hop how a packet would go from SRC to DST and back, and where it ends.

    SRC and DST are addresses, containers (the beginning of an id, with /IFNAME if it has several
    interfaces), or node:NAME for a node's own processes. The packet is one from SRC; the hop ``source`` says what
    SRC's container sends from where no socket is bound. Each hop is what journal and store say there
    should be, held against the kernels of both nodes; nothing is sent. Exit code 1 if a hop does not hold.

    \b
    Examples:
      moorage endpoint trace 10.64.0.7 10.64.3.9
      moorage endpoint trace 4f7a/eth0 node:rack1-n07
    """

    packet = packet_of(proto, port)

    async def act(store: Store) -> list[tracing.Way]:
        return await tracing.trace(store, source, target, packet)

    ways = session.run(act)
    said = tracing.verdict(ways)
    broken = any(way.broken is not None for way in ways)
    if session.out.as_json:
        print_json({"broken": broken, "verdict": said, "ways": [_way_row(way) for way in ways]})
    else:
        for way in ways:
            _print_way(way)
        click.echo(said)
    ctx.exit(1 if broken else 0)


def _way_row(way: tracing.Way) -> dict[str, Any]:
    return {
        "source": asdict(way.source),
        "target": asdict(way.target),
        "hops": [hop.row() for hop in way.hops],
        "unbound": way.unbound,
    }


_MARKS = {True: click.style("✓", fg="green"), False: click.style("✗", fg="red"), None: "?"}


def _print_way(way: tracing.Way) -> None:
    click.echo(f"{way.source} -> {way.target}")
    width = max((len(f"{hop.node} {hop.at}") for hop in way.hops), default=0)
    for hop in way.hops:
        click.echo(f"  {_MARKS[hop.holds]} {f'{hop.node} {hop.at}':<{width}}  {hop.says}")
        if hop.cure:
            click.echo(f"    {'':<{width}}  -> {hop.cure}")
    click.echo()


def matching(endpoints: list[dict[str, Any]], container: str, ifname: str) -> list[dict[str, Any]]:
    """The endpoints meant by a container id, or the beginning of one. Raises NotFound."""
    ids = {e["container_id"] for e in endpoints}
    candidates = (
        [container] if container in ids else sorted(i for i in ids if container and i.startswith(container))
    )
    if len(candidates) > 1:
        raise NotFound(
            f"{container} is the beginning of {len(candidates)} containers: {', '.join(candidates)}; write more"
        )
    found = [e for e in endpoints if e["container_id"] in candidates and ifname in ("", e["ifname"])]
    if not found:
        raise NotFound(
            f"there is no endpoint {container}{'/' + ifname if ifname else ''} on this machine; "
            "see `moorage endpoint list`, or `moorage ip list` for all nodes"
        )
    return found
