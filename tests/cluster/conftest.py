"""A cluster under load for each test, and what must hold of it when the fault is over; or one with a container on
each node, for all tests of a module."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

from ipam.records import NODE_ENGINE
from ipam.refill import REFILL_PATIENCE
from moorage.lab import Lab, LabNode
from tests.cluster.attacking import Tally, tallied
from tests.cluster.guests import Guest, create_networks, guest
from tests.cluster.load import NETWORK, Load, Stay, refused, slowest, succeeded
from tests.patience import PATIENCE
from tests.system.conftest import eventually, links

HEALED_WITHIN = PATIENCE
"""Seconds from the end of a fault until `moorage ip check` has to be clean."""

NOTICED_WITHIN = PATIENCE
"""Seconds until containers are refused: warm addresses run out, and a write that hangs is given up."""

QUICKLY = REFILL_PATIENCE * 0.8
"""Seconds a refusal may take once the outage was noticed: less than who waits in vain. What it takes is the
machine's load."""

Story = Callable[..., AbstractContextManager[tuple[Lab, Load]]]
"""story(etcd=3, flags=(), quiet=0) -> a lab of three nodes and its load, under way but for the first ``quiet``."""


@pytest.fixture
def story(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Story:
    """A cluster with a load on it. When its block ends, so does the load, and everything is verified."""

    @contextlib.contextmanager
    def begin(etcd: int = 3, flags: Sequence[str] = (), quiet: int = 0) -> Iterator[tuple[Lab, Load]]:
        seed = random.randrange(1 << 32)
        begun = time.monotonic()
        with Lab(nodes=3, etcd=etcd, etcd_flags=flags) as lab:
            lab.start()
            lab.nodes[0].cli(
                "network", "create", NETWORK,
                "--pool", "10.64.0.0/22", "--block-size", "28", "--no-nat", "--allow-static", "all",
                "--allow-from", "nodes",
            )  # fmt: skip
            load = Load(lab.nodes[quiet:], seed)
            try:
                with load:
                    under_way(load)
                    yield lab, load
                    under_way(load)
                    load.finish()
                    load.look()
                    for node in lab.nodes:
                        nothing_is_left(node)
                load.verify()
            except BaseException:
                for node in lab.nodes:
                    print(f"--- {node.name}\n{node.log.read_text()[-3000:]}")
                raise
            finally:
                with capsys.disabled():
                    print(
                        f"\n  {request.node.name}, seed {seed}, {time.monotonic() - begun:.0f} s:"
                        f"\n    {load.figures()}"
                    )

    return begin


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """What a module's attacks sent and what arrived; printed in the end."""
    with tallied(request.config) as tally:
        yield tally


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Three nodes, one etcd, and both networks."""
    with Lab(nodes=3, etcd=1) as lab:
        lab.start()
        create_networks(lab.nodes[0])
        yield lab


@pytest.fixture(scope="module")
def guests(lab: Lab) -> Iterator[list[Guest]]:
    """One container on every node, each on both networks."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(guest(node)) for node in lab.nodes]


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Figures to print when the test is over."""
    figures: list[str] = []
    yield figures
    with capsys.disabled():
        print(f"\n  {request.node.name}: {'; '.join(figures)}")


def under_way(load: Load, count: int = 5, within: float = PATIENCE) -> None:
    """From now on, every node of the load gives ``count`` more containers addresses."""
    now = time.monotonic()
    for node in load.nodes:
        eventually(lambda node=node: len(succeeded(load.adds(node, since=now))) >= count, within)


def check(node: LabNode) -> dict[str, Any]:
    """What `moorage ip check` says, asked on ``node``; empty if it cannot ask the store."""
    answer = node.cli("ip", "check", "-o", "json", check=False)
    return dict(json.loads(answer.stdout)) if answer.stdout.strip().startswith("{") else {}


def is_clean(node: LabNode, of: int) -> bool:
    """Whether `moorage ip check` heard ``of`` agents and found nothing."""
    report = check(node)
    return report.get("nodes_asked") == of and not report["findings"] and not report["nodes_silent"]


def clean_again(lab: Lab) -> None:
    """`moorage ip check` is clean within moments, and every agent says that all is well."""
    deadline = time.monotonic() + HEALED_WITHIN
    asking = lab.nodes[-1]
    while not is_clean(asking, of=len(lab.nodes)):
        assert time.monotonic() < deadline, f"not clean after {HEALED_WITHIN} s: {check(asking)}"
    for node in lab.nodes:
        eventually(lambda node=node: node.ask("status")["problem"] == "")


def nothing_is_left(node: LabNode) -> None:
    """Neither kernel nor IPAM hold anything of an endpoint any more, after moments."""
    eventually(lambda: node.ask("endpoint", "list") == [])
    eventually(lambda: links(node) == [])
    eventually(lambda: node.ask("status")["outbox"] == 0)
    eventually(lambda: containers_addresses(node) == [])
    assert node.ask("status")["conflicts"] == []


def containers_addresses(node: LabNode) -> list[str]:
    """Every assigned address but the nodes' own."""
    rows = node.ask("ip", "list", "--state", "assigned")
    return [row["address"] for row in rows if row["engine"] != NODE_ENGINE]


def refused_quickly(load: Load, node: LabNode, since: float) -> None:
    """The node has run out of warm addresses, says why, and lets nobody wait for more."""
    eventually(lambda: refused(load.adds(node, since)), NOTICED_WITHIN)
    noticed = time.monotonic()
    eventually(lambda: len(refused(load.adds(node, noticed))) >= 5)
    answers = load.adds(node, noticed)
    assert succeeded(answers) == []
    assert slowest(answers) < QUICKLY
    for call in answers:
        assert call.answer is not None
        assert "the store does not answer" in call.answer.json["msg"] or "sync" in call.answer.json["msg"]


def stored_for(node: LabNode, stays: Sequence[Stay]) -> None:
    """The store, asked on ``node``, has every one of these containers' addresses as theirs, after moments."""
    wanted = {(stay.ip, stay.node, stay.container.id) for stay in stays if stay.ip}

    def missing() -> set[tuple[str, str, str]]:
        rows = node.ask("ip", "list", "--state", "assigned")
        return wanted - {(row["address"], row["node"], row["container_id"]) for row in rows}

    deadline = time.monotonic() + HEALED_WITHIN
    while left := missing():
        assert time.monotonic() < deadline, f"not in the store: {left}"
