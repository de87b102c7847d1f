"""``moorage doctor``: what keeps containers from working on this machine."""

from __future__ import annotations

from dataclasses import asdict

import click

from moorage.cli.output import words
from moorage.cli.session import Session, pass_session


@click.command(short_help="Find what keeps containers from working here.")
@pass_session
def doctor(session: Session) -> None:
    """Find what commonly keeps containers of this machine from working, and say what would mend it.

    Looks at the agent, the tunnel and the connection table, at forwarding, at other firewalls, at name servers,
    at who reaches the store, and at mapped ports that the node itself listens on; changes nothing. Needs root.
    Exit 1 if anything was found.

    \b
    Example:
      sudo moorage doctor
    """
    from moorage.doctor import CHECKS, examine

    findings = examine(session)
    if session.out.as_json:
        session.out.rows([asdict(finding) for finding in findings], [], none="")
    elif not findings:
        click.echo(f"{', '.join(CHECKS)}: nothing is wrong.")
    else:
        for finding in findings:
            click.echo(f"{finding.check}: {words(finding.problem)}")
            for command in finding.commands:
                click.echo(f"    {command}")
    click.get_current_context().exit(1 if findings else 0)
