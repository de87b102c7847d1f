"""``moorage status``: how this machine's agent is."""

from __future__ import annotations

import click

from moorage.cli.session import Session, pass_session


@click.command(short_help="Show how this machine's agent is.")
@pass_session
def status(session: Session) -> None:
    """Show how this machine's agent is: store, fence, addresses, endpoints, what waits, what went wrong.

    Exit 1 if no agent answers.

    \b
    Example:
      moorage status -o json
    """
    session.out.record(session.ask_agent("status"))
