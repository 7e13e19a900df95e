"""Token streams in memory, and orders over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from colossus.data.order import Order, Phase


@dataclass
class Stream:
    """A `TokenSource` over arrays. Token i of a plain stream is i, so that every row tells its place."""

    ids: np.ndarray
    starts: np.ndarray
    learned: np.ndarray | None = None
    fingerprint: str = "stream"
    separated_once: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def mask(self, start: int, stop: int) -> np.ndarray | None:
        return None if self.learned is None else self.learned[start:stop]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return self.starts[(self.starts >= start) & (self.starts < stop)]


def counting(num_tokens: int, first: int = 0, document: int = 7) -> Stream:
    """Tokens `first`, `first` + 1, ...; a document every `document` tokens."""
    return Stream(
        np.arange(first, first + num_tokens, dtype=np.uint32), np.arange(0, num_tokens, document, np.int64)
    )


def one_phase(num_tokens: Sequence[int], seq_len: int = 8, seed: int = 0) -> Order:
    """An order over corpora in proportion to their sizes."""
    names = tuple(f"corpus {i}" for i in range(len(num_tokens)))
    weights = tuple(float(n) for n in num_tokens)
    return Order(seed, [Phase(0, seq_len, weights, names)], num_tokens)
