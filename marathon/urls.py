"""URLs of services, as operators write them. Imports nothing that is large: every command reads the configuration."""

from __future__ import annotations

from urllib.parse import urlsplit

from ipam.errors import InvalidInput


def check_url(what: str, url: str) -> str:
    """A base URL without its last slash. Raises InvalidInput, never quoting what may be a password."""
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError as error:
        raise InvalidInput(
            f"{what} cannot be parsed ({error}); write for example http://192.0.2.10:8080"
        ) from error
    if "@" in parts.netloc:
        raise InvalidInput(
            f"{what} has a user in it, where `ps` and logs show the password; put user:password into a file of mode "
            "0600 and name that"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine:
        raise InvalidInput(f"{what} has to be like http://192.0.2.10:8080 or https://marathon.example:8443")
    if parts.query or parts.fragment:
        raise InvalidInput(f"{what} has to end with its host and port, or a path; remove what follows ? or #")
    return url.rstrip("/")
