"""How random histories are drawn.

``HISTORY_SEED=N`` has the same steps drawn again; what comes of them also depends on the machine. ``HISTORY_LENGTH=N``
makes histories so many times as long. See ``make histories``.
"""

from __future__ import annotations

import os
import random

LENGTH = float(os.environ.get("HISTORY_LENGTH") or 1)


def seed() -> int:
    """The one that was asked for, else another one every time."""
    return int(os.environ.get("HISTORY_SEED") or random.randrange(1 << 32))
