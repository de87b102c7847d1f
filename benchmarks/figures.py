"""What was measured, beside its budget: samples, rows, and the table and JSON made of them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """Measured values, in the unit of their row."""

    values: Sequence[float]

    @property
    def p50(self) -> float:
        return statistics.median(self.values)

    @property
    def p10(self) -> float:
        return self._decile(0)

    @property
    def p90(self) -> float:
        return self._decile(8)

    def _decile(self, which: int) -> float:
        if len(self.values) < 2:
            return self.p50
        return statistics.quantiles(self.values, n=10, method="inclusive")[which]

    def text(self, unit: str) -> str:
        """``9.71 ms (9.1-11.4)``; without the range if there is only one value."""
        words = f"{_digits(self.p50)} {unit}"
        return words if len(self.values) < 2 else f"{words} ({_digits(self.p10)}-{_digits(self.p90)})"

    def as_json(self) -> dict[str, float]:
        return {"p10": self.p10, "p50": self.p50, "p90": self.p90, "count": len(self.values)}


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit from docs/design.md, section 11. of_peer: for the ratio to the peer, not for our own value."""

    limit: float
    of_peer: bool = True
    at_least: bool = False

    def text(self, unit: str) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{sign} {self.limit:g}{'x' if self.of_peer else ' ' + unit}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Ratio and budget are about medians."""

    what: str
    unit: str
    ours: Sample
    peer: Sample | None = None
    budget: Budget | None = None

    @property
    def ratio(self) -> float | None:
        return self.ours.p50 / self.peer.p50 if self.peer is not None else None

    @property
    def met(self) -> bool | None:
        """Whether the budget is met; None if there is none."""
        value = self.ratio if self.budget is not None and self.budget.of_peer else self.ours.p50
        if self.budget is None or value is None:
            return None
        return value >= self.budget.limit if self.budget.at_least else value <= self.budget.limit

    def cells(self) -> tuple[str, ...]:
        return (
            self.what,
            self.ours.text(self.unit),
            self.peer.text(self.unit) if self.peer is not None else "",
            f"{self.ratio:.2f}x" if self.ratio is not None else "",
            self.budget.text(self.unit) if self.budget is not None else "",
            {True: "yes", False: "NO", None: ""}[self.met],
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours.as_json(),
            "peer": self.peer.as_json() if self.peer is not None else None,
            "ratio": self.ratio,
            "budget": self.budget.text(self.unit) if self.budget is not None else None,
            "met": self.met,
        }


HEADINGS = ("what", "ours p50 (p10-p90)", "peer p50 (p10-p90)", "ratio", "budget", "met")


def table(rows: Sequence[Row]) -> str:
    """The rows in columns, as Markdown, so that it can be pasted into docs/benchmarks.md."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
