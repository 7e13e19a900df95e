"""Which documents are held out: by their text alone, and at least one on each side."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
from collections.abc import Iterator
from dataclasses import dataclass, replace

from colossus.data.corpus import Corpus, Document, Part, text_of
from colossus.errors import UserError

HELD_OUT_BYTES = 2**21  # of text that is held out at most, so that measuring on all of it stays short
LOOK_AT_BYTES = 2**26  # of text at most, to see that both sides get a document
WHOLE = 2**64  # keys are below it
XZ_DICTIONARY = 2**26  # of xz -9


@dataclass(frozen=True)
class Split:
    """Documents whose key is below `bound` are held out.

    So equal documents lie on the same side whatever the order. In a corpus of few, the document with the
    key `always` is held out too, and the one with the key `never` is not.
    """

    bound: int
    always: int | None = None
    never: int | None = None

    def holds_out(self, document: Document) -> bool:
        key = key_of(text_of(document))
        return key == self.always or (key < self.bound and key != self.never)


def key_of(text: str) -> int:
    """A number below WHOLE that shuffles documents."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def divide(corpus: Corpus, fraction: float) -> tuple[Corpus, Split]:
    """How to hold out about `fraction` of a corpus, at most HELD_OUT_BYTES where its size is known.

    A corpus of one document is cut: its last part, from a line's begin on, becomes a document to hold out.

    Raises:
        UserError: it holds no text, or too little to hold out any.
    """
    share = min(fraction, HELD_OUT_BYTES / corpus.num_bytes) if corpus.num_bytes else fraction
    split = Split(int(share * WHOLE))
    sizes: dict[int, int] = {}
    sides: set[bool] = set()
    for document in corpus.documents():
        text = text_of(document)
        sizes[key_of(text)] = len(text)
        sides.add(split.holds_out(document))
        if len(sides) == 2 or (len(sizes) > 1 and sum(sizes.values()) > LOOK_AT_BYTES):
            break
    if not sizes:
        raise UserError(f"data.corpus={corpus.name}: empty; it holds no text")
    if len(sizes) == 1:
        return _cut(corpus, share)
    if sides == {False}:
        wanted = share * sum(sizes.values())
        always = min(sizes, key=lambda key: (abs(sizes[key] - wanted), key))
        note = f"few documents: one of {sizes[always]:,} characters is held out"
        return replace(corpus, notes=(*corpus.notes, note)), replace(split, always=always)
    if sides == {True}:
        return corpus, replace(split, never=max(sizes, key=lambda key: (sizes[key], key)))
    return corpus, split


def _cut(corpus: Corpus, share: float) -> tuple[Corpus, Split]:
    """The corpus, its only document cut in two; the second is held out."""
    document = next(corpus.documents())
    if not isinstance(document, str) or len(document) < 2:
        raise UserError(f"data.corpus={corpus.name}: one document that cannot be cut; give at least two")
    at = _begin_of_tail(document, share)
    note = f"one document: its last {len(document) - at:,} characters are held out"
    part = next(part for part in corpus.parts if any(part.documents()))
    only = replace(part, read=_Cut(part, at))  # other parts are empty or repeat it
    split = Split(0, always=key_of(document[at:]))
    return replace(corpus, parts=(only,), notes=(*corpus.notes, note)), split


def _begin_of_tail(text: str, share: float) -> int:
    """Where the last `share` of a text begins: behind a line's end, else behind a space, else anywhere."""
    at = min(len(text) - 1, max(1, round((1 - share) * len(text))))
    ends = (text.rfind(end, 0, at) + 1 or text.find(end, at, -1) + 1 for end in ("\n", " "))
    return next((end for end in ends if end), at)


@dataclass(frozen=True)
class _Cut:
    part: Part
    at: int

    def __call__(self) -> Iterator[Document]:
        document = next(self.part.documents())
        assert isinstance(document, str)
        yield document[: self.at]
        yield document[self.at :]


def sizes_of(data: bytes) -> list[int]:
    """The sizes of a document: plain, and by gzip -9, bz2 -9, xz -9e. Of nothing they are 0."""
    if not data:
        return [0, 0, 0, 0]
    return [len(data), len(gzip.compress(data, 9)), len(bz2.compress(data, 9)), _xz_size(data)]


def _xz_size(data: bytes) -> int:
    """Of `xz -9e`. A dictionary no larger than the data finds the same, and saves a pass over 64 MiB."""
    dictionary = min(XZ_DICTIONARY, max(4096, 1 << (len(data) - 1).bit_length()))
    level = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}
    return len(lzma.compress(data, filters=[level]))
