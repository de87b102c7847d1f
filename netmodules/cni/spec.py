"""From a parsed CNI call to what the isolator is asked: pure, and the only place that knows who wins.

labels                  NetworkInfo.labels, then args.cni.labels; all are recorded as given
addresses               labels, NetworkInfo.ip_addresses, args.cni.ips, runtimeConfig.ips must agree;
                        CNI_ARGS IP= counts only where none of them names the family (args.cni beats it)
netgroups               NetworkInfo.groups and label moorage.netgroups together
port mappings           NetworkInfo.port_mappings and runtimeConfig.portMappings together
bandwidth               label, then runtimeConfig.bandwidth, each direction by itself
MAC                     label, runtimeConfig.mac, args.cni.mac, then CNI_ARGS MAC=

What a runtime passes on in ``runtimeConfig`` was declared for us in ``capabilities``: that which would be missing if it
were dropped is refused. Everything else that nobody here reads, in CNI_ARGS and ``args`` too, is dropped.
"""

from __future__ import annotations

from ipam.errors import InvalidInput
from ipam.rates import check_rate
from ipam.records import Label
from isolator.model import AttachSpec, Bandwidth, IPAddress, Limit, PortMapping, ValidAttachments
from netmodules.cni.config import Config, RuntimeBandwidth, RuntimeConfig
from netmodules.cni.environment import Environment, read_attachment
from netmodules.cni.errors import UnsupportedField
from netmodules.labels import Requested, read_address, read_labels, read_mac, read_name, read_netgroups
from netmodules.ports import read_port_mapping, read_port_mappings
from netmodules.request import Request

LARGEST_BURST = 2**35
"""Bits; the 4 GiB that a burst may be in the CNI reference plugin."""

LONGEST_NAME = 255
"""Characters of an engine's name for a network, which is a file name or could be."""


def attach_spec(config: Config, environment: Environment, request: Request) -> AttachSpec:
    """What an ADD asks for. Raises InvalidInput naming the field, UnsupportedField."""
    _refuse_unsupported(config.runtime)
    _refuse_taken_ifname(config, environment.key.ifname)
    labels = _labels(config)
    requested = read_labels(labels)
    info = config.network_info
    groups = read_netgroups("NetworkInfo.groups", (info.groups or ()) if info else ())
    return AttachSpec(
        key=environment.key,
        request_id=request.request_id,
        asked=request.asked,
        engine=config.engine,
        network=network_of(config),
        netns=environment.netns,
        ips=_ips(config, environment, requested),
        reservation=requested.reservation,
        netgroups=read_netgroups("groups and labels", (*groups, *requested.netgroups)),
        labels=tuple(labels),
        mac=_mac(config, environment, requested),
        pool=requested.pool,
        default_route=requested.default_route,
        mtu=config.mtu,
        port_mappings=_port_mappings(config),
        bandwidth=_bandwidth(config, requested),
        engine_network=_engine_network(config),
    )


def valid_attachments(config: Config, request: Request) -> ValidAttachments:
    """What a GC says the engine has. Raises InvalidInput; above all without a list, which never means an empty one."""
    if config.valid_attachments is None:
        raise InvalidInput(
            'GC needs the list "cni.dev/valid-attachments"; without one nothing is removed, an empty one is []'
        )
    if not config.name:
        raise InvalidInput('GC needs the "name" of the CNI configuration whose attachments are listed')
    return ValidAttachments(
        engine=config.engine,
        engine_network=_engine_network(config),
        keys=frozenset(read_attachment(one.container_id, one.ifname) for one in config.valid_attachments),
        asked=request.asked,
    )


def network_of(config: Config) -> str:
    """The network's name. Raises InvalidInput when none is given or it cannot be one."""
    if not config.network_name:
        raise InvalidInput('the CNI configuration names no network; set "name" or "network"')
    return read_name("the network's name", config.network_name)


def _engine_network(config: Config) -> str:
    name = config.name or ""
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise InvalidInput(
            f'the "name" of the CNI configuration must be at most {LONGEST_NAME} printable characters, not {name!r:.80}'
        )
    return name


def _refuse_unsupported(runtime: RuntimeConfig) -> None:
    for field, value in (
        ("ipRanges", runtime.ip_ranges),
        ("aliases", runtime.aliases),
        ("deviceID", runtime.device_id),
        ("infinibandGUID", runtime.infiniband_guid),
    ):
        if value:
            raise UnsupportedField(
                f"runtimeConfig.{field} = {value!r:.200} is nothing that moorage can do; "
                f'take "{field}" out of "capabilities" in the CNI configuration'
            )


def _refuse_taken_ifname(config: Config, ifname: str) -> None:
    if any(before.name == ifname and before.sandbox for before in config.previous.interfaces or ()):
        raise InvalidInput(
            f"a plugin before this one in the chain has made the container's {ifname} already (see prevResult); "
            "leave that plugin out, or put moorage-cni first and in its place"
        )


def _labels(config: Config) -> list[Label]:
    info = config.network_info
    return [*(info.all_labels() if info else ()), *(config.cni_args.labels or ())]


def _ips(config: Config, environment: Environment, requested: Requested) -> tuple[IPAddress, ...]:
    """At most one address a family, IPv4 first."""
    info = config.network_info
    asked = [("label moorage.ip", str(requested.ip or "")), ("label moorage.ip6", str(requested.ip6 or ""))]
    asked += [("NetworkInfo.ip_addresses", ip) for ip in (info.addresses() if info else ())]
    asked += [("args.cni.ips", ip) for ip in config.cni_args.ips or ()]
    asked += [("runtimeConfig.ips", ip) for ip in config.runtime.ips or ()]
    chosen: dict[type[IPAddress], tuple[IPAddress, str]] = {}
    for source, text in asked:
        if text:
            address = read_address(f"an address in {source}", text)
            first, first_source = chosen.setdefault(type(address), (address, source))
            if first != address:
                raise InvalidInput(
                    f"{source} asks for {address}, but {first_source} for {first}; ask for one a family"
                )
    for text in filter(None, environment.args.get("IP", "").split(",")):
        address = read_address("IP in CNI_ARGS", text.strip())
        chosen.setdefault(type(address), (address, "CNI_ARGS"))
    return tuple(address for address, _ in sorted(chosen.values(), key=lambda found: found[0].version))


def _mac(config: Config, environment: Environment, requested: Requested) -> str | None:
    if requested.mac:
        return requested.mac
    for source, text in (
        ("runtimeConfig.mac", config.runtime.mac),
        ("args.cni.mac", config.cni_args.mac),
        ("MAC in CNI_ARGS", environment.args.get("MAC")),
    ):
        if text:
            return read_mac(source, text)
    return None


def _bandwidth(config: Config, requested: Requested) -> Bandwidth:
    given = config.runtime.bandwidth or RuntimeBandwidth()
    return Bandwidth(
        ingress=requested.bandwidth.ingress or _limit("ingress", given.ingress_rate, given.ingress_burst),
        egress=requested.bandwidth.egress or _limit("egress", given.egress_rate, given.egress_burst),
    )


def _limit(direction: str, rate: int | None, burst: int | None) -> Limit | None:
    """A rate of 0 is none, and then a burst means nothing."""
    what = f"runtimeConfig.bandwidth.{direction}"
    if not rate and not burst:
        return None
    if not rate:
        raise InvalidInput(f"{what}Burst is given without {direction}Rate; give both or neither")
    check_rate(f"{what}Rate", rate)
    if burst is not None and not 0 <= burst <= LARGEST_BURST:
        raise InvalidInput(f"{what}Burst must be from 0 to {LARGEST_BURST} bits, not {burst!s:.40}")
    return Limit(rate, burst or 0)


def _port_mappings(config: Config) -> tuple[PortMapping, ...]:
    info = config.network_info
    mappings = [
        read_port_mapping(
            "NetworkInfo.port_mappings",
            protocol=given.protocol,
            host_port=given.host_port,
            container_port=given.container_port,
        )
        for given in (info.port_mappings or () if info else ())
    ]
    mappings += [
        read_port_mapping(
            "runtimeConfig.portMappings",
            protocol=given.protocol,
            host_port=given.host_port,
            container_port=given.container_port,
            host_ip=given.host_ip,
        )
        for given in config.runtime.port_mappings or ()
    ]
    return read_port_mappings("the request", mappings)
