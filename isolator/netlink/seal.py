"""What the alias of a link of ours says, and that it was said here.

    moorage mrg0a1b2c3d4 Xh2k...  {"a":["c1","eth0"],...}
            its own name seal     what there is to say of it (isolator/written.py)

A container that has CAP_NET_ADMIN can move an interface of its making into the node's namespace, alias and all. So
nothing is believed that is not sealed with this node's key for this very pair: a copy on another pair, or on the same
indexes in another namespace, says nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from typing import NamedTuple

from isolator.netlink.messages import ENDPOINT_PREFIX

_MARK = "moorage "
"""What the aliases of our links begin with. Others rename links, hardly their aliases."""
_SEAL = 12
"""Characters, of six bits."""
MOST_SAID = 255 - len(_MARK) - 15 - 1 - _SEAL - 1
"""Bytes that an alias (IFALIASZ) has for what there is to say: behind the mark, a name (IFNAMSIZ) and the seal."""


class Ends(NamedTuple):
    """What tells a pair from every other: the index of its end here, and index and namespace of the other one, as in
    inventory.HostLink."""

    here: int
    peer: int
    peer_namespace: int | None


class Seal:
    """Writes and reads aliases. key: this node's, up to 64 bytes."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def write(self, ends: Ends, name: str, said: str = "") -> str:
        """The alias of the link that is called ``name`` by us. said: at most MOST_SAID bytes."""
        return f"{_MARK}{name} {self._seal(ends, name, said)} {said}".rstrip()

    def read(self, ends: Ends, alias: str) -> tuple[str, str]:
        """The link's own name, and what else was said of it; "" and "" if that was not said here."""
        if not alias.startswith(_MARK):
            return "", ""
        name, _, rest = alias.removeprefix(_MARK).partition(" ")
        seal, _, said = rest.partition(" ")
        right = self._seal(ends, name, said)
        return (name, said) if hmac.compare_digest(seal.encode(), right.encode()) else ("", "")

    def _seal(self, ends: Ends, name: str, said: str) -> str:
        text = repr((*ends, name, said)).encode()
        digest = hashlib.blake2b(text, key=self._key, digest_size=_SEAL * 6 // 8).digest()
        return base64.urlsafe_b64encode(digest).decode()


def claimed(alias: str) -> str:
    """The own name that an alias claims, whoever wrote it; "" if none of ours."""
    name = alias.removeprefix(_MARK).partition(" ")[0]
    return name if alias.startswith(_MARK) and name.startswith(ENDPOINT_PREFIX) else ""
