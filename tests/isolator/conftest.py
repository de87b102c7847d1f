"""A node and containers, each a network namespace of this test alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.isolator.rooms import Machine, Room

MakeRoom = Callable[[], Room]


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A node with an uplink to a world."""
    with Machine() as machine:
        yield machine


@pytest.fixture
def make_container() -> Iterator[MakeRoom]:
    """Makes containers: network namespaces with nothing in them."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Room("container"))


@pytest.fixture
def container(make_container: MakeRoom) -> Room:
    """One container."""
    return make_container()
