"""``moorage network``: what apps join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import click

from ipam import networks
from ipam.errors import InvalidInput
from ipam.networks import NetworkChange, PoolSpec
from ipam.nodes_networks import read_nodes_networks
from ipam.permissions import EVERYTHING, NEW_NETWORK
from ipam.pool_collisions import colliding_pools, warnings
from ipam.pools import geometry, parse_range
from ipam.records import Network, Pool
from ipam.store.base import Store
from moorage.cli.network_settings import read_settings, setting_options, settings_in_words
from moorage.cli.output import Column, fields, print_json, words
from moorage.cli.session import Session, pass_session
from moorage.config import DEFAULT_SOCKET

CNI_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

CAPABILITIES = ("portMappings", "bandwidth", "ips", "mac", "dns")
"""What moorage-cni makes of a runtime's ``runtimeConfig``."""

IPV4_BITS = 32
"""A block of IPv4 is never longer than this and one of IPv6 never shorter, so N alone says which is meant."""


@click.group(short_help="Networks that apps join.")
def network() -> None:
    """Networks: what an app joins by name, and the pools its addresses come from.

    \b
    Example:
      moorage network create web --pool 10.64.0.0/16
      moorage network show web
    """


def _prefix_length(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[int]:
    lengths = []
    for text in values:
        digits = text.removeprefix("/")
        if not (digits.isascii() and digits.isdigit() and 0 < int(digits) <= 128):
            raise click.BadParameter(f"{text!r} is no prefix length; write for example 26, or 122 for IPv6")
        lengths.append(int(digits))
    return lengths


@network.command(short_help="Create a network with its pools.")
@click.argument("name")
@click.option(
    "--pool",
    "pools",
    metavar="CIDR",
    multiple=True,
    required=True,
    help="Where its addresses come from; repeatable.",
)
@click.option(
    "--block-size",
    "block_sizes",
    metavar="N",
    multiple=True,
    callback=_prefix_length,
    help="Prefix length of the slices that nodes claim: up to 32 is meant for the IPv4 pools, above "
    "for the IPv6 pools; repeatable.  [default: 26, 122]",
)
@click.option(
    "--static",
    metavar="RANGE",
    multiple=True,
    help="Addresses given only to who asks for them: FIRST-LAST, one address or a CIDR; repeatable.",
)
@click.option(
    "--exclude", "excluded", metavar="RANGE", multiple=True, help="Addresses given to nobody; repeatable."
)
@click.option(
    "--force",
    is_flag=True,
    help="Let pools lie over networks that nodes are connected to; addresses that nodes use are left out.",
)
@setting_options(new=True)
@pass_session
def create(
    session: Session,
    /,
    name: str,
    pools: tuple[str, ...],
    block_sizes: list[int],
    static: tuple[str, ...],
    excluded: tuple[str, ...],
    force: bool,
    **settings: Any,
) -> None:
    """Create a network with its pools.

    With an IPv4 and an IPv6 pool every container gets an address of each. A RANGE belongs to the
    pool that contains it. What apps ask for beyond an address of some sort has to be allowed.

    A pool must not share addresses with the networks of nodes: their interfaces' prefixes, their addresses,
    gateways and name servers, and the store. It may with what they only have a route to; that is a warning.

    \b
    Examples:
      moorage network create web --pool 10.64.0.0/16
      moorage network create db --pool 10.65.0.0/24 --pool fd00:65::/64 \\
          --block-size 28 --static 10.65.0.10-10.65.0.19 --dns 10.0.0.2 --no-nat
    """
    specs = pool_specs(pools, block_sizes, static, excluded, forced=force)
    settings["fabric"] = settings["fabric"] or ("vxlan" if session.store_is_shared else "none")
    record = Network(name=name, pools=[], **{**NEW_NETWORK, **read_settings(settings).fields()})

    async def act(store: Store) -> tuple[Network, list[Pool], list[str]]:
        await networks.create_network(store, record, specs)
        created, found = await networks.get_network(store, name)
        return created, found, warnings(map(geometry, found), await read_nodes_networks(store))

    created, created_pools, told = session.run(act, create=True)
    for warning in (resolver_warning(created), *told):
        if warning:
            click.echo(f"Warning: {warning}", err=True)
    cidrs = ", ".join(pool.cidr for pool in created_pools)
    session.out.done(
        f"network {name} created with {cidrs}; "
        f"for the engine's configuration see `moorage network cni-config {name}`",
        row(created, created_pools),
    )


def resolver_warning(network: Network, resolv_conf: Path = Path("/etc/resolv.conf")) -> str:
    """Why containers of ``network`` would have a resolver that only this machine reaches; "" if they have not.

    Without DNS servers of their own, engines give containers the host's file, and on many hosts that names
    a stub resolver on a loopback address.
    """
    servers = network.dns
    if not servers and resolv_conf.is_file():
        lines = (line.split() for line in resolv_conf.read_text(errors="replace").splitlines())
        servers = [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]
    loopback = [server for server in servers if server.startswith("127.") or server == "::1"]
    if not loopback or len(loopback) < len(servers):
        return ""
    source = "" if network.dns else f", which {resolv_conf} names,"
    return (
        f"containers of {network.name} cannot reach the resolver {loopback[0]}{source} from their own namespace; "
        "give the network one they can reach with --dns"
    )


def pool_specs(
    cidrs: Sequence[str],
    block_sizes: Sequence[int],
    static: Sequence[str],
    excluded: Sequence[str],
    *,
    forced: bool,
) -> list[PoolSpec]:
    """Give each pool the block size of its family and the ranges inside it. Raises InvalidInput."""
    sizes: dict[int, int] = {}
    for size in block_sizes:
        family = 4 if size <= IPV4_BITS else 6
        if sizes.setdefault(family, size) != size:
            raise InvalidInput(
                f"--block-size is given twice for IPv{family}: {sizes[family]} and {size}; keep one"
            )
    families = {cidr: 6 if ":" in cidr else 4 for cidr in cidrs}
    for family, size in sizes.items():
        if family not in families.values():
            raise InvalidInput(
                f"--block-size {size} is for IPv{family} pools, and there is none; leave it out"
            )
    return [
        PoolSpec(
            cidr,
            sizes.get(families[cidr]),
            static=tuple(text for text in static if owner(text, cidrs) == cidr),
            excluded=tuple(text for text in excluded if owner(text, cidrs) == cidr),
            forced=forced,
        )
        for cidr in cidrs
    ]


def owner(text: str, cidrs: Sequence[str]) -> str:
    """The pool that a range belongs to. Raises InvalidInput when it is in none, or is no range."""
    family = 6 if ":" in text else 4
    parse_range(text, EVERYTHING[family])
    for cidr in cidrs:
        try:
            parse_range(text, ip_network(cidr))
        except InvalidInput:
            continue
        except ValueError:
            # Creating the network says what is wrong with this pool.
            return cidr
        return cidr
    raise InvalidInput(f"the range {text} is inside none of the pools {', '.join(cidrs)}; correct it")


@network.command("list", short_help="List networks.")
@pass_session
def list_(session: Session) -> None:
    """List networks.

    \b
    Example:
      moorage network list -o json
    """
    found = session.run(networks.list_networks)
    session.out.rows(
        [row(record, pools) for record, pools in found],
        [
            Column("name"),
            Column("pools", lambda r: words([pool["cidr"] for pool in r["pools"]])),
            Column("driver"),
            Column("fabric"),
            Column("nat"),
            Column("mtu", lambda r: words(r["mtu"] or "underlay's")),
            Column("warm"),
        ],
        none="No network yet; create one with `moorage network create`.",
    )


def row(record: Network, pools: Sequence[Pool]) -> dict[str, Any]:
    """A network as JSON has it: with its pools in place of their names."""
    return {**fields(record), "pools": [fields(pool) for pool in pools]}


@network.command(short_help="Show one network, and how its pools are used.")
@click.argument("name")
@pass_session
def show(session: Session, name: str) -> None:
    """Show one network, and how its pools are used.

    \b
    Example:
      moorage network show web
    """

    async def act(store: Store) -> dict[str, Any]:
        record, pools = await networks.get_network(store, name)
        around = await read_nodes_networks(store)
        usage = [await networks.pool_usage(store, pool, around) for pool in pools]
        return {
            **row(record, pools),
            "pools": [
                {**fields(pool), "usage": {**asdict(use), "free": use.free}}
                for pool, use in zip(pools, usage, strict=True)
            ],
        }

    found = session.run(act)
    if session.out.as_json:
        print_json(found)
        return
    session.out.record(
        {
            **found,
            **settings_in_words(found),
            "pools": [
                {
                    "cidr": pool["cidr"],
                    "block_size": f"/{pool['block_size']}",
                    **{key: value for key, value in pool["usage"].items() if key != "by_node"},
                    "static": pool["static"],
                    "excluded": pool["excluded"],
                    "disabled": pool["disabled"],
                    "forced": pool["forced"],
                }
                for pool in found["pools"]
            ],
        }
    )
    by_node = [
        {
            "node": node,
            "cidr": pool["cidr"],
            **{state: states.get(state, 0) for state in ("allocated", "assigned", "own", "warm", "cooling")},
        }
        for pool in found["pools"]
        for node, states in sorted(pool["usage"]["by_node"].items(), key=largest_first)
    ]
    if by_node:
        click.echo()
        session.out.rows(by_node, [Column(title) for title in by_node[0]], none="")


def largest_first(holder: tuple[str, dict[str, int]]) -> tuple[int, str]:
    """Sorts (node, addresses by state)."""
    node, states = holder
    return -sum(states.values()), node


@network.command("set", short_help="Change a network, live.")
@click.argument("name")
@click.option("--add-pool", "add", metavar="CIDR", multiple=True, help="One more pool; repeatable.")
@click.option(
    "--block-size",
    "block_sizes",
    metavar="N",
    multiple=True,
    callback=_prefix_length,
    help="Prefix length of the slices of added pools, as with create; repeatable.  [default: 26, 122]",
)
@click.option(
    "--disable-pool",
    "disable",
    metavar="CIDR",
    multiple=True,
    help="Give out nothing more of this pool; what is assigned stays; repeatable.",
)
@click.option("--enable-pool", "enable", metavar="CIDR", multiple=True, help="The opposite; repeatable.")
@click.option(
    "--force",
    is_flag=True,
    help="Let pools that are added or enabled lie over networks that nodes are connected to; addresses that nodes "
    "use are left out.",
)
@setting_options(new=False)
@pass_session
def set_(
    session: Session,
    /,
    name: str,
    add: tuple[str, ...],
    block_sizes: list[int],
    disable: tuple[str, ...],
    enable: tuple[str, ...],
    force: bool,
    **settings: Any,
) -> None:
    """Change a network while it is used; agents follow at once.

    Running containers stay as they are: MTU, name servers, search domains and what apps may ask for
    are those of containers started from now on. Another fabric is in place on all nodes within seconds.
    A disabled pool is drained as its containers end; `network show` says what is left in it.

    \b
    Examples:
      moorage network set web --add-pool 10.66.0.0/16 --disable-pool 10.64.0.0/24
      moorage network set web --warm 32 --dns 10.0.0.2 --no-nat
      moorage network set web --allow-netgroup db --allow-netgroup 'team-*' --max-bandwidth 1gbit
    """
    change = replace(
        read_settings(settings),
        add=tuple(pool_specs(add, block_sizes, (), (), forced=force)),
        disable=disable,
        enable=enable,
        force=force,
    )
    if force and not (add or enable):
        raise InvalidInput("--force says how pools are added or enabled; give --add-pool or --enable-pool")
    if change == NetworkChange():
        raise InvalidInput("nothing is to be changed; see `moorage network set --help`")

    async def act(store: Store) -> tuple[Network, list[Pool], list[str]]:
        record, pools = await networks.set_network(store, name, change)
        asked = {ip_network(cidr) for cidr in (*add, *enable)}
        shapes = [shape for pool in pools if (shape := geometry(pool)).cidr in asked]
        around = await read_nodes_networks(store)
        # One that was made before nodes said what they use is enabled, and gives out nothing of that.
        return record, pools, [*colliding_pools(shapes, around), *warnings(shapes, around)]

    record, pools, told = session.run(act)
    for warning in (resolver_warning(record) if change.dns is not None else "", *told):
        if warning:
            click.echo(f"Warning: {warning}", err=True)
    session.out.done(f"network {name} changed", row(record, pools))


@network.command(short_help="Delete a network that nobody uses.")
@click.argument("name")
@pass_session
def delete(session: Session, name: str) -> None:
    """Delete a network that nobody uses, with its pools and reservations.

    Refused while containers have addresses of it, or had some within the cooldown. Agents first give
    back what they keep warm; that may take a few seconds.

    \b
    Example:
      moorage network delete web
    """

    async def act(store: Store) -> None:
        await networks.delete_network(store, name)

    session.run(act)
    session.out.done(f"network {name} deleted", {"name": name, "deleted": True})


@network.command("cni-config", short_help="Print the configuration that an engine needs.")
@click.argument("name")
@click.option(
    "--conflist",
    is_flag=True,
    help="Print a list of plugins, with moorage-cni as its only one, for containerd and others.",
)
@click.option(
    "--cni-version",
    type=click.Choice(CNI_VERSIONS),
    help="The version the result is given in.  [default: 0.2.0; 1.0.0 in a list]",
)
@pass_session
def cni_config(session: Session, name: str, conflist: bool, cni_version: str | None) -> None:
    """Print the CNI configuration that an engine needs for a network.

    For Mesos put it into the agent's --network_cni_config_dir, and moorage-cni into its
    --network_cni_plugins_dir. Mesos reads addresses only in the form of CNI 0.1 and 0.2, hence the
    default; for runtimes that want a newer form name it with --cni-version.

    Other runtimes want a list of plugins, mostly in /etc/cni/net.d: --conflist. It says what a runtime may
    pass on: port mappings, bandwidth, addresses, MAC and name servers.

    \b
    Example:
      moorage network cni-config web > /etc/mesos/cni/web.json
      moorage network cni-config web --conflist > /etc/cni/net.d/10-web.conflist
    """

    async def act(store: Store) -> str:
        record, _ = await networks.get_network(store, name)
        return record.name

    # Mesos passes no MOORAGE_SOCKET on to plugins, so another socket has to stand in the configuration.
    socket = str(session.config().socket)
    plugin: dict[str, Any] = {"type": "moorage-cni"}
    if socket != DEFAULT_SOCKET:
        plugin["socket"] = socket
    known = session.run(act)
    if conflist:
        plugin["capabilities"] = dict.fromkeys(CAPABILITIES, True)
        print_json({"cniVersion": cni_version or "1.0.0", "name": known, "plugins": [plugin]})
    else:
        print_json({"cniVersion": cni_version or "0.2.0", "name": known, **plugin})
