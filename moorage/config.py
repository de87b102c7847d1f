"""Configuration: flags over ``MOORAGE_*`` environment over a TOML file over defaults.

    moorage agent --node a     MOORAGE_NODE=a     node = "a" in /etc/moorage/agent.toml     the host's name

One table, SETTINGS, says what can be set; everything else is refused by name, so that a typing mistake
is an error at start and not a default at work. The command line reads the same layers, and so uses the
store and socket of the agent it stands beside.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ipam.errors import InvalidInput
from ipam.keys import A_NODE_NAME, NODE_NAME
from ipam.pools import NAME
from marathon.urls import check_url
from moorage.log import masked

DEFAULT_FILE = Path("/etc/moorage/agent.toml")
DEFAULT_STORE = "sqlite:///var/lib/moorage/store.db"
DEFAULT_STATE_DIR = "/var/lib/moorage"
DEFAULT_SOCKET = "/run/moorage/agent.sock"
ENVIRONMENT = "MOORAGE_"
CONFIG_VARIABLE = ENVIRONMENT + "CONFIG"
"""Names the file itself, so it cannot stand in it."""

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("console", "json")
STORE_SCHEMES = ("sqlite", "etcd")

SOCKET_LIMIT = 103
"""Bytes: sockaddr_un.sun_path less its final NUL, unix(7), and less the four that a socket being made has more."""

INTERFACE_LIMIT = 15
"""Bytes: IFNAMSIZ less its final NUL, netdevice(7)."""


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """What an agent runs with; see docs/operator.md for each.

    node_given: whether somebody chose the node's name; else it is the host's, whether or not that may name a node.
    underlay: the interface towards other nodes, or an address or network of one; None takes the interface with the
    default route. vxlan_port: UDP.
    manage_docker_user: whether the agent may open Docker's chain DOCKER-USER for containers.
    default_network: what calls of net-modules mean that name no network, None for none.
    mesos_agent_url: of the Mesos agent on this node, None if it is not asked. mesos_credentials: a file with its login,
    mesos_ca: of its certificate's authority, None for none.
    """

    node: str
    node_given: bool
    store: str
    state_dir: Path
    socket: Path
    log_level: str
    log_format: str
    underlay: str | None
    vxlan_port: int
    gateway: bool
    manage_docker_user: bool
    default_network: str | None
    mesos_agent_url: str | None
    mesos_credentials: Path | None
    mesos_ca: Path | None


class _Wrong(ValueError):
    """What is expected instead, without the place; the caller knows that."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the configuration. default: text as a user would write it, None if there is none.

    kind: of TOML's values, which the file may have beside text.
    """

    key: str
    parse: Callable[[str], Any]
    default: Callable[[], str | None]
    kind: type = str


def _node(text: str) -> str:
    if not NODE_NAME.fullmatch(text):
        raise _Wrong(A_NODE_NAME)
    return text


def _store(text: str) -> str:
    try:
        url = urlsplit(text)
        secret = "@" in url.netloc
    except ValueError as error:
        raise _Wrong(f"a store URL such as {DEFAULT_STORE} ({error})") from None
    if url.scheme not in STORE_SCHEMES:
        raise _Wrong(f"a store URL such as {DEFAULT_STORE}")
    if secret:
        raise _Wrong("a store URL without user and password: others can read command lines and environments")
    return text


def _directory(text: str) -> Path:
    if not text.startswith("/") or "\0" in text:
        raise _Wrong("an absolute path of a directory")
    return Path(text)


def _socket(text: str) -> Path:
    if not text.startswith("/") or "\0" in text or len(os.fsencode(text)) > SOCKET_LIMIT:
        raise _Wrong(f"an absolute path of at most {SOCKET_LIMIT} bytes")
    return Path(text)


def _underlay(text: str) -> str:
    if "/" in text or ":" in text:
        try:
            return str(ip_network(text, strict=False))
        except ValueError as error:
            raise _Wrong(f"an interface, such as eth0, or an address or network of one ({error})") from None
    if not 0 < len(os.fsencode(text)) <= INTERFACE_LIMIT or re.search(r"[\s\0]", text):
        raise _Wrong("an interface, such as eth0, or an address or network of one, such as 192.0.2.0/24")
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise _Wrong("a port number, 1 to 65535")
    return int(text)


def _network(text: str) -> str:
    if not NAME.fullmatch(text):
        raise _Wrong("the name of a network, as `moorage network list` has it")
    return text


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise _Wrong("true or false")
    return text == "true"


def _http(text: str) -> str:
    try:
        return check_url("it", text)
    except InvalidInput as error:
        raise _Wrong(f"the URL of the Mesos agent, such as http://192.0.2.10:5051 ({error})") from None


def _file(text: str) -> Path:
    if not text.startswith("/") or "\0" in text:
        raise _Wrong("an absolute path of a file")
    return Path(text)


def _one_of(*known: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise _Wrong(f"one of {', '.join(known)}")
        return text

    return parse


def hostname() -> str:
    """The host's name, in lower case; what is no UTF-8 in it is question marks."""
    return socket.gethostname().encode(errors="replace").decode().lower()


SETTINGS = (
    Setting("node", _node, hostname),
    Setting("store", _store, lambda: DEFAULT_STORE),
    Setting("state_dir", _directory, lambda: DEFAULT_STATE_DIR),
    Setting("socket", _socket, lambda: DEFAULT_SOCKET),
    Setting("log_level", _one_of(*LOG_LEVELS), lambda: "info"),
    Setting("log_format", _one_of(*LOG_FORMATS), lambda: "console"),
    Setting("underlay", _underlay, lambda: None),
    Setting("vxlan_port", _port, lambda: "4789", int),
    Setting("gateway", _switch, lambda: "false", bool),
    Setting("manage_docker_user", _switch, lambda: "true", bool),
    Setting("default_network", _network, lambda: None),
    Setting("mesos_agent_url", _http, lambda: None),
    Setting("mesos_credentials", _file, lambda: None),
    Setting("mesos_ca", _file, lambda: None),
)
KEYS = tuple(setting.key for setting in SETTINGS)
TABLES = ("mesos",)
"""Tables of the file; their keys are those that begin with the table's name."""


def load(
    flags: Mapping[str, str | None] | None = None,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> AgentConfig:
    """The configuration from all layers.

    flags: key -> text, None for those not given. environ: os.environ unless given. file: must exist if
    given; without it MOORAGE_CONFIG names one that must exist, else DEFAULT_FILE may.

    Raises InvalidInput naming the place, the key and what is expected.
    """
    flags = flags or {}
    environ = os.environ if environ is None else environ
    from_environment = _read_environment(environ)
    named = file or (Path(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else None)
    path = named or DEFAULT_FILE
    from_file = _read_file(path, must_exist=named is not None)

    values: dict[str, Any] = {
        "node_given": flags.get("node") is not None or "node" in from_environment or "node" in from_file
    }
    for setting in SETTINGS:
        key = setting.key
        if (given := flags.get(key)) is not None:
            place, text = "--" + key.replace("_", "-"), given
        elif key in from_environment:
            place, text = ENVIRONMENT + key.upper(), from_environment[key]
        elif key in from_file:
            place, text = f"{path}: {key}", from_file[key]
        else:
            default = setting.default()
            if default is None:
                values[key] = None
                continue
            place, text = f"the default of {key}", default
            if key == "node":
                # A node that has a name needs no other; isolator/node_name.py refuses it for one that has none.
                values[key] = text
                continue
        values[key] = _parse(setting, place, text)
    return AgentConfig(**values)


def _parse(setting: Setting, place: str, text: Any) -> Any:
    if not isinstance(text, str) and type(text) is setting.kind:
        text = str(text).lower()
    if not isinstance(text, str):
        raise InvalidInput(f"{place}: expected text in quotes, not {text!r}")
    try:
        return setting.parse(text)
    except _Wrong as wrong:
        raise InvalidInput(f"{place}: expected {wrong}, not {masked(repr(text))}") from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """key -> text of all MOORAGE_* variables; empty ones count as not set."""
    known = {ENVIRONMENT + key.upper(): key for key in KEYS}
    found = {name for name, text in environ.items() if name.startswith(ENVIRONMENT) and text}
    if unknown := sorted(found - known.keys() - {CONFIG_VARIABLE}):
        raise InvalidInput(
            _unknown("the environment variable", unknown[0], [*known, CONFIG_VARIABLE])
            + "; correct it or unset it"
        )
    return {known[name]: environ[name] for name in found & known.keys()}


def _read_file(path: Path, *, must_exist: bool) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if must_exist:
            raise InvalidInput(f"{path}: there is no such file; write it, or name another") from None
        return {}
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}; run as root, or allow it") from error
    try:
        settings = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f'{path}: not valid TOML: {error}; write lines such as node = "a"') from error
    for table in TABLES:
        inside = settings.pop(table, {})
        if not isinstance(inside, dict):
            raise InvalidInput(f"{path}: {table} is a table; write [{table}] and its keys below it")
        settings |= {f"{table}_{key}": value for key, value in inside.items()}
    if unknown := sorted(settings.keys() - set(KEYS)):
        raise InvalidInput(f"{path}: {_unknown('the key', unknown[0], KEYS)}; correct it or remove it")
    return settings


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    advice = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    return f"{what} {name} is unknown ({advice})"
