"""Output that nobody takes, and a line that is gone when it is done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def nobody_reads_on() -> int:
    """`colossus models | head` is done when head is; what is still to be written goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@contextmanager
def one_line() -> Iterator[Callable[[str], None]]:
    """Says what is being done, each time in place of what it said before. Where nobody looks, nothing."""
    if not sys.stderr.isatty():
        yield lambda line: None
        return

    def show(line: str) -> None:
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")
