"""The result of an ADD, in the shape of each CNI version, and the comparison that CHECK makes with it.

    0.1.0, 0.2.0     ip4 / ip6 {ip, gateway, routes}, dns
    0.3.0 - 0.4.0    interfaces, ips[].version, routes, dns
    1.0.0            the same without ips[].version
    1.1.0            and interfaces[].mtu

What plugins before us in a chain have made comes first, as they said it. The oldest shape has room for one address a
family: ours, since who reads that shape wants to know of the interface that was asked for.

Mesos reads only ``ip4``, ``ip6`` and ``dns`` and ignores what it does not know. With a pure result of 0.3.0
or later it sees a plugin that succeeded without an address, and the task dies ten seconds later. So a call
that comes from Mesos gets ``ip4`` and ``ip6`` on top of the shape that its configuration names: right for
Mesos, and still a valid result for whoever takes the version by its word.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_interface
from typing import Any

import msgspec

from isolator.model import Endpoint, IPAddress
from netmodules.cni.config import (
    Config,
    Dns,
    PreviousInterface,
    PreviousIp,
    PreviousResult,
    RuntimeDns,
    version_at_least,
)


def render_result(endpoint: Endpoint, config: Config) -> bytes:
    """The JSON to print after an ADD that succeeded."""
    version = config.version
    body: dict[str, Any] = {"cniVersion": version}
    modern = version_at_least(version, "0.3.0")
    if modern:
        body |= _modern(endpoint, version, config.previous)
    else:
        body |= {name: ip for name, ip in _old_ips(config.previous).items() if ip}
    if not modern or config.network_info is not None:
        body |= {f"ip{ip.version}": _old_ip(ip, endpoint) for ip in endpoint.ips}
    body["dns"] = dns_of(config, endpoint)
    return msgspec.json.encode(body)


def dns_of(config: Config, endpoint: Endpoint) -> Dns:
    """Field by field: the runtime's, else the configuration's, else the network's, else of the plugin before."""
    runtime = config.runtime.dns or RuntimeDns()
    own = config.dns or Dns()
    before = config.previous.dns or Dns()
    return Dns(
        nameservers=runtime.servers
        or own.nameservers
        or list(endpoint.nameservers)
        or before.nameservers
        or None,
        domain=own.domain or before.domain or None,
        search=runtime.searches or own.search or list(endpoint.search) or before.search or None,
        options=runtime.options or own.options or before.options or None,
    )


def differences(endpoint: Endpoint, previous: PreviousResult) -> list[str]:
    """Sentences, one per difference between the result that the runtime kept and the endpoint."""
    interfaces = previous.interfaces or []
    at = [n for n, interface in enumerate(interfaces) if _is_ours(interface, endpoint)]
    found = []
    if interfaces and not at:
        found.append(f"prevResult has no interface {endpoint.key.ifname} in a sandbox")
    for interface in (interfaces[n] for n in at):
        if interface.mac and interface.mac.lower() != endpoint.mac.lower():
            found.append(f"prevResult has MAC {interface.mac}, the endpoint {endpoint.mac}")
    carried = {str(ip) for ip in endpoint.ips}
    kept = {_host(ip) for ip in previous.ips or [] if ip.interface is None or ip.interface in at}
    found += [f"prevResult lacks {ip}, which the endpoint has" for ip in sorted(carried - kept)]
    found += [f"prevResult has {ip}, which the endpoint lacks" for ip in sorted(kept - carried)]
    return found


def _modern(endpoint: Endpoint, version: str, previous: PreviousResult) -> dict[str, Any]:
    """Our interfaces, addresses and routes, after those of the plugins before us in a chain."""
    mtu = endpoint.mtu if version_at_least(version, "1.1.0") else None
    before = previous.interfaces or []
    interfaces = [
        *before,
        PreviousInterface(name=endpoint.host_ifname, mtu=mtu),
        PreviousInterface(name=endpoint.key.ifname, mac=endpoint.mac, mtu=mtu, sandbox=endpoint.netns),
    ]
    with_family = not version_at_least(version, "1.0.0")
    ips = [
        PreviousIp(
            address=_with_length(ip),
            version=str(ip.version) if with_family else None,
            gateway=str(endpoint.gateway(ip.version)),
            interface=len(before) + 1,
        )
        for ip in endpoint.ips
    ]
    return {
        "interfaces": interfaces,
        "ips": [*(previous.ips or []), *ips],
        "routes": [*(previous.routes or []), *_routes(endpoint, endpoint.ips)],
    }


def _old_ips(previous: PreviousResult) -> dict[str, dict[str, object] | None]:
    return {"ip4": previous.ip4, "ip6": previous.ip6}


def _old_ip(ip: IPAddress, endpoint: Endpoint) -> dict[str, Any]:
    gateway = str(endpoint.gateway(ip.version))
    return {"ip": _with_length(ip), "gateway": gateway, "routes": _routes(endpoint, [ip])}


def _routes(endpoint: Endpoint, ips: Sequence[IPAddress]) -> list[dict[str, str]]:
    """The default routes of these addresses' families, then those to their network's pools."""
    families = {ip.version: "0.0.0.0/0" if ip.version == 4 else "::/0" for ip in ips}
    found = [*families.items(), *((p.version, str(p)) for p in endpoint.pools if p.version in families)]
    return [{"dst": destination, "gw": str(endpoint.gateway(family))} for family, destination in found]


def _with_length(ip: IPAddress) -> str:
    return f"{ip}/{ip.max_prefixlen}"


def _is_ours(interface: PreviousInterface, endpoint: Endpoint) -> bool:
    return interface.name == endpoint.key.ifname and bool(interface.sandbox)


def _host(ip: PreviousIp) -> str:
    """The address without its prefix length, in canonical spelling."""
    try:
        return str(ip_interface(ip.address).ip)
    except ValueError:
        return ip.address
