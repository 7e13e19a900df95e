"""A sample that stands for a corpus: what the tokenizer is trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from colossus.data.corpus import Corpus, text_of
from colossus.data.split import Split

READ_BYTES = 2**25  # of text that is read at most
TRAIN_BYTES = 2**23  # of text that is trained on: lines spread over all that was read
PIECE = 2**16  # characters that are handed to the trainer at once: it takes 80 bytes for each
PART_BYTES = 2**20  # that are read of a part at least, where there are many


def tokenizer_sample(corpora: Sequence[tuple[Corpus, Split]], weights: Sequence[float]) -> Iterator[str]:
    """Lines of the training parts, from all over each corpus, in proportion to the weights.

    Every n-th line of all documents teaches as much as n times the text: on the sources of Python's
    standard library, a quarter of the lines gives tokens that are 0.1% shorter than all of them.
    """
    for (corpus, split), weight in zip(corpora, weights, strict=True):
        share = weight / math.fsum(weights)
        texts = list(_spread(corpus, split, READ_BYTES * share))
        every = max(1, math.ceil(sum(map(len, texts)) / max(1.0, TRAIN_BYTES * share)))
        for index, text in enumerate(texts):
            lines = "".join(text.splitlines(keepends=True)[index % every :: every])
            yield from (lines[start : start + PIECE] for start in range(0, len(lines), PIECE))


def _spread(corpus: Corpus, split: Split, budget: float) -> Iterator[str]:
    """Learned documents of up to `budget` characters, from parts all over the corpus."""
    usual = min(PART_BYTES, corpus.num_bytes / len(corpus.parts) or PART_BYTES)  # of a part
    every = max(1, int(len(corpus.parts) * usual / max(1.0, budget)))
    chosen = corpus.parts[::every]
    of_each = max(PART_BYTES, budget / len(chosen))
    left = budget
    for part in chosen:
        of_this = min(left, of_each)
        for document in part.documents():
            if of_this <= 0:
                break
            if not split.holds_out(document):
                text = text_of(document)
                of_this -= len(text)
                left -= len(text)
                yield text
