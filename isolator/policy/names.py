"""Names of sets and chains. Netgroups come from users and other nodes: never a letter of them is rule text.

A name is what a reader needs to recognise, made of harmless characters only, and a hash that tells apart what
looks alike then. Pure.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence

_HARMFUL = re.compile(r"[^A-Za-z0-9_]")
_VISIBLE = 40


def set_of_netgroup(netgroup: str, family: int) -> str:
    """The set of a netgroup's members.

    >>> set_of_netgroup("web", 4)
    'netgroup4_web_5avdhfgsnrpw'
    """
    return f"netgroup{family}_{_visible(netgroup)}_{_hash([netgroup])}"


def chain_of_callers(clauses: Sequence[object]) -> str:
    """The chain of endpoints with the same callers, by what names their clauses have."""
    words = [repr(clause) for clause in clauses]
    readable = "_".join(str(getattr(clause, "netgroup", "")) for clause in clauses).strip("_")
    return f"callers_{_visible(readable)}_{_hash(words)}"


def _visible(text: str) -> str:
    return _HARMFUL.sub("_", text)[:_VISIBLE] or "none"


def _hash(parts: Sequence[str]) -> str:
    """60 bits. Lengths go in too, so that no two lists run into the same bytes."""
    digest = hashlib.blake2s(digest_size=10)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(4, "big") + raw)
    return base64.b32encode(digest.digest())[:12].decode().lower()
