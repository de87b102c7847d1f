"""What the lab makes and deletes: one shape for namespaces, nodes, members, whole labs."""

from __future__ import annotations

import abc
from typing import Self


class Resource(abc.ABC):
    """Something of the lab. Its constructor only names it; as a context manager it is made and deleted.

    So a later command, which constructs the same again, finds what an earlier one has made.
    """

    @abc.abstractmethod
    def create(self) -> None:
        """Make it. What was made when this fails is for ``delete``."""

    @abc.abstractmethod
    def delete(self) -> None:
        """End and remove whatever there is of it; no error if that is nothing."""

    def __enter__(self) -> Self:
        try:
            self.create()
        except BaseException:
            self.delete()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.delete()
