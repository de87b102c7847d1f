"""Errors of the CNI translation, with the codes of the CNI specification 1.1.0, section "Error"."""

from ipam.errors import MoorageError


class IncompatibleVersion(MoorageError):
    """The configuration names a cniVersion that moorage, or the command, does not know."""

    code = 1


class BadEnvironment(MoorageError):
    """CNI_* variables are missing or wrong; the message names all of them."""

    code = 4


class Undecodable(MoorageError):
    """stdin is no JSON object, or too large."""

    code = 6


class NotAvailable(MoorageError):
    """The answer to STATUS while an ADD could not work."""

    code = 50
