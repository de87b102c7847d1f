"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# One example may take its time: a busy machine stands still for longer than any deadline that would say something.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
