"""Who may ask for what: an ADD against the rules of the network it joins. Pure.

Netgroups, addresses, MACs, ports of the node and bandwidth come from labels and engines' arguments, which
users write; the rules come from operators (ipam/permissions.py). What a container asks only of itself needs no rule:
which of the network's pools its address is from, and which of its interfaces has the default route. A reservation's
key is its own permission.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from ipam.keys import IPAddress
from ipam.netgroups import PUBLIC, Netgroup
from ipam.permissions import RANGES, allows_host_port, allows_netgroup, allows_static, listed
from ipam.pools import Geometry
from ipam.rates import rate_text
from ipam.records import Network
from isolator.drivers.naming import mac_for
from isolator.errors import Refused
from isolator.model import Bandwidth, PortMapping


class Asking(Protocol):
    """What somebody asks of a network: an AttachSpec, or an AllocateSpec."""

    @property
    def who(self) -> str: ...
    @property
    def network(self) -> str: ...
    @property
    def netgroups(self) -> tuple[Netgroup, ...]: ...
    @property
    def ips(self) -> tuple[IPAddress, ...]: ...
    @property
    def mac(self) -> str | None: ...
    @property
    def port_mappings(self) -> tuple[PortMapping, ...]: ...
    @property
    def bandwidth(self) -> Bandwidth: ...


def authorise(
    spec: Asking, network: Network, pools: Sequence[Geometry] = (), reserved: Collection[IPAddress] = ()
) -> None:
    """Raises Refused naming the first kind of thing that the network does not allow, the rule, and how it would be.

    pools: the network's. reserved: the addresses that need no permission: reserved under the key that was presented, or
    the asker's own until a moment ago.
    """
    for asked, rule, option in _denied(spec, network, pools, reserved):
        raise _refused(spec.who, network, asked, rule, option)


def authorise_netgroups(who: str, netgroups: Sequence[Netgroup], network: Network) -> None:
    """The same for netgroups alone."""
    for asked, rule, option in _denied_netgroups(netgroups, network):
        raise _refused(who, network, asked, rule, option)


def _refused(who: str, network: Network, asked: str, rule: str, option: str) -> Refused:
    return Refused(
        f"network {network.name} {rule}, and {who} asks for {asked}; "
        f"its operator allows it with `moorage network set {shlex.quote(network.name)} {option}`"
    )


def netgroups_of(spec: Asking) -> tuple[Netgroup, ...]:
    """The netgroups that the endpoint is to have: those asked for, else the network's own."""
    return spec.netgroups or (Netgroup(spec.network),)


def _denied(
    spec: Asking, network: Network, pools: Sequence[Geometry], reserved: Collection[IPAddress]
) -> Iterator[tuple[str, str, str]]:
    """(what is asked for, the rule against it, the option that allows it) of everything not allowed."""
    yield from _denied_netgroups(netgroups_of(spec), network)
    # One that is in no pool is refused later, with the pools that there are.
    ips = [ip for ip in spec.ips if ip not in reserved and any(ip in pool.cidr for pool in pools)]
    fixed = [str(ip) for ip in ips if not allows_static(network, pools, ip)]
    if fixed:
        option = _option("--allow-static", network.allow_static, fixed)
        yield f"the address {listed(fixed)}", f"allows {_static_rule(network)} to be asked for", option
    ports = sorted({m.host_port for m in spec.port_mappings if not allows_host_port(network, m.host_port)})
    if ports:
        option = _option("--allow-hostport", network.allow_hostports, [str(port) for port in ports])
        rule = f"allows the host ports {listed(network.allow_hostports)}"
        yield f"the host port {listed([str(port) for port in ports])}", rule, option
    # The MAC that follows from its address, which engines name when they start a container again, is nobody's choice.
    if spec.mac is not None and not network.allow_mac and not (spec.ips and spec.mac == mac_for(spec.ips)):
        yield f"the MAC {spec.mac}", "lets nobody choose a MAC", "--allow-mac"
    for direction, limit in (("ingress", spec.bandwidth.ingress), ("egress", spec.bandwidth.egress)):
        if limit is not None and network.max_bandwidth and limit.rate > network.max_bandwidth:
            asked = f"{rate_text(limit.rate)} of {direction}"
            most = f"gives a container at most {rate_text(network.max_bandwidth)}"
            yield asked, most, f"--max-bandwidth {rate_text(limit.rate)}"


def _denied_netgroups(netgroups: Sequence[Netgroup], network: Network) -> Iterator[tuple[str, str, str]]:
    names = [name for name in netgroups if not allows_netgroup(network, name)]
    if PUBLIC in names:
        yield f"the netgroup {PUBLIC}", "lets nobody be reachable from anywhere", "--allow-public"
    elif names:
        allowed = listed([network.name, *network.allow_netgroups])
        option = _option("--allow-netgroup", network.allow_netgroups, names)
        yield f"the netgroup {listed(names)}", f"allows the netgroups {allowed}", option


def _static_rule(network: Network) -> str:
    names = {RANGES: "the static ranges of its pools"}
    return listed([names.get(rule, rule) for rule in network.allow_static]).replace("none", "no address")


def _option(name: str, rules: Sequence[str], more: Sequence[str]) -> str:
    """The option for all rules that there are and some more: given, they replace those that there are."""
    return " ".join(f"{name} {shlex.quote(rule)}" for rule in (*rules, *more))
