"""``moorage block``: the slices of pools that nodes have claimed."""

from __future__ import annotations

from dataclasses import asdict
from ipaddress import ip_network

import click

from ipam import blocks
from ipam.blocks import BlockUse
from ipam.errors import InvalidInput
from ipam.nodes import check_node
from ipam.store.base import Store
from moorage.cli.output import Column, age
from moorage.cli.session import Session, pass_session


@click.group(short_help="Slices of pools that nodes have claimed.")
def block() -> None:
    """Blocks: the slices of pools that nodes have claimed.

    \b
    Example:
      moorage block list --node rack1-n07
    """


@block.command("list", short_help="List blocks and what is in them.")
@click.option("--node", metavar="NAME", help="Only of this node.  [default: all]")
@click.option("--pool", metavar="CIDR", help="Only of this pool.  [default: all]")
@pass_session
def list_(session: Session, node: str | None, pool: str | None) -> None:
    """List blocks, their owners, and how many addresses in them are in use.

    OTHERS counts those of them that nodes other than the owner have.

    \b
    Example:
      moorage block list --pool 10.64.0.0/16 -o json
    """

    async def act(store: Store) -> list[BlockUse]:
        found = await blocks.list_blocks(store, node=node, pool=pool)
        if not found and node is not None:
            await check_node(store, node)
        return found

    titles = ("block", "node", "pool", "allocated", "assigned", "warm", "cooling", "others", "free")
    session.out.rows(
        [asdict(found) for found in session.run(act)],
        [*(Column(title) for title in titles), Column("age", lambda r: age(r["since"]))],
        none="No block is claimed" + (" that matches." if node or pool else "."),
    )


@block.command(short_help="Have an empty block returned to its pool.")
@click.argument("cidr")
@pass_session
def release(session: Session, cidr: str) -> None:
    """Have a block returned to its pool by its owner's agent, if no address in it is in use.

    Addresses that the node only keeps warm in it are freed. The node claims another block, or this
    one again, when it needs one.

    \b
    Example:
      moorage block release 10.64.0.64/26
    """
    try:
        wanted = ip_network(cidr)
    except ValueError as error:
        raise InvalidInput(
            f"{cidr!r} is no block ({error}); write it as `moorage block list` shows it"
        ) from error

    async def act(store: Store) -> str:
        return await blocks.release_block(store, wanted)

    node = session.run(act)
    session.out.done(
        f"{wanted} returned to its pool by node {node}",
        {"block": str(wanted), "node": node, "released": True},
    )
