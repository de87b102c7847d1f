"""Containers as commands name them, found in the store: on whatever node they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from ipam import addresses
from ipam.errors import NotFound
from ipam.keys import IPAddress
from ipam.records import Address, AddressState
from ipam.store.base import Store


@dataclass(frozen=True, slots=True)
class Stored:
    """An address as the store has it."""

    ip: IPAddress
    record: Address
    revision: int


async def all_addresses(store: Store) -> dict[IPAddress, Stored]:
    """Every address in the store."""
    return {
        ip: Stored(ip, record, revision) async for ip, record, revision in addresses.list_addresses(store)
    }


def addresses_named(stored: Mapping[IPAddress, Stored], text: str) -> list[Stored]:
    """The addresses of the endpoints meant by CONTAINER[/IFNAME], or by the beginning of a container's id.

    Raises NotFound.
    """
    container, _, ifname = text.partition("/")
    of_containers = [
        s for s in stored.values() if s.record.state is AddressState.ASSIGNED and s.record.container_id
    ]
    ids = {s.record.container_id for s in of_containers}
    candidates = (
        [container] if container in ids else sorted(i for i in ids if container and i.startswith(container))
    )
    if len(candidates) > 1:
        raise NotFound(
            f"{container} is the beginning of {len(candidates)} containers: {', '.join(candidates)}; write more"
        )
    found = [
        s for s in of_containers if s.record.container_id in candidates and ifname in ("", s.record.ifname)
    ]
    if not found:
        raise NotFound(
            f"no container {text} has an address; see `moorage ip list --state assigned`, or name an IP address"
        )
    return sorted(found, key=lambda s: (s.record.ifname, s.ip.version))


def ips_named(stored: Mapping[IPAddress, Stored], text: str) -> list[IPAddress]:
    """The same, or the one IP address that the text is. Raises NotFound."""
    try:
        return [ip_address(text)]
    except ValueError:
        return [s.ip for s in addresses_named(stored, text)]
