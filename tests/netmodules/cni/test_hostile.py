"""Whatever comes in, out comes a result or a valid CNI error."""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


LABELS = st.lists(fields(key=st.sampled_from(KNOWN) | TEXTS, value=TEXTS), max_size=5)
NETWORK_INFO = fields(
    name=st.just("web"),
    ip_addresses=st.lists(fields(protocol=TEXTS, ip_address=TEXTS), max_size=3),
    groups=st.lists(TEXTS, max_size=3),
    labels=fields(labels=LABELS),
    port_mappings=st.lists(fields(host_port=st.integers(), container_port=st.integers(), protocol=TEXTS)),
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
        ips=st.lists(TEXTS), mac=TEXTS, portMappings=st.lists(fields(hostPort=st.integers()))
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
