"""NetworkInfo: what Mesos adds to a CNI configuration under ``args["org.apache.mesos"]``.

It is the protobuf message as JSON in snake_case. Labels keep duplicates, empty and missing values.
``protocol`` of an address has a protobuf default and is always there, so a static IPv6 request arrives
marked IPv4: the address is trusted, the protocol is not even read. An entry without ``ip_address`` says
nothing.
"""

from __future__ import annotations

import msgspec

from ipam.records import Label


class IpAddress(msgspec.Struct, frozen=True):
    """``NetworkInfo.IPAddress``."""

    ip_address: str | None = None


class Labels(msgspec.Struct, frozen=True):
    """``Labels``: a message around the list."""

    labels: list[Label] | None = None


class MesosPortMapping(msgspec.Struct, frozen=True):
    """``NetworkInfo.PortMapping``."""

    host_port: int
    container_port: int
    protocol: str | None = None


class NetworkInfo(msgspec.Struct, frozen=True):
    """The fields that moorage reads."""

    name: str | None = None
    ip_addresses: list[IpAddress] | None = None
    groups: list[str] | None = None
    labels: Labels | None = None
    port_mappings: list[MesosPortMapping] | None = None

    def addresses(self) -> list[str]:
        """The static addresses asked for, as written."""
        return [entry.ip_address for entry in self.ip_addresses or () if entry.ip_address]

    def all_labels(self) -> list[Label]:
        """In their order, duplicates included."""
        return list(self.labels.labels or ()) if self.labels else []


class MesosArgs(msgspec.Struct, frozen=True):
    """``args["org.apache.mesos"]``."""

    network_info: NetworkInfo | None = None
