"""A node whose containers a containerd starts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moorage.lab import LabNode
from tests.engines.containerd import Containerd


@pytest.fixture
def node() -> Iterator[LabNode]:
    """A node whose agent serves the dual-stack network ``web``."""
    with LabNode("node") as node:
        node.start()
        node.cli(
            "network", "create", "web",
            "--pool", "10.64.0.0/16", "--pool", "fd64::/64",
            "--allow-netgroup", "*", "--allow-public", "--allow-static", "all",
        )  # fmt: skip
        yield node


@pytest.fixture
def containerd(node: LabNode) -> Iterator[Containerd]:
    with Containerd(node) as containerd:
        yield containerd
