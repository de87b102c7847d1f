"""From any plan to any other: carried out on a small model of the kernel's tables, step by step."""

from __future__ import annotations

import socket
from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from isolator.fabric import layout
from isolator.fabric.plan import SECOND_DEVICE, VXLAN_DEVICE, Hop, Plan, Remote, Route, Station, next_hop
from isolator.netlink import codec, messages
from isolator.netlink.codec import Message, Request
from isolator.netlink.inventory import parse_route

DEVICES = [VXLAN_DEVICE, SECOND_DEVICE[6]]
INDEXES = {VXLAN_DEVICE: 7, SECOND_DEVICE[6]: 8, "eth0": 2}
NAMES = {index: name for name, index in INDEXES.items()}
DESTINATIONS = [ip_network(f"10.64.{n}.0/26") for n in range(3)] + [
    ip_network("fd64::/122"),
    ip_network("10.9.9.9"),
]
MACS = [f"06:00:00:00:00:0{n}" for n in range(3)]
REMOTES = [Remote(ip_address("192.0.2.2"), 0), Remote(ip_address("192.0.2.3"), 8472)]


def index_of(name: str) -> int:
    return INDEXES.get(name, 0)


class Tables:
    """A kernel's tables that hold a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = Plan(dict(plan.routes), dict(plan.neighbours), dict(plan.tunnels))

    def take(self, request: Request) -> None:
        """Carry out one request. Fails where a kernel would refuse it."""
        body = memoryview(request.body)
        if request.kind in (messages.RTM_NEWROUTE, messages.RTM_DELROUTE):
            self._route(request, Message(request.kind, 0, 0, body))
            return
        family, index, _, _, _ = messages.NEIGHBOUR.unpack_from(body)
        device = NAMES[index]
        assert device in DEVICES
        values = codec.attributes(body, messages.NEIGHBOUR.size)
        mac = bytes(values.get(messages.NDA_LLADDR, b"")).hex(":")
        ip = ip_address(bytes(values[messages.NDA_DST])) if messages.NDA_DST in values else None
        new = request.kind == messages.RTM_NEWNEIGH
        if family == socket.AF_BRIDGE and new:
            assert ip is not None
            self.plan.tunnels[Station(device, mac)] = Remote(
                ip, int.from_bytes(values.get(messages.NDA_PORT, b""), "big")
            )
        elif family == socket.AF_BRIDGE:
            self.plan.tunnels.pop(Station(device, mac))
        elif ip is not None and new:
            self.plan.neighbours[Hop(device, ip)] = mac
        elif ip is not None:
            self.plan.neighbours.pop(Hop(device, ip))

    def _route(self, request: Request, message: Message) -> None:
        found = parse_route(message)
        assert (found.metric, found.table) == (messages.FABRIC_METRIC, messages.TABLE_MAIN)
        before = self.plan.routes.get(found.destination)
        if request.kind == messages.RTM_DELROUTE:
            del self.plan.routes[found.destination]
            return
        assert request.flags & codec.NLM_F_REPLACE
        drops = found.kind == messages.RTN_BLACKHOLE
        assert before is None or before.drops == drops, "no kernel replaces the one by the other"
        device = "" if drops else NAMES.get(found.index, "")
        self.plan.routes[found.destination] = Route(found.destination, found.gateway, device, found.source)

    def verify_references(self) -> None:
        """A route through the tunnel has a neighbour, and that one has a tunnel."""
        for route in self.plan.routes.values():
            if route.is_tunnelled:
                assert route.via is not None
                mac = self.plan.neighbours[Hop(route.device, route.via)]
                assert Station(route.device, mac) in self.plan.tunnels


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    plan = Plan()
    mac_of_peer = draw(st.permutations(MACS))
    hops = [next_hop(mac) for mac in MACS]
    device_of_peer = draw(st.tuples(*[st.sampled_from(DEVICES)] * len(MACS)))
    for destination in draw(st.sets(st.sampled_from(DESTINATIONS))):
        kind = draw(st.sampled_from(["tunnel", "direct", "drop"]))
        if kind == "drop":
            plan.routes[destination] = Route(destination)
        elif kind == "direct":
            via = ip_address(draw(st.sampled_from(["192.0.2.2", "192.0.2.3"])))
            plan.routes[destination] = Route(destination, via, draw(st.sampled_from(["", "eth0"])))
        else:
            peer = draw(st.integers(0, 2))
            source = draw(st.sampled_from([None, ip_address("10.64.0.1")]))
            source = source if destination.version == 4 else None
            device, mac = device_of_peer[peer], mac_of_peer[peer]
            plan.routes[destination] = Route(destination, hops[peer], device, source)
            plan.neighbours[Hop(device, hops[peer])] = mac
            plan.tunnels[Station(device, mac)] = draw(st.sampled_from(REMOTES))
    return plan


def accepted(actual: Plan, desired: Plan) -> bool:
    """Whether the tables hold what is desired; a route for which any link will do may use one."""
    return (
        actual.routes.keys() == desired.routes.keys()
        and all(layout.same(actual.routes[d], route) for d, route in desired.routes.items())
        and (actual.neighbours, actual.tunnels) == (desired.neighbours, desired.tunnels)
    )


@given(plans(), plans())
def test_one_plan_becomes_the_other_and_at_no_step_a_route_leads_nowhere(actual: Plan, desired: Plan) -> None:
    tables = Tables(actual)
    stays = {
        d
        for d in actual.routes.keys() & desired.routes.keys()
        if actual.routes[d].drops == desired.routes[d].drops
    }
    for request in layout.requests(actual, desired, index_of):
        tables.take(request)
        tables.verify_references()
        assert stays <= tables.plan.routes.keys()
    assert accepted(tables.plan, desired)


@given(plans())
def test_what_is_there_already_takes_no_request(plan: Plan) -> None:
    assert layout.requests(plan, plan, index_of) == []


@given(plans(), plans())
def test_a_change_asks_only_for_what_differs(actual: Plan, desired: Plan) -> None:
    differs = sum(
        len(dict(a.items() ^ b.items()))
        for a, b in (
            (actual.routes, desired.routes),
            (actual.neighbours, desired.neighbours),
            (actual.tunnels, desired.tunnels),
        )
    )
    turned = sum(
        1
        for d in actual.routes.keys() & desired.routes.keys()
        if actual.routes[d].drops != desired.routes[d].drops
    )
    assert len(layout.requests(actual, desired, index_of)) <= differs + turned


@given(plans())
def test_without_a_tunnel_device_nothing_is_asked_of_it(plan: Plan) -> None:
    kinds = {request.kind for request in layout.requests(Plan(), plan, lambda _: 0)}
    assert kinds <= {messages.RTM_NEWROUTE}


def test_a_route_that_a_stranger_made_is_not_taken_for_one_that_drops() -> None:
    destination = ip_network("10.64.1.0/26")
    strange = Route(destination, None, "#9")
    assert not layout.same(strange, Route(destination))
    requests = layout.requests(
        Plan({destination: strange}), Plan({destination: Route(destination)}), index_of
    )
    assert [request.kind for request in requests] == [messages.RTM_DELROUTE, messages.RTM_NEWROUTE]
