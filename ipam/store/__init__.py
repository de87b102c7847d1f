"""The store, by its URL: ``store = await open_store("sqlite:///var/lib/moorage/store.db")``.

The interface and its contract are in base.py; callers import everything they need from here.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from ipam.errors import InvalidInput, NotFound
from ipam.store.base import (
    MAX_OPS,
    Compare,
    Delete,
    Event,
    Get,
    KeyValue,
    Lease,
    Op,
    OpResult,
    Page,
    Put,
    Store,
    Txn,
    TxnResult,
    WatchBatch,
    absent,
    none_between,
    pages,
    prefix_end,
    read_prefix,
    read_range,
    scan,
    unchanged,
)
from ipam.store.certificates import ending_files
from ipam.store.etcd_url import SCHEME, parse
from ipam.store.sqlite import SqliteStore
from ipam.store.sqlite_file import exists
from ipam.supervision import Supervision

__all__ = [
    "MAX_OPS",
    "Compare",
    "Delete",
    "Event",
    "Get",
    "KeyValue",
    "Lease",
    "Op",
    "OpResult",
    "Page",
    "Put",
    "Store",
    "Txn",
    "TxnResult",
    "WatchBatch",
    "absent",
    "ending_certificates",
    "endpoints",
    "none_between",
    "open_store",
    "pages",
    "prefix_end",
    "read_prefix",
    "read_range",
    "scan",
    "unchanged",
]

FORMS = "sqlite:///path/to/store.db (one node) or etcd://host:2379,host:2379 (a cluster)"
"""What a store URL may look like, for messages."""


async def open_store(url: str, *, create: bool = True, supervision: Supervision | None = None) -> Store:
    """Open the store a URL names; a SQLite file is made if there is none and ``create`` is set.

    supervision: of the store's own tasks; without, who opens it does not hear of what they raise.

    An etcd need not be reachable yet: the first call says if it is not.

    Raises InvalidInput (the URL), NotFound (no file, and not to be made), StoreError (what is there is no
    store of ours), StoreUnavailable.
    """
    if url.startswith(SCHEME):
        # Imported only now: grpcio costs 25 MB, which an agent of a single node need not pay.
        from ipam.store.etcd import EtcdStore

        return await EtcdStore.open(url, supervision)
    try:
        scheme = urlsplit(url).scheme
    except ValueError as error:
        raise InvalidInput(f"the store URL cannot be parsed ({error}); it has the form {FORMS}") from error
    match scheme:
        case "sqlite":
            path = sqlite_path(url)
            if not create and not exists(path):
                raise NotFound(
                    f"there is no store at {path}; `moorage network create` or the agent makes it, "
                    "or name another with --store"
                )
            return await SqliteStore.open(path, supervision)
        case "":
            raise InvalidInput(f"the store URL {url!r} has no scheme; it has the form {FORMS}")
        case _:
            raise InvalidInput(f"the store URL has the unknown scheme {scheme!r}; it has the form {FORMS}")


def endpoints(url: str) -> tuple[tuple[str, int], ...]:
    """(name or IP, TCP port) of each server that a store URL names; () of a file. Raises InvalidInput."""
    if not url.startswith(SCHEME):
        return ()
    return tuple((address.host, address.port) for address in parse(url).addresses)


def ending_certificates(url: str) -> list[str]:
    """A sentence for each certificate that a store URL names and that ends soon. Raises InvalidInput."""
    return ending_files(parse(url)) if url.startswith(SCHEME) else []


def sqlite_path(url: str) -> Path:
    """The file that a sqlite URL names. Raises InvalidInput."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path.startswith("/") or path.endswith("/"):
        raise InvalidInput(
            f"the store URL {url!r} names no file: after sqlite:// comes an absolute path and nothing else, "
            "as in sqlite:///var/lib/moorage/store.db"
        )
    if "\0" in path:
        raise InvalidInput("the store URL names a file with a zero byte; use another path")
    return Path(path)
