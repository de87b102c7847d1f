"""What an etcd URL says, and the files it names. Knows nothing of gRPC, so a URL is checked cheaply.

    etcd://10.0.0.1:2379,etcd-2.example:2379,[fd00::3]:2379?ca=/etc/moorage/ca.pem&prefix=/moorage

| option | is |
|---|---|
| ``ca`` | the certificate authority (PEM) that signed the members' certificates; it turns TLS on |
| ``cert``, ``key`` | the client's certificate and key (PEM), for mutual TLS; both or none, and only with ``ca`` |
| ``user-file`` | a file of mode 0600 with one line, ``user:password``; never in the URL, which `ps` and logs show |
| ``prefix`` | where moorage's keys are, default ``/moorage``; two clusters may share one etcd under two prefixes |

The files are read again for each new connection and each login, so they can be rotated under a running agent.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

from ipam.errors import InvalidInput
from ipam.logins import Login, read_login

SCHEME = "etcd://"
DEFAULT_PORT = 2379
DEFAULT_PREFIX = "/moorage"
OPTIONS = ("ca", "cert", "key", "user-file", "prefix")
EXAMPLE = "etcd://10.0.0.1:2379,10.0.0.2:2379?ca=/etc/moorage/ca.pem"

_ENDPOINT = re.compile(r"(?:\[(?P<v6>[^][]*)\]|(?P<host>[^:]*))(?::(?P<port>.*))?")
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a member listens. ``host`` is a name or an IP, an IPv6 one without its brackets."""

    host: str
    port: int

    @property
    def family(self) -> int:
        """4 or 6 for an IP, 0 for a name."""
        try:
            return ipaddress.ip_address(self.host).version
        except ValueError:
            return 0

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.family == 6 else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class EtcdUrl:
    """A parsed URL. ``prefix`` has no slash at its end."""

    addresses: tuple[Address, ...]
    prefix: str = DEFAULT_PREFIX
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user_file: Path | None = None


class Certificates(NamedTuple):
    """PEM texts for TLS; ``cert`` and ``key`` only for mutual TLS."""

    ca: bytes
    cert: bytes | None
    key: bytes | None

    def __repr__(self) -> str:
        return "Certificates(...)"


def parse(url: str) -> EtcdUrl:
    """Raises InvalidInput, never quoting the part that may hold a password."""
    # Not urlsplit: what it thinks of brackets in a list of hosts differs between versions of Python.
    rest = url.removeprefix(SCHEME)
    if rest == url:
        raise InvalidInput(f"the store URL is no etcd URL; it looks like {EXAMPLE}")
    if "#" in rest:
        raise InvalidInput(
            f"the etcd URL has a fragment (#...), which means nothing; it looks like {EXAMPLE}"
        )
    hosts, _, query = rest.partition("?")
    if "@" in hosts:
        raise InvalidInput(
            "the etcd URL has a user in it, where `ps` and logs show the password; put user:password into "
            "a file of mode 0600 and name that: ?user-file=/etc/moorage/etcd-user"
        )
    hosts, _, path = hosts.partition("/")
    if path:
        raise InvalidInput(f"the etcd URL has the path /{path}; keys go below ?prefix=/{path}")
    options = _options(query)
    return EtcdUrl(
        tuple(_address(host) for host in hosts.split(",")),
        _prefix(options.get("prefix", DEFAULT_PREFIX)),
        **_files(options),
    )


def certificates(url: EtcdUrl) -> Certificates | None:
    """The URL's certificates as they are now, None without TLS. Raises InvalidInput."""
    if url.ca is None:
        return None
    return Certificates(
        _read(url.ca, "ca"),
        _read(url.cert, "cert") if url.cert else None,
        _read(url.key, "key") if url.key else None,
    )


def login(url: EtcdUrl) -> Login | None:
    """The user and password as they are now, None without a user file. Raises InvalidInput."""
    if (path := url.user_file) is None:
        return None
    _read(path, "user-file")
    return read_login(path, "etcd")


def _options(query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise InvalidInput(
            f"the options of the etcd URL, after the ?, are not name=value&name=value; it looks like {EXAMPLE}"
        ) from error
    options: dict[str, str] = {}
    for name, value in pairs:
        if name not in OPTIONS:
            raise InvalidInput(
                f"the etcd URL has the unknown option {name!r}; there are {', '.join(OPTIONS)}"
            )
        if name in options:
            raise InvalidInput(f"the etcd URL has the option {name} twice; keep one")
        if not value:
            raise InvalidInput(f"the option {name} of the etcd URL has no value; give it one or leave it out")
        options[name] = value
    return options


def _files(options: dict[str, str]) -> dict[str, Path]:
    """Of the options that name files, by the field they go to."""
    files = {name: Path(options[name]) for name in ("ca", "cert", "key", "user-file") if name in options}
    for name, path in files.items():
        if not path.is_absolute() or "\0" in options[name]:
            raise InvalidInput(f"the option {name} of the etcd URL has to be an absolute path")
    if ("cert" in files) != ("key" in files):
        raise InvalidInput("the options cert and key of the etcd URL belong together; give both or none")
    if "cert" in files and "ca" not in files:
        raise InvalidInput("the etcd URL has a client certificate but no ca, which turns TLS on; add ca=PATH")
    return {name.replace("-", "_"): path for name, path in files.items()}


def _address(text: str) -> Address:
    found = _ENDPOINT.fullmatch(text)
    if not found or not (_is_v6(found["v6"]) if found["host"] is None else _NAME.fullmatch(found["host"])):
        raise InvalidInput(
            f"the etcd URL has the endpoint {text!r}, which is neither name:port, IPv4:port nor [IPv6]:port; "
            f"it looks like {EXAMPLE}"
        )
    port = str(DEFAULT_PORT) if found["port"] is None else found["port"]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidInput(f"the endpoint {text!r} of the etcd URL has no port between 1 and 65535")
    return Address(found["v6"] or found["host"], int(port))


def _is_v6(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _prefix(text: str) -> str:
    prefix = text.rstrip("/")
    if not prefix.startswith("/") or not prefix.isascii() or not prefix.isprintable():
        raise InvalidInput(
            f"the prefix {text!r} of the etcd URL has to be printable ASCII and start with a slash, "
            f"as in {DEFAULT_PREFIX}"
        )
    return prefix


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"{path}, which the etcd URL names as {option}, cannot be read ({error.strerror}); "
            "check the path and its permissions"
        ) from error
