"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossus.data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the bytes of an unfinished character decode to


class TextBuilder:
    """Turns tokens into text as they come, and ends it before the first of the `stop` strings.

    Held back: bytes of an unfinished character, and what may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), drop_prefix: str = "") -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._drop_prefix = drop_prefix
        self._ids: list[int] = []
        self._context = 0  # decoding starts here: some decoders treat the first token differently
        self._read = 0  # tokens whose text is known
        self._pending = ""
        self.done = False

    def add(self, token: int) -> str:
        """Takes a token and returns the text that is now certain, possibly none."""
        self._ids.append(token)
        known = self._tokenizer.decode(self._ids[self._context : self._read])
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith(UNFINISHED):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._take(text[len(known) :])

    def finish(self) -> str:
        """The rest, after the last token."""
        if self.done:
            return ""
        known = self._tokenizer.decode(self._ids[self._context : self._read])
        text = self._take(self._tokenizer.decode(self._ids[self._context :])[len(known) :])
        pending, self._pending = self._pending, ""
        self.done = True
        return text + pending

    def _take(self, text: str) -> str:
        if self._drop_prefix and text:
            text, self._drop_prefix = text.removeprefix(self._drop_prefix), ""
        self._pending += text
        ends = [end for stop in self._stop if (end := self._pending.find(stop)) >= 0]
        if ends:
            self.done = True
            return self._pending[: min(ends)]
        held = max((_overlap(self._pending, stop) for stop in self._stop), default=0)
        certain = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(certain) :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
