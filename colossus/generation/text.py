"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossus.data.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the bytes of an unfinished character decode to


class TextBuilder:
    """Turns tokens into text as they come, and ends it before the first of the `stop` strings.

    Held back: bytes of an unfinished character, tokens of single bytes until the last of a run is there, and
    what may be the beginning of a stop string.

    prompt: the tokens that stand before. The text is what `decode` makes of all tokens beyond what it makes
        of these: some decoders treat a text's first token differently.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        drop_prefix: str = "",
        prompt: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(s for s in stop if s)
        self._drop_prefix = drop_prefix
        self._ids = list(prompt)
        self._context = 0  # decoding starts here
        self._read = len(prompt)  # tokens whose text is known
        self._pending = ""
        self.done = False

    def add(self, token: int) -> str:
        """Takes a token and returns the text that is now certain, possibly none."""
        self._ids.append(token)
        if token in self._tokenizer.byte_ids or not self._tokenizer.decode([token]):
            return ""  # what says nothing does not end a run of bytes either
        text = self._tokenizer.decode(self._ids[self._context :])
        if text.endswith(UNFINISHED):
            return ""
        known, text = self._known(), self._behind_known(text)
        if not known.endswith(UNFINISHED):  # a prompt may end inside a character
            self._context = self._read
        self._read = len(self._ids)
        return self._take(text)

    def finish(self) -> str:
        """The rest, after the last token."""
        if self.done:
            return ""
        text = self._take(self._behind_known(self._tokenizer.decode(self._ids[self._context :])))
        pending = "" if self.done else self._pending  # a stop string may be in what was held back
        self.done, self._pending = True, ""
        return text + pending

    def _known(self) -> str:
        """The decoded text that was there before."""
        return self._tokenizer.decode(self._ids[self._context : self._read])

    def _behind_known(self, text: str) -> str:
        """What is new of a decoded text. Where a run of tokens of bytes spells none, all of the run is lost,
        the end of a prompt too: then the new tokens are decoded by themselves."""
        known = self._known().rstrip(UNFINISHED)
        is_spoilt = UNFINISHED in text and not text.startswith(known)
        return self._tokenizer.decode(self._ids[self._read :]) if is_spoilt else text[len(known) :]

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
