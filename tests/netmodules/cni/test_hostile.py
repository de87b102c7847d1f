"""Whatever comes in, out comes a result or a valid CNI error."""

import json
import re
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipam.rates import FASTEST, SLOWEST
from netmodules.labels import KNOWN
from netmodules.request import Reply
from tests.netmodules.fakes import FakeIsolator, cni_env, cni_request, handler_for

COMMANDS = st.sampled_from(["ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION", "", "?"])
TEXTS = st.text(max_size=30) | st.sampled_from(
    ["web", "10.1.0.5", "fd00::5", "10.1.0.0/24", "true", "1.0.0", "02:00:00:00:00:01", "$(id)", "\0", "a,b"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what belongs there, sometimes anything."""
    return st.one_of(strategy, strategy, strategy, ANYTHING)


def fields(**named: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: maybe(value) for name, value in named.items()})


RATES = st.text("0123456789.-kKmMgGbit", max_size=12)
NUMBERS = st.integers() | st.integers(0, 70_000) | st.integers(10**3, 10**12) | st.just(10**400)
LABELS = st.lists(fields(key=st.sampled_from(KNOWN) | TEXTS, value=TEXTS | RATES), max_size=5)
PORTS = {"containerPort": NUMBERS, "protocol": TEXTS | st.sampled_from(["tcp", "UDP", "sctp"])}
NETWORK_INFO = fields(
    name=st.just("web"),
    ip_addresses=st.lists(fields(protocol=TEXTS, ip_address=TEXTS), max_size=3),
    groups=st.lists(TEXTS, max_size=3),
    labels=fields(labels=LABELS),
    port_mappings=st.lists(fields(host_port=NUMBERS, container_port=NUMBERS, protocol=TEXTS)),
)
CONFIGS = fields(
    cniVersion=st.sampled_from(["0.1.0", "0.2.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]),
    name=st.just("web"),
    network=TEXTS,
    mtu=st.integers(0, 70_000),
    dns=fields(nameservers=st.lists(TEXTS), domain=TEXTS),
    args=st.fixed_dictionaries(
        {}, optional={"org.apache.mesos": fields(network_info=NETWORK_INFO), "cni": fields(labels=LABELS)}
    ),
    runtimeConfig=fields(
        ips=st.lists(TEXTS),
        mac=TEXTS,
        portMappings=st.lists(fields(hostPort=NUMBERS, hostIP=TEXTS, **PORTS)),
        bandwidth=fields(ingressRate=NUMBERS, ingressBurst=NUMBERS, egressRate=NUMBERS, egressBurst=NUMBERS),
    ),
    prevResult=fields(
        interfaces=st.lists(fields(name=TEXTS, sandbox=TEXTS)),
        ips=st.lists(fields(address=TEXTS, interface=st.integers(-3, 3))),
        routes=st.lists(fields(dst=TEXTS)),
    ),
)
STDIN = st.one_of(st.binary(max_size=200), CONFIGS.map(lambda config: json.dumps(config).encode()))


def assert_valid(command: str, reply: Reply) -> None:
    if reply.exit == 0:
        assert (reply.stdout == b"") == (command != "ADD")
        return
    error = json.loads(reply.stdout)
    assert set(error) <= {"cniVersion", "code", "msg", "details"}
    assert error["code"] in (1, 4, 6, 7, 104), error
    assert error["msg"]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(command=COMMANDS, stdin=STDIN)
async def test_any_configuration_gets_a_valid_answer(command: str, stdin: bytes) -> None:
    handler = handler_for(FakeIsolator())
    assert_valid(command, await handler(cni_request(command, stdin)))


GOOD = st.sampled_from(
    [
        {"moorage.netgroups": "web,db"},
        {"moorage.bandwidth.ingress": "10mbit"},
        {"moorage.mac": "02:00:00:00:00:01"},
        {"moorage.ip": "10.1.0.5"},
        {"moorage.pool": "10.1.0.0/24"},
    ]
)
HOSTILE = st.text("; {}\n\"'`$()#\\\0*/-a", max_size=12)


@settings(max_examples=400, deadline=None)
@given(
    label=st.sampled_from(KNOWN),
    value=HOSTILE,
    groups=st.lists(HOSTILE | st.just("db"), max_size=3),
    protocol=HOSTILE,
    host_ip=HOSTILE,
    good=GOOD,
)
async def test_no_text_of_a_users_gets_past_its_grammar(
    label: str, value: str, groups: list[str], protocol: str, host_ip: str, good: dict[str, str]
) -> None:
    """Whatever is attached can be written into rules, names and commands as it is."""
    isolator = FakeIsolator()
    labels = [{"key": key, "value": text} for key, text in {**good, label: value}.items()]
    info = {"name": "web", "labels": {"labels": labels}, "groups": groups}
    config = {
        "name": "web",
        "args": {"org.apache.mesos": {"network_info": info}},
        "runtimeConfig": {
            "portMappings": [
                {"hostPort": 80, "containerPort": 80, "protocol": protocol or "tcp", "hostIP": host_ip}
            ]
        },
    }
    assert_valid("ADD", await handler_for(isolator)(cni_request("ADD", config)))
    for spec in isolator.specs:
        words = [*spec.netgroups, spec.pool or "", spec.mac or "", *(m.protocol for m in spec.port_mappings)]
        assert all(re.fullmatch(r"[A-Za-z0-9_.:/-]*", word) for word in words)
        assert not any(word.startswith("-") for word in words)
        for limit in (spec.bandwidth.ingress, spec.bandwidth.egress):
            assert limit is None or SLOWEST <= limit.rate <= FASTEST


@settings(max_examples=100, deadline=None)
@given(
    variables=st.dictionaries(
        st.sampled_from(["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS"]), TEXTS
    )
)
async def test_any_environment_gets_a_valid_answer(variables: dict[str, str]) -> None:
    handler = handler_for(FakeIsolator())
    for command in ("ADD", "DEL"):
        assert_valid(command, await handler(cni_request(command, None, cni_env(command, **variables))))
