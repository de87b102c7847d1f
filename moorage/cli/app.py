"""The root of the command line, and the way every command ends.

What a user may do something about is one sentence on stderr: exit 1, or 2 where the command itself was
wrongly written. There are no tracebacks unless --debug asks for one.
"""

from __future__ import annotations

import sys
from typing import Any

import click

import moorage
from ipam.errors import MoorageError
from moorage import log
from moorage.cli import (
    agent,
    block,
    doctor,
    endpoint,
    ip,
    lab,
    marathon,
    network,
    node,
    policy,
    status,
    store,
)
from moorage.cli.session import Session


class Root(click.Group):
    """A group whose commands' errors become one line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MoorageError as error:
            raise failure(ctx, error, str(error)) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            name = type(error).__name__
            raise failure(
                ctx,
                error,
                f"unexpected {name}: {error}; this is a bug: run it again with `moorage --debug ...` and report it",
            ) from error


def failure(ctx: click.Context, error: Exception, sentence: str) -> click.ClickException:
    """What the user reads; with --debug, ``error`` itself is raised instead."""
    if ctx.params.get("debug"):
        raise error
    return click.ClickException(sentence)


@click.group(
    cls=Root,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.option("--store", metavar="URL", help="The store.  [env: MOORAGE_STORE; default: as the agent's]")
@click.option(
    "--socket", metavar="PATH", help="The agent's socket.  [env: MOORAGE_SOCKET; default: as the agent's]"
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), help="How to print.  [default: table]")
@click.option("--debug", is_flag=True, help="Show debug logs, and a traceback with errors.")
@click.version_option(moorage.__version__, prog_name="moorage", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, store: str | None, socket: str | None, output: str | None, debug: bool) -> None:
    """An IP address for every Mesos container.

    The store and the socket are those of the agent on this machine unless named: both read
    /etc/moorage/agent.toml and the MOORAGE_* environment.

    \b
    Example:
      moorage network create web --pool 10.64.0.0/16 --pool fd00:64::/64
      moorage ip list --network web -o json
    """
    ctx.obj = Session(store=store, socket=socket, output=output or "table")
    log.configure("debug" if debug else "warning", "console")


for group in (
    agent.agent,
    network.network,
    block.block,
    ip.ip,
    endpoint.endpoint,
    node.node,
    policy.policy,
    store.store,
    marathon.marathon,
    status.status,
    doctor.doctor,
    lab.lab,
):
    cli.add_command(group)


def main() -> None:
    """The ``moorage`` command."""
    # Names in labels may be any Unicode; a C locale must not turn printing them into an error.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="moorage")
