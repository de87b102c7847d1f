"""What goes wrong with a lab itself."""

from __future__ import annotations

from pathlib import Path

from ipam.errors import MoorageError

SHOWN = 4000
"""Characters of a log that go with an error."""


class LabError(MoorageError):
    """A part of the lab did not do what it has to."""


def with_log(sentence: str, log: Path) -> LabError:
    """An error that quotes the last line of a process's log, and has the end of it as a note for tracebacks."""
    text = log.read_text(errors="replace").strip()[-SHOWN:] if log.exists() else ""
    last = text.splitlines()[-1] if text else "nothing"
    error = LabError(f"{sentence}; the last it logged: {last}", details=text)
    error.add_note(text)
    return error
