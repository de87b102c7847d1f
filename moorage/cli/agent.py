"""``moorage agent``: run this node's agent."""

from __future__ import annotations

from pathlib import Path

import click

from moorage import config, log
from moorage.cli.session import Session


@click.command(short_help="Run this node's agent.")
@click.option(
    "--node",
    metavar="NAME",
    help="This node's name; that of its first start counts from then on.  [env: MOORAGE_NODE; default: the host's "
    "name]",
)
@click.option(
    "--store", metavar="URL", help=f"The store.  [env: MOORAGE_STORE; default: {config.DEFAULT_STORE}]"
)
@click.option(
    "--state-dir",
    metavar="DIR",
    help=f"Where the journal lives.  [env: MOORAGE_STATE_DIR; default: {config.DEFAULT_STATE_DIR}]",
)
@click.option(
    "--socket",
    metavar="PATH",
    help=f"Where hooks and this command line reach it.  [env: MOORAGE_SOCKET; default: {config.DEFAULT_SOCKET}]",
)
@click.option(
    "--underlay",
    metavar="WHAT",
    help="What leads to other nodes: an interface, or an address or network of one.  [env: MOORAGE_UNDERLAY; "
    "default: the interface with the default route]",
)
@click.option(
    "--vxlan-port",
    metavar="PORT",
    help="UDP port of this node's tunnels; nodes may differ.  [env: MOORAGE_VXLAN_PORT; default: 4789]",
)
@click.option(
    "--gateway",
    flag_value="true",
    default=None,
    help="Only join the fabric, to reach containers from this machine, and wire none here.  "
    "[env: MOORAGE_GATEWAY; default: false]",
)
@click.option(
    "--manage-docker-user",
    metavar="true|false",
    help="Let containers pass where Docker's own policy would drop their traffic, by rules in its chain DOCKER-USER.  "
    "[env: MOORAGE_MANAGE_DOCKER_USER; default: true]",
)
@click.option(
    "--default-network",
    metavar="NAME",
    help="The network that moorage-netmodules means without --network.  [env: MOORAGE_DEFAULT_NETWORK; default: none]",
)
@click.option(
    "--mesos-agent-url",
    metavar="URL",
    help="The Mesos agent of this node, asked which task each container is for.  [env: MOORAGE_MESOS_AGENT_URL; "
    "default: it is not asked]",
)
@click.option(
    "--mesos-credentials",
    metavar="FILE",
    help="Mode 0600, with one line user:password for the Mesos agent.  [env: MOORAGE_MESOS_CREDENTIALS; default: none]",
)
@click.option(
    "--mesos-ca",
    metavar="FILE",
    help="PEM of the authority that signed the Mesos agent's certificate.  [env: MOORAGE_MESOS_CA; default: the "
    "system's]",
)
@click.option(
    "--log-level",
    metavar="LEVEL",
    help=f"{', '.join(config.LOG_LEVELS)}.  [env: MOORAGE_LOG_LEVEL; default: info]",
)
@click.option(
    "--log-format",
    metavar="FORMAT",
    help=f"{', '.join(config.LOG_FORMATS)}.  [env: MOORAGE_LOG_FORMAT; default: console]",
)
@click.option(
    "--config",
    "file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The configuration file.  [env: MOORAGE_CONFIG; default: {config.DEFAULT_FILE}, if it is there]",
)
@click.pass_context
def agent(ctx: click.Context, /, file: Path | None, **flags: str | None) -> None:
    """Run this node's agent, until SIGTERM or SIGINT: requests in flight are finished first.

    Flags win over the MOORAGE_* environment, that over the file, that over the defaults. The file is
    TOML with the flags' names: node = "a", state_dir = "/var/lib/moorage"; those that begin with mesos
    may stand in a table [mesos]: agent_url = "http://192.0.2.1:5051".

    \b
    Examples:
      moorage agent --node a --log-format json
      moorage agent --node lb1 --store etcd://192.0.2.10:2379 --gateway
    """
    session = ctx.ensure_object(Session)
    flags["store"] = flags["store"] or session.store
    flags["socket"] = flags["socket"] or session.socket
    for key in ("state_dir", "socket", "mesos_credentials", "mesos_ca"):
        if flags[key]:
            flags[key] = str(Path(flags[key] or "").absolute())
    settings = config.load(flags, file=file)
    log.configure("debug" if ctx.find_root().params.get("debug") else settings.log_level, settings.log_format)

    from moorage.agent import run

    ctx.exit(run(settings))
