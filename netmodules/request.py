"""What the socket server gives to a handler and what it wants back; frames decoded into typed values."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from isolator.model import Asked

_REQUEST_ID = re.compile(rb"[0-9a-f]{32}", re.ASCII)
_BOOT_ID = re.compile(rb"[0-9a-f-]{1,64}", re.ASCII)
_DECIMAL = re.compile(rb"[0-9]{1,19}", re.ASCII)


UNDOABLE = {
    ("cni", "ADD"),
    ("netmodules", "allocate"),
    ("netmodules", "reserve"),
    ("netmodules", "isolate"),
}
"""Of calls and their commands, those that give somebody something."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call of a hook.

    call: which handler is meant, "cni", "netmodules" or "admin".
    request_id: 32 hex digits, the same on every try of one call.
    env: the caller's CNI_* variables, or what else its hook says.
    """

    call: str
    request_id: str
    asked: Asked
    env: Mapping[str, str]
    stdin: bytes

    @property
    def undoable(self) -> bool:
        """Whether the call leaves something behind that nobody owns if its caller is gone, as an ADD does."""
        return (self.call, self.command) in UNDOABLE

    @property
    def command(self) -> str:
        """Which of its handler's commands it is."""
        return self.env.get("CNI_COMMAND", self.env.get("NETMODULES_COMMAND", self.call))

    def names(self) -> dict[str, str]:
        """What a log line says of it."""
        return {
            "command": self.command,
            "container_id": self.env.get("CNI_CONTAINERID", ""),
            "ifname": self.env.get("CNI_IFNAME", ""),
            "request": self.request_id,
        }


@dataclass(frozen=True, slots=True)
class Reply:
    """What the hook exits with and prints."""

    exit: int
    stdout: bytes = b""


Handler: TypeAlias = Callable[[Request], Awaitable[Reply]]


def parse_request(fields: Mapping[str, bytes]) -> Request:
    """The request in a frame's fields. Raises ValueError saying which field is missing or wrong."""
    return Request(
        call=_field(fields, "call", re.compile(rb"[a-z]{1,32}")),
        request_id=_field(fields, "request", _REQUEST_ID),
        asked=Asked(boot_id=_field(fields, "boot", _BOOT_ID), at=int(_field(fields, "started", _DECIMAL))),
        env={
            name[4:]: value.decode("utf-8", "surrogateescape")
            for name, value in fields.items()
            if name.startswith("env.")
        },
        stdin=fields.get("stdin", b""),
    )


def refusal(code: int, message: str, *, details: str = "", version: str = "0.2.0") -> Reply:
    """A CNI error; ``details`` only if there are any, because Mesos shows all of it to its user."""
    body: dict[str, str | int] = {"cniVersion": version, "code": code, "msg": _printable(message)}
    if details:
        body["details"] = _printable(details)
    return Reply(1, msgspec.json.encode(body))


def _field(fields: Mapping[str, bytes], name: str, pattern: re.Pattern[bytes]) -> str:
    value = fields.get(name, b"")
    if pattern.fullmatch(value) is None:
        raise ValueError(f"field {name!r} is {value[:80]!r}")
    return value.decode()


def _printable(text: str) -> str:
    """Undecodable bytes of the environment arrive as lone surrogates, which JSON cannot carry."""
    return text.encode("utf-8", "backslashreplace").decode()
