"""The key that seals what this node says on its interfaces (isolator/netlink/seal.py).

In a file of its own beside the journal, because it is needed most when the journal is lost. When it is lost itself,
aliases say nothing until the agent has written them anew, and the store's records alone tell what an interface is.
"""

from __future__ import annotations

import os
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

NAME = "alias.key"

SIZE = 32
"""Bytes."""


def alias_key(state_dir: Path) -> bytes:
    """The state directory's key, made now if it has none."""
    path = state_dir / NAME
    try:
        key = path.read_bytes()
        if len(key) == SIZE:
            return key
        log.warning("the key of interfaces' aliases is damaged; it is made anew", path=str(path))
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("the key of interfaces' aliases cannot be read; it is made anew", why=str(error))
    key = os.urandom(SIZE)
    try:
        _write(path, key)
    except OSError as error:
        log.warning(
            "the key of interfaces' aliases is not kept; the next start makes another", why=str(error)
        )
    return key


def _write(path: Path, key: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = path.with_name(f"{path.name}.new")
    made.unlink(missing_ok=True)
    with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    made.replace(path)
