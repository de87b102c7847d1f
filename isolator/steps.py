"""The named steps of ADD and DEL, and of allocating before an ADD and releasing before a DEL, as they happen.

Crash tests replace ``reached`` by something that kills the agent at one of them; in production it does
nothing. The names are also those of the design (docs/architecture.md), so a test says where it cut.
"""

from __future__ import annotations

from collections.abc import Callable

ATTACH = (
    "attach:begun",
    "attach:lent",
    "attach:journalled",
    "attach:admitted",
    "attach:wired",
    "attach:attached",
)
ALLOCATE = ("allocate:begun", "allocate:lent", "allocate:journalled")
RELEASE = ("release:begun", "release:journalled")
DETACH = ("detach:begun", "detach:journalled", "detach:withdrawn", "detach:removed", "detach:released")


def _nothing(_: str) -> None:
    pass


observer: Callable[[str], None] = _nothing


def reached(step: str) -> None:
    """The agent is at ``step``, one of those above; any thread."""
    observer(step)
