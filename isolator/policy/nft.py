"""libnftables in process: one context, kept, on the kernel thread.

A command costs about 0.1 ms this way; starting ``nft`` costs 4 ms. Only one ``run`` is one transaction,
and it is all or nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Protocol, cast

import nftables

from isolator.errors import KernelRefused

_ERRNO_BY_TEXT = {os.strerror(number): number for number in errno.errorcode}


class _Library(Protocol):
    """What we use of the binding, which has no types."""

    def cmd(self, cmdline: str) -> tuple[int, str, str]: ...


class Nft:
    """A libnftables context; its socket stays in the namespace it was made in."""

    def __init__(self) -> None:
        self._library = cast("_Library", nftables.Nftables())

    def run(self, commands: str, doing: str, where: str = "table inet moorage") -> str:
        """Carry out commands, one a line, in one transaction; what they print.

        doing, where: for the error: ``"admit mrgabc"``. Raises KernelRefused, and then nothing was changed.
        """
        code, output, words = self._library.cmd(commands)
        if code:
            raise _refusal(words, doing, where)
        return output


class DryNft:
    """The same for what is only to be tried: the kernel is asked whether it would take it, and nothing is changed.

    By the C library itself: the binding does not know of it (libnftables(3), nft_ctx_set_dry_run).
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libnftables.so.1")
        self._library.nft_ctx_new.restype = ctypes.c_void_p
        self._library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(self._library.nft_ctx_new(0))
        self._library.nft_ctx_set_dry_run(self._context, True)
        self._library.nft_ctx_buffer_error(self._context)

    def close(self) -> None:
        self._library.nft_ctx_free(self._context)

    def run(self, commands: str, doing: str) -> None:
        """Raises KernelRefused if it would be raised by ``Nft.run``."""
        if self._library.nft_run_cmd_from_buffer(self._context, commands.encode()):
            words: bytes = self._library.nft_ctx_get_error_buffer(self._context)
            raise _refusal(words.decode(errors="replace"), doing, "table inet moorage")


def _refusal(words: str, doing: str, where: str) -> KernelRefused:
    reason = words.partition("\n")[0].removeprefix("Error: ")
    number = _ERRNO_BY_TEXT.get(reason.rpartition(": ")[2], 0)
    return KernelRefused(f"could not {doing} in {where}: {reason}", errno=number)
