"""Errors of this node's networking; see ipam/errors.py for what every error promises."""

from ipam.errors import InvalidInput, MoorageError, TryAgain

__all__ = [
    "AgentBusy",
    "EndpointExists",
    "JournalCorrupt",
    "JournalUnwritable",
    "KernelRefused",
    "NamespaceGone",
    "NotANamespace",
    "NotAttached",
    "PortTaken",
    "Refused",
    "Superseded",
]


class NamespaceGone(MoorageError):
    """The namespace path does not exist (any more), or its process is dead."""

    code = 3


class NotANamespace(InvalidInput):
    """The path is no network namespace, or is the node's own."""

    code = 8


class EndpointExists(MoorageError):
    """A second ADD for an endpoint that is live."""

    code = 102


class Superseded(MoorageError):
    """An ADD that was asked for before a DEL of the same endpoint."""

    code = 103


class NotAttached(MoorageError):
    """CHECK of an endpoint that is not there, or not as it should be."""

    code = 104


class KernelRefused(MoorageError):
    """The kernel refused a netlink, nft or sysctl request.

    Attributes:
        errno: the kernel's error number.
    """

    code = 105

    def __init__(self, message: str, *, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class Refused(MoorageError):
    """What was asked for makes sense, but the network does not allow it."""

    code = 106


class PortTaken(MoorageError):
    """A port of the node that is to be mapped leads to another container, or the node itself listens there."""

    code = 107


class JournalUnwritable(TryAgain):
    """The journal cannot be written (disk full, read-only): nothing was changed in the kernel."""

    code = 11


class JournalCorrupt(MoorageError):
    """The journal file cannot be read as one."""

    code = 5


class AgentBusy(MoorageError):
    """Another agent already runs in this network namespace."""
