"""The CNI configuration on stdin: decoded, typed and bounded, before anybody looks at what it asks.

Only the fields that moorage reads are here; all others are the engine's or another plugin's and pass unseen.
``null`` counts as absent everywhere, since several engines write it.
"""

from __future__ import annotations

import msgspec

from ipam.errors import InvalidInput
from ipam.records import Label
from netmodules.cni.errors import IncompatibleVersion, Undecodable
from netmodules.cni.mesos import MesosArgs, NetworkInfo
from netmodules.frame import MAX_STDIN

SUPPORTED_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
# A configuration without cniVersion is older than the field; 0.1.0 and 0.2.0 have the same result.
DEFAULT_VERSION = "0.2.0"
# The lowest MTU that IPv4 hosts must take, and the highest a packet can have.
MTU_RANGE = range(576, 65536)


class Dns(msgspec.Struct, frozen=True, omit_defaults=True):
    """``dns`` of a configuration and of a result."""

    nameservers: list[str] | None = None
    domain: str | None = None
    search: list[str] | None = None
    options: list[str] | None = None


class RuntimeDns(msgspec.Struct, frozen=True):
    """``runtimeConfig.dns``, which has names of its own for the same things."""

    servers: list[str] | None = None
    searches: list[str] | None = None
    options: list[str] | None = None


class PortMapping(msgspec.Struct, frozen=True, rename="camel"):
    """An entry of ``runtimeConfig.portMappings``."""

    host_port: int
    container_port: int
    protocol: str | None = None
    host_ip: str | None = msgspec.field(name="hostIP", default=None)


class RuntimeBandwidth(msgspec.Struct, frozen=True, rename="camel"):
    """``runtimeConfig.bandwidth``: bits per second, and bits; 0 is no limit."""

    ingress_rate: int | None = None
    ingress_burst: int | None = None
    egress_rate: int | None = None
    egress_burst: int | None = None


class RuntimeConfig(msgspec.Struct, frozen=True, rename="camel"):
    """What the runtime adds for the capabilities that the configuration declares.

    ip_ranges and all below are read only to be refused: a container that lacks them would not be what was asked for.
    """

    port_mappings: list[PortMapping] | None = None
    ips: list[str] | None = None
    mac: str | None = None
    dns: RuntimeDns | None = None
    bandwidth: RuntimeBandwidth | None = None
    ip_ranges: object = None
    aliases: object = None
    device_id: object = msgspec.field(name="deviceID", default=None)
    infiniband_guid: object = msgspec.field(name="infinibandGUID", default=None)


class CniArgs(msgspec.Struct, frozen=True):
    """``args.cni`` of the CNI conventions."""

    labels: list[Label] | None = None
    ips: list[str] | None = None
    mac: str | None = None


class Args(msgspec.Struct, frozen=True):
    """``args``."""

    cni: CniArgs | None = None
    mesos: MesosArgs | None = msgspec.field(name="org.apache.mesos", default=None)


class PreviousInterface(msgspec.Struct, frozen=True, omit_defaults=True):
    """An entry of a result's ``interfaces``."""

    name: str
    mac: str | None = None
    mtu: int | None = None
    sandbox: str | None = None
    socket_path: str | None = msgspec.field(name="socketPath", default=None)
    pci_id: str | None = msgspec.field(name="pciID", default=None)


class PreviousIp(msgspec.Struct, frozen=True, omit_defaults=True):
    """An entry of a result's ``ips``."""

    address: str
    version: str | None = None
    gateway: str | None = None
    interface: int | None = None


class PreviousResult(msgspec.Struct, frozen=True):
    """``prevResult``: ``interfaces``, ``ips`` and ``routes`` since 0.3.0, ``ip4`` and ``ip6`` before."""

    interfaces: list[PreviousInterface] | None = None
    ips: list[PreviousIp] | None = None
    routes: list[dict[str, object]] | None = None
    dns: Dns | None = None
    ip4: dict[str, object] | None = None
    ip6: dict[str, object] | None = None


class Attachment(msgspec.Struct, frozen=True):
    """An entry of ``cni.dev/valid-attachments``."""

    container_id: str = msgspec.field(name="containerID")
    ifname: str


class Config(msgspec.Struct, frozen=True, rename="camel"):
    """The configuration of one network.

    network: moorage's own key; which network to join if it has another name than the CNI configuration.
    mtu: bytes.
    """

    cni_version: str | None = None
    name: str | None = None
    network: str | None = None
    mtu: int | None = None
    dns: Dns | None = None
    args: Args | None = None
    runtime_config: RuntimeConfig | None = None
    prev_result: PreviousResult | None = None
    valid_attachments: list[Attachment] | None = msgspec.field(name="cni.dev/valid-attachments", default=None)

    @property
    def version(self) -> str:
        """The version to answer in."""
        return self.cni_version or DEFAULT_VERSION

    @property
    def network_info(self) -> NetworkInfo | None:
        """What Mesos said, or None if the engine is another."""
        mesos = self.args.mesos if self.args else None
        return (mesos.network_info or NetworkInfo()) if mesos else None

    @property
    def engine(self) -> str:
        """Which engine the endpoint is of, as records have it."""
        return "cni" if self.network_info is None else "mesos"

    @property
    def cni_args(self) -> CniArgs:
        """``args.cni``, empty if absent."""
        return (self.args.cni if self.args else None) or CniArgs()

    @property
    def runtime(self) -> RuntimeConfig:
        """``runtimeConfig``, empty if absent."""
        return self.runtime_config or RuntimeConfig()

    @property
    def previous(self) -> PreviousResult:
        """``prevResult``, empty if absent."""
        return self.prev_result or PreviousResult()

    @property
    def network_name(self) -> str:
        """Which network is meant: ours, else the one that Mesos names, else the configuration's own name."""
        info = self.network_info
        return self.network or (info.name if info else None) or self.name or ""


class _OnlyVersion(msgspec.Struct, rename="camel"):
    cni_version: str | None = None


def parse_config(stdin: bytes) -> Config:
    """Raises Undecodable (no JSON object, too large), IncompatibleVersion, InvalidInput (wrong types)."""
    if len(stdin) > MAX_STDIN:
        raise Undecodable(f"the CNI configuration on stdin is larger than {MAX_STDIN} bytes")
    if not stdin.strip():
        raise Undecodable("the CNI configuration on stdin is empty")
    try:
        msgspec.json.decode(stdin, type=dict[str, msgspec.Raw])
        _check_version(msgspec.json.decode(stdin, type=_OnlyVersion).cni_version)
        config = msgspec.json.decode(stdin, type=Config)
    except msgspec.ValidationError as error:
        if stdin.lstrip()[:1] != b"{":
            raise Undecodable("the CNI configuration on stdin is not a JSON object") from None
        raise InvalidInput(f"the CNI configuration is invalid: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Undecodable(f"the CNI configuration on stdin is not JSON: {error}") from None
    if config.mtu is not None and config.mtu not in MTU_RANGE:
        raise InvalidInput(f'"mtu" must be from {MTU_RANGE[0]} to {MTU_RANGE[-1]}, not {config.mtu}')
    return config


def version_for_errors(stdin: bytes) -> str:
    """The version that an error is answered in: the caller's if it can be read at all."""
    try:
        version = msgspec.json.decode(stdin, type=_OnlyVersion).cni_version
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return DEFAULT_VERSION
    return version if version in SUPPORTED_VERSIONS else DEFAULT_VERSION


def version_at_least(version: str, other: str) -> bool:
    """Compare two supported versions."""
    return SUPPORTED_VERSIONS.index(version) >= SUPPORTED_VERSIONS.index(other)


def _check_version(version: str | None) -> None:
    if version and version not in SUPPORTED_VERSIONS:
        known = ", ".join(SUPPORTED_VERSIONS)
        raise IncompatibleVersion(f"cniVersion {version!r:.40} is not supported; moorage knows {known}")
