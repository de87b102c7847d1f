"""Port mappings, from whatever engine: text and numbers in, typed values out."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from ipam.errors import InvalidInput
from isolator.model import PROTOCOLS, IPAddress, PortMapping

PORTS = range(1, 65536)
MOST_MAPPINGS = 256
"""Of one endpoint. Each is an element in the node's firewall."""


def read_port_mapping(
    what: str, *, protocol: str | None, host_port: int, container_port: int, host_ip: str | None = None
) -> PortMapping:
    """One mapping; the protocol is TCP if none is given. Raises InvalidInput naming ``what``."""
    for side, port in (("host", host_port), ("container", container_port)):
        if port not in PORTS:
            raise InvalidInput(
                f"the {side} port in {what} must be from {PORTS[0]} to {PORTS[-1]}, not {port!s:.40}"
            )
    wanted = (protocol or "tcp").lower()
    if wanted not in PROTOCOLS:
        raise InvalidInput(
            f"the protocol in {what} must be one of {', '.join(PROTOCOLS)}, not {protocol!r:.40}"
        )
    return PortMapping(wanted, host_port, container_port, _host_ip(what, host_ip) if host_ip else None)


def read_port_mappings(what: str, mappings: Iterable[PortMapping]) -> tuple[PortMapping, ...]:
    """Each mapping once, in the order given. Raises InvalidInput for two that claim the same port."""
    kept = tuple(dict.fromkeys(mappings))
    if len(kept) > MOST_MAPPINGS:
        raise InvalidInput(f"{what} has {len(kept)} port mappings; at most {MOST_MAPPINGS} are possible")
    for number, one in enumerate(kept):
        rival = next((other for other in kept[:number] if one.claims_the_same_as(other)), None)
        if rival is not None:
            raise InvalidInput(f"{what} maps {rival}, and {one} too; leave one of the two out")
    return kept


def _host_ip(what: str, value: str) -> IPAddress:
    try:
        address: IPAddress = IPv6Address(value) if ":" in value else IPv4Address(value)
    except AddressValueError:
        raise InvalidInput(f"the host's address in {what} must be an IP address, not {value!r:.80}") from None
    if isinstance(address, IPv6Address) and (address.scope_id or address.ipv4_mapped):
        raise InvalidInput(f"the host's address in {what} must be a plain IPv6 address, not {value!r:.80}")
    if address.version == 6 and address.is_loopback:
        raise InvalidInput(
            f"the host's address in {what} must not be {address}: Linux forwards nothing from there, so no container "
            "can be reached by it; use 127.0.0.1 for what only the node itself may call"
        )
    if address.is_multicast or address.is_link_local:
        raise InvalidInput(f"the host's address in {what} must be one that the node can have, not {address}")
    return address
