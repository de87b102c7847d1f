"""Secrets in files: read whenever they are needed, so that a new one counts at once; never in URLs, arguments, logs."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import NamedTuple

from ipam.errors import InvalidInput


class Login(NamedTuple):
    """A user and its password."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.user!r}, ...)"


def read_login(path: Path, whose: str) -> Login:
    """The one line ``user:password`` of a file that nobody else may read. Raises InvalidInput."""
    user, colon, password = read_secret(path, f"{whose}, as user:password").partition(":")
    if not (user and colon and password) or "\n" in password:
        raise InvalidInput(f"{path} holds no login of {whose}; write one line into it: user:password")
    return Login(user, password)


def read_secret(path: Path, whose: str) -> str:
    """The text of a file that nobody else may read, without the end of its last line. Raises InvalidInput."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"{path}, which holds a secret of {whose}, cannot be read ({error.strerror}); check the path and its "
            "permissions"
        ) from error
    if mode & 0o077:
        raise InvalidInput(f"{path} holds a password and has mode {mode:04o}; run: chmod 0600 {path}")
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path}, which holds a secret of {whose}, is no text; write one line into it"
        ) from error
