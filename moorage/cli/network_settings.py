"""A network's settings as options, the same for `network create` and `network set`, and as words.

An option that is not given is None, and leaves the setting at its default or as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import click

from ipam.errors import InvalidInput
from ipam.isolation import ISOLATIONS
from ipam.networks import NetworkChange
from ipam.next_hops import next_hop
from ipam.nodes_networks import FAMILIES
from ipam.permissions import RANGES
from ipam.rates import parse_rate, rate_text
from ipam.records import FABRICS
from moorage.cli.session import IP

Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULT = "default"
"""In place of a number: what it is where nobody says otherwise."""

NOTHING = "none"
"""In place of a list of rules, or of a rate."""


def setting_options(*, new: bool) -> Callable[[Command], Command]:
    """Decorates a command with all of them. new: their help tells a new network's defaults."""

    def otherwise(default: str) -> str:
        return f"  [default: {default if new else 'as it is'}]"

    lists = "repeatable" if new else "repeatable; in place of those there are"
    options = [
        click.option(
            "--mtu",
            metavar="BYTES",
            type=int,
            help="Largest packet of containers; 0: as the underlay allows." + otherwise("0"),
        ),
        click.option(
            "--nat/--no-nat", default=None, help="Masquerade what leaves all pools." + otherwise("nat")
        ),
        click.option("--dns", metavar="IP", type=IP, multiple=True, help=f"Name server; {lists}."),
        click.option("--search", metavar="DOMAIN", multiple=True, help=f"Search domain; {lists}."),
        click.option(
            "--warm",
            metavar="N",
            type=int,
            help="Addresses per family that a node keeps ready." + otherwise("8"),
        ),
        click.option(
            "--preload/--no-preload",
            default=None,
            help="Keep them ready on all nodes, before it is first used." + otherwise("no-preload"),
        ),
        click.option(
            "--strict/--no-strict",
            default=None,
            help="Never take addresses from other nodes' blocks, even when no block is left."
            + otherwise("no-strict"),
        ),
        click.option(
            "--fabric",
            type=click.Choice(FABRICS),
            help="How other nodes reach its containers: in a VXLAN tunnel, by routes via the nodes (all on one "
            "segment), or not through moorage."
            + otherwise("vxlan on etcd, none on SQLite, which has one node"),
        ),
        click.option(
            "--isolation",
            type=click.Choice(ISOLATIONS),
            help="Who may call containers: who shares a netgroup with them, or everybody."
            + otherwise("netgroups"),
        ),
        _rules_option(
            "--allow-from",
            "allow_from",
            "CIDR|nodes",
            f"Who else may, without being a container: addresses, every node, or none; {lists}."
            + otherwise(NOTHING),
        ),
        click.option(
            "--to-node",
            "to_node",
            metavar="store|none",
            multiple=True,
            callback=_words,
            help="What of the nodes containers reach that is kept from them otherwise: the store's endpoints, "
            "or nothing." + otherwise(NOTHING),
        ),
        click.option(
            "--max-connections",
            metavar="N|default",
            callback=_connections,
            help="The most connections that a container's interface may have tracked by its node; by default "
            "a twentieth of the node's table." + otherwise("default"),
        ),
        _rules_option(
            "--allow-netgroup",
            "allow_netgroups",
            "PATTERN",
            "Netgroups that apps may join besides the network's own: names, or patterns like team-*; "
            f"none; {lists}." + otherwise(NOTHING),
        ),
        click.option(
            "--allow-public/--no-allow-public",
            default=None,
            help="Let apps be reachable from anywhere, by the netgroup public."
            + otherwise("no-allow-public"),
        ),
        _rules_option(
            "--allow-static",
            "allow_static",
            "RANGE",
            "Addresses that apps may ask for by name: all, none, ranges (those of --static), "
            f"FIRST-LAST, one address or a CIDR; {lists}." + otherwise(RANGES),
        ),
        _rules_option(
            "--allow-hostport",
            "allow_hostports",
            "RANGE",
            "Ports of the node that apps may have mapped: 8080, 31000-32000, or none; "
            f"{lists}." + otherwise("31000-32000"),
        ),
        click.option(
            "--allow-mac/--no-allow-mac",
            default=None,
            help="Let apps choose a MAC." + otherwise("no-allow-mac"),
        ),
        click.option(
            "--max-bandwidth",
            metavar="RATE",
            callback=_rate,
            help="The most that a container sends, and receives: 100mbit, 1gbit, or none. Who asks for no "
            "limit has this one." + otherwise(NOTHING),
        ),
    ]
    if not new:
        options += [
            click.option("--no-dns", is_flag=True, help="No name server of its own."),
            click.option("--no-search", is_flag=True, help="No search domain."),
        ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def read_settings(given: Mapping[str, Any]) -> NetworkChange:
    """The options as a change of nothing else. Raises InvalidInput for a list both given and emptied."""
    if (given["dns"] and given.get("no_dns")) or (given["search"] and given.get("no_search")):
        raise InvalidInput("a list cannot be both given and emptied; leave one of the two out")
    own = {field.name for field in fields(NetworkChange)}
    settings = {name: value for name, value in given.items() if name in own}
    settings["dns"] = tuple(map(str, given["dns"])) if given["dns"] or given.get("no_dns") else None
    settings["search"] = given["search"] if given["search"] or given.get("no_search") else None
    return NetworkChange(**settings)


def settings_in_words(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a table says in place of numbers and empty lists that mean something."""
    limit = row["max_bandwidth"]
    return {
        "mtu": row["mtu"] or "underlay's",
        "allow_from": row["allow_from"] or NOTHING,
        "to_node": row["to_node"] or NOTHING,
        "max_connections": row["max_connections"] or "a twentieth of the node's table",
        "allow_netgroups": [row["name"], *row["allow_netgroups"]],
        "allow_static": row["allow_static"] or NOTHING,
        "allow_hostports": row["allow_hostports"] or NOTHING,
        "max_bandwidth": rate_text(limit) if limit else NOTHING,
        "next_hop": [str(next_hop(row["next_hop"], family)) for family in FAMILIES],
    }


def _rules_option(name: str, field: str, metavar: str, help: str) -> Callable[[Command], Command]:
    return click.option(name, field, metavar=metavar, multiple=True, callback=_rules, help=help)


def _rules(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[str, ...] | None:
    if NOTHING in values and len(values) > 1:
        raise click.BadParameter(f"{NOTHING!r} stands alone; leave it or the others out")
    if not values:
        return None
    return () if values[0] == NOTHING else tuple(values)


def _words(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[str, ...] | None:
    return _rules(ctx, param, [word for text in values for word in text.split(",")])


def _connections(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None or value == DEFAULT:
        return None if value is None else 0
    if not (value.isascii() and value.isdigit() and int(value[:9]) > 0 and len(value) < 10):
        raise click.BadParameter(
            f"{value!r} is no number of connections; write for example 5000, or {DEFAULT}"
        )
    return int(value)


def _rate(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None or value == NOTHING:
        return None if value is None else 0
    try:
        return parse_rate("it", value)
    except InvalidInput as error:
        raise click.BadParameter(str(error)) from error
