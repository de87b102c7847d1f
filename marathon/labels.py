"""App labels: what an app's own labels ask for, applied to its running endpoints.

Labels of an app's networks are there when a container starts; those of the app itself (``labels``) never reach a
network plugin. The listener reads them from Marathon, checks them against what each network allows, and has the
nodes' agents apply them, without a restart.

    MOORAGE_NETGROUPS: "front,metrics"      netgroups of all the app's endpoints, instead of those they have

Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ipam.errors import InvalidInput
from ipam.netgroups import Netgroup, parse_netgroup
from ipam.permissions import allows_netgroup
from ipam.records import Network
from marathon.facts import Assigned

NETGROUPS = "MOORAGE_NETGROUPS"
KNOWN = (NETGROUPS,)

MOST_NETGROUPS = 64
"""As many as an ADD may ask for (netmodules/labels.py)."""


@dataclass(frozen=True, slots=True)
class Relabel:
    """An endpoint that is to have other netgroups. address: one of its."""

    address: Assigned
    netgroups: tuple[Netgroup, ...]


@dataclass(slots=True)
class Plan:
    """What is to be done. refused: app -> why its labels are not applied, one sentence."""

    relabel: list[Relabel] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def plan(
    assigned: Iterable[Assigned], labels: Mapping[str, Mapping[str, str]], networks: Mapping[str, Network]
) -> Plan:
    """Compare what apps ask for with what their endpoints have.

    assigned: addresses of the framework whose apps ``labels`` names, by app id. Addresses of one endpoint, which have
    one assignment id, count once.
    """
    found = Plan()
    wanted = _wanted(labels, found)
    seen: set[str] = set()
    for address in assigned:
        netgroups = wanted.get(address.app)
        if netgroups is None or address.id in seen:
            continue
        network = networks.get(address.network)
        if network is None:
            continue
        barred = [name for name in netgroups if not allows_netgroup(network, name)]
        if barred:
            found.refused[address.app] = (
                f"{NETGROUPS} of app {address.app}: network {network.name} does not allow netgroup {barred[0]}; allow "
                f"it with `moorage network set {network.name} --allow-netgroup {barred[0]}`, or correct the label"
            )
            continue
        if set(netgroups) != set(address.netgroups or (network.name,)):
            seen.add(address.id)
            found.relabel.append(Relabel(address, netgroups))
    return found


def _wanted(labels: Mapping[str, Mapping[str, str]], found: Plan) -> dict[str, tuple[Netgroup, ...]]:
    """App -> the netgroups it asks for; what cannot be read goes to ``found.refused``."""
    wanted: dict[str, tuple[Netgroup, ...]] = {}
    for app, ours in labels.items():
        unknown = sorted(set(ours) - set(KNOWN))
        if unknown:
            found.refused[app] = (
                f"app {app} has the label {unknown[0]!r:.80}, which is unknown; known is {', '.join(KNOWN)}, the rest "
                "are labels of its networks"
            )
        if NETGROUPS not in ours:
            continue
        try:
            wanted[app] = parse_netgroups(ours[NETGROUPS])
        except InvalidInput as error:
            found.refused[app] = f"app {app}: {error}"
    return wanted


def parse_netgroups(text: str) -> tuple[Netgroup, ...]:
    """``front, metrics``. Raises InvalidInput."""
    names = [part.strip() for part in text.split(",")]
    if len(names) > MOST_NETGROUPS:
        raise InvalidInput(f"{NETGROUPS} has {len(names)} netgroups; at most {MOST_NETGROUPS} are possible")
    return tuple(dict.fromkeys(parse_netgroup(f"a netgroup in {NETGROUPS}", name) for name in names))
