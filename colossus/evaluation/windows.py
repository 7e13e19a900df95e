"""Which windows of held-out documents a model is shown, and which of their tokens are scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_LENGTHS = 8  # padded lengths that occur, at most
Column = np.ndarray


@dataclass(frozen=True)
class Windows:
    """Windows as columns of int64, one entry a window.

    document: index of the document it lies in. begin: its first input token, from the document's start.
    length: input tokens. first_scored: the input from which on predictions count, from the window's begin.
    """

    document: Column
    begin: Column
    length: Column
    first_scored: Column

    def __len__(self) -> int:
        return len(self.length)


def windows(num_tokens: Column, seq_len: int) -> Windows:
    """Windows over documents of `num_tokens` tokens each, such that every token but a document's first is
    predicted once, from all that precedes it or from at least half a window.

    The first window of a document counts whole; each later one begins half a window further on, and only
    what the one before did not reach counts.
    """
    num_inputs = np.asarray(num_tokens, np.int64) - 1
    stride = max(1, seq_len // 2)
    counts = np.where(num_inputs > 0, 1 + -(-np.maximum(0, num_inputs - seq_len) // stride), 0)
    document = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = index * stride
    length = np.minimum(seq_len, num_inputs[document] - begin)
    return Windows(document, begin, length, np.where(index > 0, seq_len - stride, 0))


def batches(lengths: Column, seq_len: int, batch_tokens: int) -> list[tuple[Column, int]]:
    """Windows of similar length together: (their indices, the length that all are padded to).

    A causal model never looks at padding on the right, so it costs time and changes nothing. Lengths are
    padded to one of at most eight, which wastes under a sixteenth on average; the longest come first, and
    a batch holds at most `batch_tokens` positions (or one window).
    """
    unit = -(-seq_len // NUM_LENGTHS)
    padded = np.minimum(seq_len, -(-lengths // unit) * unit)
    parts: list[tuple[Column, int]] = []
    for length in sorted(set(padded.tolist()), reverse=True):
        members = np.flatnonzero(padded == length)
        rows = max(1, batch_tokens // length)
        parts += [(members[i : i + rows], length) for i in range(0, len(members), rows)]
    return parts
