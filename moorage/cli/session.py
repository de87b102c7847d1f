"""What every command shares: the options, the store, the agent's socket, types of arguments."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar, cast

import click

from ipam.errors import InvalidInput
from ipam.schema import ensure_schema
from ipam.store import open_store
from ipam.store.base import Store
from isolator.model import PROTOCOLS, PortMapping
from isolator.policy.sending import ICMP_ERROR, Packet
from moorage import admin, config
from moorage.cli.output import Output

T = TypeVar("T")
P = ParamSpec("P")
Command = TypeVar("Command", bound=Callable[..., Any])
IPAddress: TypeAlias = IPv4Address | IPv6Address


@dataclass
class Session:
    """One run of the command line. store, socket: as given by flag, else None."""

    store: str | None = None
    socket: str | None = None
    output: str = "table"

    @property
    def out(self) -> Output:
        return Output(as_json=self.output == "json")

    def config(self) -> config.AgentConfig:
        """The configuration that an agent started with the same flags would have."""
        # Commands other than `agent` name no node; a host whose name may not be one runs them as well.
        return config.load({"node": "any", "store": self.store, "socket": self.socket})

    @property
    def store_is_shared(self) -> bool:
        """Whether several nodes can have the store."""
        return not self.config().store.startswith("sqlite:")

    def run(self, action: Callable[[Store], Awaitable[T]], *, create: bool = False, check: bool = True) -> T:
        """Run ``action`` on the store, which ``create`` makes if there is none. Raises MoorageError.

        check: refuse a store with a schema that this program does not know.
        """

        async def opened() -> T:
            store = await open_store(self.config().store, create=create)
            try:
                if check:
                    await ensure_schema(store)
                return await action(store)
            finally:
                await store.close()

        return asyncio.run(opened())

    def ask_agent(self, name: str, **arguments: Any) -> Any:
        """The answer of this machine's agent. Raises MoorageError."""
        return admin.call(str(self.config().socket), name, **arguments)


def pass_session(command: Callable[Concatenate[Session, P], None]) -> Callable[P, None]:
    """Give a command the Session as first argument, and the options that stand behind any command.

    --store and --socket are documented once, on the root, and understood here too. The innermost
    decorator, so that these options come last in --help.
    """

    @click.option("--store", "store_here", hidden=True)
    @click.option("--socket", "socket_here", hidden=True)
    @click.option(
        "-o",
        "--output",
        "output_here",
        type=click.Choice(["table", "json"]),
        help="How to print.  [default: table]",
    )
    @click.pass_context
    @functools.wraps(command)
    def wrapped(
        ctx: click.Context,
        /,
        *args: Any,
        store_here: str | None,
        socket_here: str | None,
        output_here: str | None,
        **kwargs: Any,
    ) -> None:
        session = ctx.ensure_object(Session)
        session.store = store_here or session.store
        session.socket = socket_here or session.socket
        session.output = output_here or session.output
        command(session, *args, **kwargs)

    return cast("Callable[P, None]", wrapped)


def packet_options(command: Command) -> Command:
    """Options that say which packet is meant: ``port`` and ``proto``."""
    for option in (
        click.option(
            "--proto",
            metavar="T",
            type=click.Choice((*PROTOCOLS, ICMP_ERROR)),
            default="tcp",
            help=f"Its protocol: {', '.join(PROTOCOLS)}, or {ICMP_ERROR} for an ICMP error message.",
        ),
        click.option(
            "--port",
            metavar="P",
            type=click.IntRange(1, 65535),
            help="The port that is called.  [default: any]",
        ),
    ):
        command = option(command)
    return command


def as_port_mapping(row: Mapping[str, Any]) -> PortMapping:
    """One of an endpoint's port mappings, as the agent tells of it."""
    host_ip = row["host_ip"]
    return PortMapping(
        row["protocol"],
        row["host_port"],
        row["container_port"],
        None if host_ip is None else ip_address(host_ip),
    )


def packet_of(proto: str, port: int | None) -> Packet:
    """The packet that those options mean. Raises InvalidInput."""
    if proto == ICMP_ERROR and port is not None:
        raise InvalidInput(f"an ICMP error has no port; leave --port or --proto {ICMP_ERROR} out")
    return Packet(proto, port)


class IPType(click.ParamType[IPAddress]):
    """An IPv4 or IPv6 address."""

    name = "ip"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> IPAddress:
        try:
            return ip_address(value)
        except ValueError:
            self.fail(f"{value!r} is no IP address; write for example 10.64.0.5 or fd00:64::5", param, ctx)


IP = IPType()
