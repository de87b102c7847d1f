"""``moorage node``: the nodes that the store knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from ipam import nodes
from ipam.errors import InvalidInput
from ipam.nodes import Freed, NodeDetail, list_nodes
from ipam.store.base import Store
from moorage.cli.output import Column, age
from moorage.cli.session import Session, pass_session


@click.group(short_help="Nodes that the store knows.")
def node() -> None:
    """Nodes: hosts that run containers, each with an agent.

    \b
    Example:
      moorage node list
      moorage node drain rack1-n07
    """


@node.command("list", short_help="List nodes, and whether their agents run.")
@pass_session
def list_(session: Session) -> None:
    """List nodes, and whether their agents run.

    \b
    Example:
      moorage node list -o json
    """
    session.out.rows(
        [asdict(found) for found in session.run(list_nodes)],
        [
            Column("name"),
            Column("alive"),
            Column("drained"),
            Column("version"),
            Column("underlay"),
            Column("blocks", lambda r: str(r["blocks"])),
            Column("age", lambda r: age(r["since"])),
        ],
        none="No node yet; start its agent with `moorage agent`.",
    )


@node.command(short_help="Show one node, its blocks and its addresses.")
@click.argument("name")
@pass_session
def show(session: Session, name: str) -> None:
    """Show one node: its facts, its fence, its blocks, and its addresses by network, family and state.

    \b
    Example:
      moorage node show rack1-n07
    """

    async def act(store: Store) -> NodeDetail:
        return await nodes.get_node(store, name)

    shown = asdict(session.run(act))
    del shown["kept"]
    session.out.record(shown)


@node.command(short_help="Have a node take no more addresses.")
@click.argument("name")
@click.option("--undo", is_flag=True, help="Have it take addresses again.")
@pass_session
def drain(session: Session, name: str, undo: bool) -> None:
    """Have a node take no more addresses, free its warm ones and return its empty blocks.

    New containers are refused there from now on, also after a restart of its agent; those that run
    keep their addresses. The rest goes back as they end.

    \b
    Examples:
      moorage node drain rack1-n07
      moorage node drain rack1-n07 --undo
    """

    async def act(store: Store) -> dict[str, Any]:
        return await nodes.drain_node(store, name, undo=undo)

    answer = session.run(act)
    row = {"name": name, **{key: answer[key] for key in ("drained", "blocks", "left")}}
    if undo:
        session.out.done(f"node {name} takes addresses again", row)
        return
    left: dict[str, int] = {}
    for entry in answer["left"]:
        left[entry["state"]] = left.get(entry["state"], 0) + entry["count"]
    holds = counted(left) if left else "no address"
    session.out.done(f"node {name} is drained; it still holds {holds} in {answer['blocks']} blocks", row)


@node.command(short_help="Forget a node that is gone.")
@click.argument("name")
@click.option(
    "--force", is_flag=True, help="Also if its containers may be using addresses; asks for the name again."
)
@click.option("--yes", metavar="NAME", help="The name again, for scripts.  [default: asks]")
@pass_session
def remove(session: Session, name: str, force: bool, yes: str | None) -> None:
    """Forget a node that is gone: its addresses and blocks are free for others.

    Refused while its agent runs. Refused without --force while addresses are assigned to its
    containers, or are warm there and the node was not drained: its agent may have given those out.
    When interrupted, run it again.

    \b
    Examples:
      moorage node remove rack1-n07
      moorage node remove rack1-n07 --force --yes rack1-n07
    """

    async def look(store: Store) -> NodeDetail:
        return await nodes.get_node(store, name)

    async def act(store: Store) -> Freed:
        return await nodes.remove_node(store, name, force=force)

    if force:
        found = session.run(look)
        if found.kept and not found.alive:
            confirm(
                name,
                f"This frees {counted(found.states())} and {len(found.blocks)} blocks of node {name}. If the machine "
                "still lives and is only cut off from the store, its agent is fenced as soon as it is back, and its "
                "containers are cut off where others have their addresses by then.",
                yes,
            )
    freed = session.run(act)
    what = counted(freed.addresses) if freed.addresses else "no address"
    session.out.done(
        f"node {name} removed; freed {what} and {freed.blocks} blocks",
        {"name": name, "removed": True, **asdict(freed)},
    )


@node.command(short_help="Move a node's name to whoever starts next under it.")
@click.argument("name")
@click.option("--yes", metavar="NAME", help="The name again, for scripts.  [default: asks]")
@pass_session
def adopt(session: Session, name: str, yes: str | None) -> None:
    """Move a node's name to the next agent that starts under it, for example on a new machine.

    The agent that has the name now, if it runs or comes back, is fenced: it gives out nothing and
    writes nothing, until it is started anew. The new agent takes over blocks and addresses, and frees
    those that no container on its own machine has. So asks for the name again while the old one runs.

    \b
    Examples:
      moorage node adopt rack1-n07
      moorage node adopt rack1-n07 --yes rack1-n07
    """

    async def look(store: Store) -> NodeDetail:
        return await nodes.get_node(store, name)

    async def act(store: Store) -> NodeDetail:
        return await nodes.adopt_node(store, name, force=found.alive)

    found = session.run(look)
    if found.alive:
        confirm(
            name,
            f"The agent of node {name} is running. It is fenced by this, and its containers keep using addresses that "
            "the next agent of that name frees for others: end them first.",
            yes,
        )
    before = session.run(act)
    session.out.done(
        f"node {name} belongs to the agent that starts next under that name",
        {"name": name, "adopted": True, "was_alive": before.alive},
    )


def counted(states: Mapping[str, int]) -> str:
    """``3 assigned, 8 warm addresses``."""
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items())) + " addresses"


def confirm(name: str, warning: str, yes: str | None) -> None:
    """Have the name said again, at the terminal or by --yes. Raises InvalidInput when it is another."""
    click.echo(f"Warning: {warning}", err=True)
    again = (
        click.prompt("The node's name again", err=True, default="", show_default=False)
        if yes is None
        else yes
    )
    if again != name:
        raise InvalidInput(f"{again!r} is not {name!r}; nothing was changed")
