"""Errors of moorage, from the bottom package up.

Every error is one sentence that names the thing, the cause and the next step, and knows the code that
a CNI caller is given. Codes below 100 are the CNI specification's (spec 1.1.0, "Error"); from 100 up
they are ours and listed in docs/errors.md.
"""

from typing import ClassVar

ANEW = "with --state-dir /var/lib/moorage/NEWNAME"
"""For sentences about an agent that needs a state directory of its own. Its unit lets it write nowhere else than below
/var/lib/moorage."""


class MoorageError(Exception):
    """Anything moorage refuses or could not do; ``str()`` is what the user reads."""

    code: ClassVar[int] = 100

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class InvalidInput(MoorageError):
    """What the caller asked for makes no sense or is not allowed; asking again will not help."""

    code = 7


class TryAgain(MoorageError):
    """It could not be done now and may work later; nothing was changed."""

    code = 11


class StoreError(MoorageError):
    """The store refused the request or holds something that cannot be read."""

    code = 5


class RequestTooLarge(StoreError):
    """The store takes no transaction of that many bytes; nothing was applied."""


class StoreUnavailable(StoreError, TryAgain):
    """The store did not answer, and the request is known not to have been applied."""

    code = 11


class Ambiguous(StoreUnavailable):
    """The store did not answer, and the transaction may still land (docs/design.md, section 4)."""


class Compacted(StoreError):
    """The revision asked for is gone: list again, then watch from the new revision.

    Attributes:
        compact_revision: the oldest revision that can still be read or watched.
    """

    def __init__(self, message: str, compact_revision: int) -> None:
        super().__init__(message)
        self.compact_revision = compact_revision


class NotFound(InvalidInput):
    """A network, pool, reservation or address that does not exist."""


class AlreadyExists(InvalidInput):
    """A network, pool or reservation that exists already, or overlaps one that does."""


class AddressTaken(MoorageError):
    """A requested static address belongs to somebody else."""

    code = 101


class NotAllocated(InvalidInput):
    """An address that is to be used was not allocated before, or not for who wants to use it."""


class Exhausted(TryAgain):
    """No address is left; the message lists who holds what."""


class Fenced(TryAgain):
    """This node's writer key is gone or another's: somebody removed or adopted the node."""


class Overtaken(TryAgain):
    """Who acts is not in charge any more: another one took over. Nothing was changed."""
