"""What a trace says of a container that other nodes have not heard of."""

from __future__ import annotations

from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any, cast

import pytest

from isolator.model import EndpointKey
from isolator.trace import Tracer

KEY = EndpointKey("c1", "eth0")
NEW, OLD = ip_address("10.64.0.5"), ip_address("fd64::5")


class StubEndpoints:
    def unknown_where(self, dst: Any, sender: Any) -> list[Any]:
        assert sender.key == KEY
        return [] if dst == ip_address("10.64.0.9") else [NEW]


@pytest.mark.parametrize(
    ("target", "is_said"),
    [("10.64.1.1", True), ("10.64.0.9", False), ("fd64::1:1", False)],
    ids=["another node", "the same node", "the family that is known"],
)
def test_a_sender_that_other_nodes_do_not_know_is_said_where_it_matters(target: str, is_said: bool) -> None:
    tracer = Tracer("n1", cast(Any, None), cast(Any, StubEndpoints()), cast(Any, None))
    hops = tracer._known(cast(Any, SimpleNamespace(key=KEY)), ip_address(target))
    assert [(hop.at, hop.holds, str(NEW) in hop.says) for hop in hops] == [("store", False, True)] * is_said
