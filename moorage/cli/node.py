"""``moorage node``: the nodes that the store knows."""

from __future__ import annotations

from dataclasses import asdict

import click

from ipam.nodes import list_nodes
from moorage.cli.output import Column, age
from moorage.cli.session import Session, pass_session


@click.group(short_help="Nodes that the store knows.")
def node() -> None:
    """Nodes: hosts that run containers, each with an agent.

    \b
    Example:
      moorage node list
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
            Column("version"),
            Column("underlay"),
            Column("blocks", lambda r: str(r["blocks"])),
            Column("age", lambda r: age(r["since"])),
        ],
        none="No node yet; start its agent with `moorage agent`.",
    )
