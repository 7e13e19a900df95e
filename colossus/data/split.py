"""Which documents are held out: by their text alone, and at least one on each side."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from colossus.data.corpus import Corpus, Document, Part, text_of
from colossus.errors import UserError

HELD_OUT_BYTES = 2**21  # of text that is held out at most, so that measuring on all of it stays short
LOOK_AT_BYTES = 2**26  # of text at most, to see that both sides get a document
ENOUGH = 64  # documents to hold out, from which on chance makes about the share of them
NEAR = 1.25  # times as much, or as little, as is asked for: near enough
LITTLE, NEAR_OF_LITTLE = 2**20, 2.0  # characters in all, of which a measure is rough whatever is held out
LARGE = 2**13  # characters of a document that is not held out whole where much less is asked for
WHOLE = 2**64  # keys are below it
XZ_DICTIONARY = 2**26  # of xz -9


@dataclass(frozen=True)
class Split:
    """Documents whose key is below `bound` are held out.

    So equal documents lie on the same side whatever the order. In a corpus of few, those that are held out
    are given by their keys, `always`.
    """

    bound: int
    always: frozenset[int] = frozenset()

    def holds_out(self, document: Document) -> bool:
        key = key_of(text_of(document))
        return key < self.bound or key in self.always


def key_of(text: str) -> int:
    """A number below WHOLE that shuffles documents."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def divide(corpus: Corpus, fraction: float) -> tuple[Corpus, Split]:
    """How to hold out about `fraction` of a corpus, at most HELD_OUT_BYTES where its size is known.

    Of a corpus of few documents, all are looked at. Where they are much larger than what is to be held out,
    one is cut: its last part, from a line's begin on, becomes a document to hold out.

    Raises:
        UserError: it holds no text, or too little to hold out any.
    """
    share = min(fraction, HELD_OUT_BYTES / corpus.num_bytes) if corpus.num_bytes else fraction
    bound = int(share * WHOLE)
    sizes: Counter[int] = Counter()
    num, held, sides, is_whole, is_near = 0, 0, set[bool](), True, False
    for document in corpus.documents():
        text = text_of(document)
        key = key_of(text)
        sizes[key] += len(text)
        num += len(text)
        held += len(text) * (key < bound)
        sides.add(key < bound)
        is_near = len(sides) == 2 and _is_near(held, share * num, num)
        if len(sizes) > 1 and (num > LOOK_AT_BYTES or (is_near and share * len(sizes) > ENOUGH)):
            is_whole = False
            break
    if not sizes:
        raise UserError(f"data.corpus={corpus.name}: empty; it holds no text")
    if len(sizes) == 1:
        return _cut(corpus, share)
    if is_near or not is_whole:  # what was not looked at has its share by chance
        one = min(sizes, key=lambda key: (abs(sizes[key] - share * num), key))
        return corpus, Split(min(bound, max(sizes)), frozenset() if True in sides else frozenset([one]))
    return _fitted(corpus, sizes, share * num)


def _is_near(held: int, wanted: float, num: int) -> bool:
    """Whether so many of `num` characters are about as many as wanted."""
    near = NEAR if num > LITTLE else NEAR_OF_LITTLE
    return wanted / near <= held <= wanted * near


def _fitted(corpus: Corpus, sizes: Mapping[int, int], wanted: float) -> tuple[Corpus, Split]:
    """Holds out about `wanted` characters of documents, whose sizes are given by their keys: those with the
    least keys, or one of a better size, or, where these are too large, some and a part of one."""
    keys = sorted(sizes)
    sums = [0, *accumulate(sizes[key] for key in keys[:-1])]  # something is left to learn
    few = min(range(1, len(sums)), key=lambda count: abs(sums[count] - wanted))
    one = min(keys, key=lambda key: abs(sizes[key] - wanted))
    chosen = keys[:few] if abs(sums[few] - wanted) <= abs(sizes[one] - wanted) else [one]
    held = sum(sizes[key] for key in chosen)
    if not _is_near(held, wanted, sum(sizes.values())):
        count = bisect_right(sums, wanted) - 1
        rest = wanted - sums[count]
        large = next((key for key in keys[count:] if sizes[key] > max(rest, LARGE)), None)
        document = next((d for d in corpus.documents() if key_of(text_of(d)) == large), None)
        if isinstance(document, str):
            said = f"few documents: {count} and of another the" if count else "few documents: of one the"
            return _cut_one(corpus, document, rest / sizes[key_of(document)], said, keys[:count])
    split = Split(0, frozenset(chosen))
    if len(chosen) > 1:
        return corpus, split
    note = f"few documents: one of {held:,} characters is held out"
    return replace(corpus, notes=(*corpus.notes, note)), split


def _cut(corpus: Corpus, share: float) -> tuple[Corpus, Split]:
    """The corpus, its only document cut in two; the second is held out."""
    document = next(corpus.documents())
    if not isinstance(document, str) or len(document) < 2 or document[:1] == document[1:]:
        raise UserError(f"data.corpus={corpus.name}: one document that cannot be cut; give at least two")
    part = next(part for part in corpus.parts if any(part.documents()))
    only = replace(part, read=_First(part))  # other parts are empty or repeat it
    return _cut_one(replace(corpus, parts=(only,)), document, share, "one document: its")


def _cut_one(
    corpus: Corpus, document: str, share: float, said: str, others: Sequence[int] = ()
) -> tuple[Corpus, Split]:
    """The corpus, one of its documents cut in two wherever it stands; the second is held out.

    others: keys of documents that are held out too. said: of which documents, for the note.
    """
    at = _begin_of_tail(document, share)
    note = f"{said} last {len(document) - at:,} characters are held out"
    parts = tuple(replace(part, read=_Cut(part, key_of(document), at)) for part in corpus.parts)
    split = Split(0, frozenset([*others, key_of(document[at:])]))
    return replace(corpus, parts=parts, notes=(*corpus.notes, note)), split


def _begin_of_tail(text: str, share: float) -> int:
    """Where the last `share` of a text begins: behind a line's end, else behind a space, else anywhere.

    Never between two equal halves, for equal documents lie on one side.
    """
    last = len(text) - 1
    at = min(last, max(1, round((1 - share) * len(text))))
    ends = [text.rfind(end, 0, at) + 1 or text.find(end, at, -1) + 1 for end in ("\n", " ")]
    choices = [*ends, at, at - 1 or last]
    return next(end for end in choices if end and text[:end] != text[end:])


@dataclass(frozen=True)
class _First:
    """The first document of a part."""

    part: Part

    def __call__(self) -> Iterator[Document]:
        yield next(self.part.documents())


@dataclass(frozen=True)
class _Cut:
    """The documents of a part, those with the key `key` cut at `at`."""

    part: Part
    key: int
    at: int

    def __call__(self) -> Iterator[Document]:
        for document in self.part.documents():
            if isinstance(document, str) and key_of(document) == self.key:
                yield document[: self.at]
                yield document[self.at :]
            else:
                yield document


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
