"""How ranks end together when one of them fails: it tells why in one line, and the last of the others how
many ended because of it. Where it was killed, the first of the others says that.

Nobody waits: Gloo's connections close when a process ends, not before, and with them others learn of it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch._C._distributed_c10d import PrefixStore  # torch.distributed has it, unlisted
from torch.distributed import DistError

from colossus.errors import GOES_ON, MachineError, UserError
from colossus.parallel.meeting import absent
from colossus.words import count


class Ending:
    """Of the ranks that met in `store`."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = PrefixStore("ending", store), rank, size
        self._tells = False

    def claim(self, error: Exception) -> None:
        """Says before this rank leaves the others, who then fail in their turn, that it will tell why."""
        if not is_of_peer(error):
            with contextlib.suppress(DistError):
                self._tells = self._is_first("tells")

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """What a rank raises, once this is left, is told by one of them: others' errors are marked as `told`.

        Raises:
            MachineError: in the place of what an operation raises whose other ranks have gone.
        """
        try:
            yield
        except Exception as error:
            try:
                settled = self._settle(error)
            except DistError:  # the store has ended, with rank 0
                settled = LostPeer(f"rank 0 has ended; {GOES_ON}") if is_of_peer(error) else error
                settled.told = is_of_peer(error) and self._rank != 1  # type: ignore[attr-defined]
            if settled is error:
                raise
            raise settled from error

    def _is_first(self, key: str) -> bool:
        return self._store.compare_set(key, "", str(self._rank)).decode() == str(self._rank)

    def _settle(self, error: Exception) -> Exception:
        follows = is_of_peer(error)
        tells = self._tells or (follows and self._is_first("tells"))
        if self._tells:
            self._store.set("cause", str(self._rank))
        others = self._store.add("followed", int(follows))
        self._store.set(f"ended-{self._rank}", "")
        ended = self._store.add("ended", 1)
        if tells and not follows:
            return error
        if isinstance(error, UserError):
            error.told = True
            return error
        known = self._store.check(["cause"])
        said = "lost another rank"
        if last := follows and ended == self._size - (not known):
            who = f"rank {self._store.get('cause').decode()} failed" if known else self._lost()
            said = f"{who}; {count(others)} other{'s' * (others != 1)} ended with it"
        lost = LostPeer(f"{said}; {GOES_ON}")
        lost.told = not (tells or last)
        return lost

    def _lost(self) -> str:
        return f"lost {absent(self._store, 'ended', self._size)}"


class LostPeer(MachineError):
    """Other ranks of this one have ended without a word."""


def is_of_peer(error: BaseException | None) -> bool:
    """Whether it says that another rank has gone. Gloo has no type of its own for that."""
    if isinstance(error, (UserError, MachineError)) or error is None:
        return False
    if isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error)):
        return True
    return is_of_peer(error.__cause__)


@contextlib.contextmanager
def handlers_given_back() -> Iterator[None]:
    """What SIGINT and SIGTERM did before, they do again once this is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.getsignal(n) or signal.SIG_DFL for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
