"""Two agents on one etcd and a pool too small for both to keep addresses ready: nobody hoards."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import pytest

from moorage.lab import Lab
from tests.system.conftest import eventually

pytestmark = [pytest.mark.kernel, pytest.mark.etcd]

USABLE = 14


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(nodes=2, etcd=1) as lab:
        lab.start()
        lab.nodes[0].cli(
            "network", "create", "web",
            "--pool", "10.64.0.0/28", "--no-nat", "--allow-static", "all", "--fabric", "none",
        )  # fmt: skip
        yield lab


def test_every_usable_address_can_be_had_on_a_node_without_a_block(lab: Lab) -> None:
    one, two = lab.nodes
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(one.container("first"))
        ips = [first.add("web").ips[4]]
        eventually(lambda: states(lab)[one.name, "warm"] == 8)
        others = [stack.enter_context(two.container(f"c{i}")) for i in range(USABLE)]
        warm = next(row["address"] for row in one.ask("ip", "list") if row["state"] == "warm")
        answer = others[0].add("web", labels={"moorage.ip": warm})
        ips += [other.add("web").ips[4] for other in others[1 : USABLE - 1]]
        assert answer.exit == 0, answer.json
        ips.append(answer.ips[4])
        assert len(set(ips)) == USABLE
        refused = others[-1].add("web")
        assert refused.json["code"] == 11
        assert f"{USABLE} assigned, 0 warm" in refused.json["msg"]
        for container in (first, *others):
            assert container.delete("web").exit == 0
    assert one.cli("ip", "check").returncode == 0


def states(lab: Lab) -> Counter[tuple[str, str]]:
    return Counter((row["node"], row["state"]) for row in lab.nodes[0].ask("ip", "list"))
