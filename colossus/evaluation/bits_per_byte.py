"""Bits per byte: how many bits a model needs for a byte of text that it has never seen.

A compressor that knew the model's predictions would need sum(-log2 p) bits for a document; divided by its
UTF-8 bytes this is comparable between tokenizers, and with gzip, bz2 and xz on the same documents.

Where not all of a document is learned, as in a chat, the model reads all of it, and what is learned counts:
its tokens, and the bytes of its text. The compressors get that text alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from colossus.architecture import IGNORED
from colossus.data.compressors import COMPRESSORS
from colossus.data.lossless import LIMIT
from colossus.errors import UserError
from colossus.evaluation.eager import eagerly
from colossus.evaluation.windows import Windows, batches, windows

BATCH_TOKENS = 8192
FEW_DOCUMENTS = 32  # among which there is a question, where there are any


class HeldOut(Protocol):
    """Held-out documents of one corpus; `colossus.data.shards.ShardedTokens` is one."""

    @property
    def num_tokens(self) -> int: ...

    def tokens(self, start: int, stop: int) -> np.ndarray: ...

    def scored(self, start: int, stop: int) -> np.ndarray | None:
        """1 where a token counts; None where all do."""
        ...

    def documents(self) -> np.ndarray:
        """Structured, in a fixed shuffled order: start, num_bytes, gzip_bytes, bz2_bytes, xz_bytes."""
        ...


class Ranks(Protocol):
    """What evaluation asks of the processes that share it; `colossus.parallel.world.World` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, values: Sequence[float]) -> list[float]: ...


@dataclass(frozen=True)
class ValidationResult:
    """loss: nats a token. The compressors saw the same documents, each by itself.

    bits_per_byte: None where it is withheld, since the tokenizer loses too much of the text.
    lost: the share of the bytes of all held-out text that it loses.
    num_tokens: predicted tokens that count. num_positions: forward positions that it took, padding included.
    seconds: of wall time.
    """

    loss: float
    bits_per_byte: float | None
    gzip_bits_per_byte: float
    bz2_bits_per_byte: float
    xz_bits_per_byte: float
    num_documents: int
    num_tokens: int
    num_bytes: int
    num_positions: int
    seconds: float
    lost: float = 0.0


class Validation:
    """The held-out documents of one or several corpora, in one fixed order.

    Any first n of them are a fair part: each corpus is shuffled, and all are interleaved in proportion.
    """

    def __init__(self, corpora: HeldOut | Sequence[HeldOut], seq_len: int) -> None:
        self.seq_len = seq_len
        self._corpora = list(corpora) if isinstance(corpora, Sequence) else [corpora]
        tables = [corpus.documents() for corpus in self._corpora]
        order = _interleaved([len(table) for table in tables])
        self._corpus = np.concatenate([np.full(len(t), i) for i, t in enumerate(tables)])[order]
        ends = [_ends(t["start"], corpus.num_tokens) for t, corpus in zip(tables, self._corpora, strict=True)]
        self._start = np.concatenate([table["start"] for table in tables])[order]
        self._num_tokens = np.concatenate(ends)[order] - self._start
        triples = zip(self._corpora, tables, ends, strict=True)
        self._num_scored = np.concatenate([_num_scored(c, t["start"], e) for c, t, e in triples])[order]
        self._bytes = {
            name: np.concatenate([table[f"{name}_bytes"] for table in tables])[order].astype(np.int64)
            for name in ("num", *COMPRESSORS)
        }
        lost = sum(getattr(corpus, "num_lost_bytes", 0) for corpus in self._corpora)  # not all have looked
        self.lost = lost / max(1, int(self._bytes["num"].sum()))
        if not self._bytes["num"].sum():
            raise UserError(
                "data.validation_fraction: no text was held out; a larger fraction, or more documents"
            )

    @property
    def num_documents(self) -> int:
        return len(self._start)

    def num_tokens(self, num_documents: int | None = None) -> int:
        """Predicted tokens that count in the first `num_documents`, or in all."""
        return int(self._num_scored[:num_documents].sum())

    def num_positions(self) -> np.ndarray:
        """Forward positions that the first 1, 2, ... documents take, without padding: up to two a token."""
        table = windows(self._num_tokens, self.seq_len)
        return np.cumsum(np.bincount(table.document, table.length, self.num_documents)).astype(np.int64)

    def num_bytes(self) -> np.ndarray:
        """Bytes of text of the first 1, 2, ... documents."""
        return np.cumsum(self._bytes["num"])

    def choose_part(self, seconds_per_position: float, budget_seconds: float) -> int:
        """How many documents, from the first on, are evaluated within `budget_seconds`; at least one.

        seconds_per_position: a result's seconds / num_positions. A run decides this once and keeps it, so
        that all its points are of the same documents.
        """
        costs = self.num_positions() * seconds_per_position
        fits = int(np.searchsorted(costs, budget_seconds, side="right"))
        return min(self.num_documents, max(1, fits))

    def plan(self, num_documents: int | None = None) -> Windows:
        """The windows of the first `num_documents`, or of all."""
        return windows(self._num_tokens[:num_documents], self.seq_len)

    def question(self) -> np.ndarray | None:
        """What stands before the first answer of a document, as tokens [N] in the template: of the first that
        is not learned from its beginning on; None where none of the first few is such."""
        for index in range(min(FEW_DOCUMENTS, self.num_documents)):
            corpus, start = self._corpora[self._corpus[index]], int(self._start[index])
            stop = start + int(self._num_tokens[index])
            scored = corpus.scored(start, stop)
            if scored is not None and scored.any() and not scored[0]:
                return corpus.tokens(start, start + int(np.argmax(scored)))
        return None

    def batch(self, table: Windows, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens_BT and targets_BT (int64) of some windows, padded on the right to `length`."""
        tokens_BT = np.zeros((len(rows), length), np.int64)
        targets_BT = np.full((len(rows), length), IGNORED, np.int64)
        for row, window in enumerate(rows.tolist()):
            document, count = table.document[window], int(table.length[window])
            begin = int(self._start[document] + table.begin[window])
            corpus = self._corpora[self._corpus[document]]
            tokens = corpus.tokens(begin, begin + count + 1)
            first = int(table.first_scored[window])
            tokens_BT[row, :count] = tokens[:-1]
            targets_BT[row, first:count] = tokens[first + 1 :]
            scored = corpus.scored(begin + 1, begin + count + 1)
            if scored is not None:
                targets_BT[row, :count][scored == 0] = IGNORED
        return tokens_BT, targets_BT

    def result(
        self, nats: float, num_documents: int | None, num_positions: int, seconds: float
    ) -> ValidationResult:
        """`nats`: the sum of -log p over every predicted token that counts of the first `num_documents`."""
        totals = {name: int(column[:num_documents].sum()) for name, column in self._bytes.items()}
        num_bytes, count = max(1, totals["num"]), len(self._start[:num_documents])
        num_tokens = self.num_tokens(num_documents)
        bits = {f"{name}_bits_per_byte": 8 * totals[name] / num_bytes for name in COMPRESSORS}
        return ValidationResult(
            loss=nats / max(1, num_tokens),
            bits_per_byte=nats / math.log(2) / num_bytes if self.lost < LIMIT else None,
            num_documents=count,
            num_tokens=num_tokens,
            num_bytes=totals["num"],
            num_positions=num_positions,
            seconds=seconds,
            lost=self.lost,
            **bits,
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    validation: Validation,
    num_documents: int | None = None,
    *,
    world: Ranks | None = None,
    batch_tokens: int = BATCH_TOKENS,
    before_batch: Callable[[], None] | None = None,
) -> ValidationResult:
    """Evaluates `model` on the first `num_documents` (all, if None); the same on any number of ranks.

    Ranks share the batches, and each makes the same number of forward calls, as sharded models need.
    Blocks run uncompiled: a graph without gradients would be compiled for every shape, which costs more
    than the few per cent of a run that validation may take can win back.

    before_batch: called before every batch; may raise to give up.
    """
    started = time.perf_counter()
    table = validation.plan(num_documents)
    parts = batches(table.length, validation.seq_len, batch_tokens)
    rank, size = (world.rank, world.size) if world is not None else (0, 1)
    parts += [(np.zeros(0, np.int64), 1)] * (-len(parts) % size)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    try:
        with eagerly():
            for rows, length in parts[rank::size]:
                if before_batch is not None:
                    before_batch()
                tokens_BT, targets_BT = _or_empty(validation.batch(table, rows, length))
                loss, _ = model(tokens_BT.to(device), targets_BT.to(device))
                nats += loss
    finally:
        model.train(was_training)
    total = world.sum([float(nats)])[0] if world is not None else float(nats)
    positions = sum(len(rows) * length for rows, length in parts)
    return validation.result(total, num_documents, positions, time.perf_counter() - started)


def _or_empty(arrays: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """As tensors; a batch without rows becomes one row without a target."""
    tokens_BT, targets_BT = (torch.from_numpy(array) for array in arrays)
    if not len(tokens_BT):
        return torch.zeros((1, 1), dtype=torch.int64), torch.full((1, 1), IGNORED)
    return tokens_BT, targets_BT


def _ends(starts: np.ndarray, num_tokens: int) -> np.ndarray:
    """Where documents that begin at `starts` (in any order) and fill the split end."""
    order = np.argsort(starts)
    ends = np.empty(len(starts), np.int64)
    ends[order] = np.append(starts[order][1:], num_tokens)
    return ends


def _num_scored(corpus: HeldOut, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Predicted tokens that count of each document: all but its first, and but what is not learned."""
    scored = corpus.scored(0, corpus.num_tokens)
    if scored is None:
        return ends - starts - 1
    before = np.concatenate([[0], np.cumsum(scored, dtype=np.int64)])
    return before[ends] - before[starts + 1]


def _interleaved(counts: Iterable[int]) -> np.ndarray:
    """An order over lists of these lengths, one after the other, that takes from each in proportion."""
    places = [(np.arange(count) + 0.5) / max(1, count) for count in counts]
    return np.argsort(np.concatenate(places), kind="stable")
