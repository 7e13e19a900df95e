"""From a stream of documents to samples: window i is the tokens from i x seq_len on."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from colossus.architecture import IGNORED


class TokenSource(Protocol):
    """A corpus as one long stream of tokens; `colossus.data.shards.ShardedTokens` is one."""

    fingerprint: str

    @property
    def num_tokens(self) -> int: ...

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`, unsigned 16 or 32 bits."""
        ...

    def mask(self, start: int, stop: int) -> np.ndarray | None:
        """Which tokens are learned, or None where all are."""
        ...

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions in [start, stop) where a document begins."""
        ...


def fill_window(
    source: TokenSource,
    window: int,
    tokens_T: np.ndarray,
    targets_T: np.ndarray,
    documents_T: np.ndarray | None = None,
) -> None:
    """Writes sample `window` of `source` into int64 arrays of seq_len.

    The target of a token is the next one. It is ignored where the corpus masks it, and, where documents
    are kept apart (`documents_T` is given and gets the index of each token's document in the window),
    where the next token begins another document. Where one token ends a document and begins the next, it is
    a target of the one and is read as the first of the other, so that no target is lost.
    """
    seq_len = len(tokens_T)
    start = window * seq_len
    stream = source.tokens(start, start + seq_len + 1)
    tokens_T[:] = stream[:-1]
    targets_T[:] = stream[1:]
    mask = source.mask(start + 1, start + seq_len + 1)
    if mask is not None:
        targets_T[mask == 0] = IGNORED
    if documents_T is not None:
        begins = source.document_starts(start + 1, start + seq_len + 1) - start
        if getattr(source, "separated_once", False):  # which a source may leave unsaid
            begins = begins - 1
        else:
            targets_T[begins - 1] = IGNORED
        documents_T[:] = np.searchsorted(begins, np.arange(seq_len), side="right")
        documents_T -= documents_T[0]
