"""What checkpoints need of a world of processes."""

from __future__ import annotations

from typing import Any, Protocol


class Ranks(Protocol):
    """As `parallel.world.World` has it."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def num_writers(self) -> int:
        """The first so many ranks write; they hold all that there is, once or several times."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""

    def first_error(self, error: Exception | None) -> Exception | None:
        """The error of the first rank that has one, on every rank."""


class OneRank:
    """A world of one."""

    rank = 0
    size = 1
    num_writers = 1

    def broadcast(self, value: Any) -> Any:
        return value

    def any(self, flag: bool) -> bool:
        return flag

    def first_error(self, error: Exception | None) -> Exception | None:
        return error
