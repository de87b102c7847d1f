"""What every test run ends with: what random histories saw, and the seeds that they were drawn from."""

from __future__ import annotations

import pytest

HISTORY = "history"
"""The property (``record_property``) in which a random history says what it was. A worker's output would be lost."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    said = [
        str(text)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, text in report.user_properties
        if name == HISTORY
    ]
    if said:
        terminalreporter.section("random histories")
    for text in said:
        terminalreporter.write_line(text)
