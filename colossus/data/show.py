"""What a training step sees, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from colossus.architecture import IGNORED
from colossus.data.order import BatchSchedule
from colossus.data.packing import fill_window
from colossus.data.sources import TrainingData
from colossus.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A stretch of a row. is_learned: its tokens are targets."""

    text: str
    is_learned: bool
    begins_document: bool


@dataclass(frozen=True)
class Row:
    """One sample: where it comes from, and its text in pieces."""

    sample: int
    corpus: int
    epoch: int
    window: int
    num_tokens: int
    num_targets: int
    pieces: tuple[Piece, ...]


def rows_of_step(
    data: TrainingData, schedule: BatchSchedule, step: int, count: int, mask_documents: bool
) -> Iterator[Row]:
    """The first `count` rows of the global batch of `step`, read as the loader reads them."""
    first = schedule.first_sample(step)
    seq_len = data.order.phase(first).seq_len
    tokens_T, targets_T = np.zeros(seq_len, np.int64), np.zeros(seq_len, np.int64)
    documents_T = np.zeros(seq_len, np.int64) if mask_documents else None
    for sample in range(first, first + count):
        corpus, epoch, window = data.order.locate(sample)
        source = data.train[corpus]
        fill_window(source, window, tokens_T, targets_T, documents_T)
        begins = source.document_starts(window * seq_len, (window + 1) * seq_len) - window * seq_len
        # A token is learned as the target of the one before it; the first one is the row's start.
        learned_T = np.append(targets_T[0] != IGNORED, targets_T[:-1] != IGNORED)
        cuts = np.unique(
            np.concatenate([[0], begins, np.flatnonzero(np.diff(learned_T)) + 1, [seq_len]])
        ).tolist()
        decode = _spelled if "chats" in source.manifest["tokenizer"] else _decoded
        pieces = tuple(
            Piece(decode(data.tokenizer, tokens_T[a:b].tolist()), bool(learned_T[a]), a in begins)
            for a, b in pairwise(cuts)
        )
        num_targets = int(np.count_nonzero(targets_T != IGNORED))
        yield Row(sample, corpus, epoch, window, seq_len, num_targets, pieces)


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids)


def _spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """With the tokens that begin and end a document too: in a chat they may end a turn."""
    ends = {tokenizer.bos_id, tokenizer.eos_id}
    names = {index: name for name, index in tokenizer.special_tokens.items() if index in ends}
    runs = [(name, [*run]) for name, run in groupby(ids, key=names.get)]
    return "".join(name * len(run) if name is not None else tokenizer.decode(run) for name, run in runs)
