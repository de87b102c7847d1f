"""What IPAM needs of the node's journal. The journal itself is isolator/journal.py.

Every call is synchronous. Writes raise a TryAgain (isolator.errors.JournalUnwritable) when the disk
does not take them, and then changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from ipam.keys import IPAddress, IPNetwork
from ipam.records import Address


@dataclass(frozen=True, slots=True)
class AddressRow:
    """An address of this node.

    record: what should stand in the store. revision: the mod_revision known to stand there.
    dirty: the store has not confirmed the record yet; all such rows together are the outbox.
    """

    ip: IPAddress
    record: Address
    revision: int
    dirty: bool


@dataclass(frozen=True, slots=True)
class BlockRow:
    """A block that this node has claimed."""

    block: IPNetwork
    pool: str
    revision: int


class Journal(Protocol):
    """See the module's docstring."""

    def transaction(self) -> AbstractContextManager[None]:
        """Joins the writes inside it into one commit; nests."""
        ...

    def load_addresses(self) -> list[AddressRow]: ...

    def load_blocks(self) -> list[BlockRow]: ...

    def save_addresses(self, rows: Iterable[AddressRow]) -> None: ...

    def drop_addresses(self, ips: Iterable[IPAddress]) -> None: ...

    def save_block(self, row: BlockRow) -> None: ...

    def drop_block(self, block: IPNetwork) -> None: ...

    def load_known(self) -> bytes | None: ...

    def save_known(self, known: bytes) -> None: ...

    def load_grace(self) -> bytes | None: ...

    def save_grace(self, kept: bytes | None) -> None: ...

    @property
    def confirmed_seq(self) -> int:
        """The last write of this node that the store confirmed, 0 if none is known."""
        ...

    def save_confirmed_seq(self, seq: int) -> None: ...

    @property
    def unconfirmed(self) -> int:
        """How many writes of this node the store may have confirmed at most since ``confirmed_seq`` was saved."""
        ...

    def note_attempt(self) -> None:
        """The fence is about to be claimed, which may move it; forgotten with the next ``save_confirmed_seq``."""
        ...

    @property
    def drained(self) -> bool:
        """Whether the node is drained; ipam/drain.py."""
        ...

    def save_drained(self, drained: bool) -> None: ...

    @property
    def is_of_this_boot(self) -> bool:
        """Whether what was loaded had been in agreement with the store since the machine booted."""
        ...

    def own_boot(self) -> None:
        """Store and journal agree: what it holds is of this boot from now on."""
        ...

    async def make_durable(self) -> None:
        """What was committed so far survives a power failure from now on. Raises TryAgain."""
        ...
