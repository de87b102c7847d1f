"""Errors of the CNI translation, with the codes of the CNI specification 1.1.0, section "Error"."""

from ipam.errors import MoorageError


class IncompatibleVersion(MoorageError):
    """The configuration names a cniVersion that moorage, or the command, does not know."""

    code = 1


class UnsupportedField(MoorageError):
    """The runtime passes on what moorage has no way to serve; the message has the field and its value."""

    code = 2


class BadEnvironment(MoorageError):
    """CNI_* variables are missing or wrong; the message names all of them."""

    code = 4


class Undecodable(MoorageError):
    """stdin is no JSON object, or too large."""

    code = 6


class NotAvailable(MoorageError):
    """The answer to STATUS while an ADD could not work."""

    code = 50


class LimitedConnectivity(MoorageError):
    """The answer to STATUS while an ADD could not work and containers that run may be cut off."""

    code = 51
