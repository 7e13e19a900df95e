"""The operation ledger: the one language of performance.

A ledger says what is done, not how long it takes. It comes from formulas (`planner.formulas`), from the real
program under fake tensors, or from a profile; `perf.price` turns any of them into seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Columns = NDArray[np.float64]
Phase = Literal["forward", "recompute", "backward", "weights", "step"]
Kind = Literal[
    "product", "fused_attention", "memory", "elementwise", "all_gather", "reduce_scatter", "all_reduce",
    "all_to_all", "send",
]  # fmt: skip
PHASES: tuple[Phase, ...] = ("forward", "recompute", "backward", "weights", "step")
COMMUNICATION = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")


@dataclass(frozen=True)
class Row:
    """One operation of a rank, or `repeat` equal ones. Numbers are floats, or columns of N layouts.

    phase: `backward` makes the gradients of inputs, `weights` those of weights; `recompute` is the forward
        pass made again; `step` is once a step.
    stage: the part of the model that it belongs to: a kind of layer, "first", "last" or "rank".
    stream: what it runs on: "compute", or the group whose messages it carries.
    m, n, k: of a product [m, k] x [k, n], `count` of them at once; of attention, queries, keys, head width.
    precision: of the product: "bf16", "fp8", "fp32".
    executed, model: FLOPs that the kernel is asked for, and that MFU counts.
    bytes: read and written in the rank's own memory; of `elementwise` work, if nothing were fused.
    group, sent: who takes part in a message, and the bytes of the full tensor (of an all-to-all and a send:
        the bytes that one rank has to give).
    saved: bytes that wait for the backward pass.
    launches: kernels.
    """

    name: str
    phase: Phase
    stage: str
    kind: Kind
    stream: str = "compute"
    precision: str = "bf16"
    group: str = ""
    m: ArrayLike = 0.0
    n: ArrayLike = 0.0
    k: ArrayLike = 0.0
    count: ArrayLike = 1.0
    executed: ArrayLike = 0.0
    model: ArrayLike = 0.0
    bytes: ArrayLike = 0.0
    sent: ArrayLike = 0.0
    saved: ArrayLike = 0.0
    repeat: ArrayLike = 1.0
    launches: ArrayLike = 1.0


NUMBERS = ("m", "n", "k", "count", "executed", "model", "bytes", "sent", "saved", "repeat", "launches")
WORDS = ("name", "phase", "stage", "kind", "stream", "precision", "group")


@dataclass(frozen=True)
class Ledger:
    """R rows as columns: words [R], numbers [R, N] for N layouts. See `Row`."""

    name: NDArray[Any]
    phase: NDArray[Any]
    stage: NDArray[Any]
    kind: NDArray[Any]
    stream: NDArray[Any]
    precision: NDArray[Any]
    group: NDArray[Any]
    m: Columns
    n: Columns
    k: Columns
    count: Columns
    executed: Columns
    model: Columns
    bytes: Columns
    sent: Columns
    saved: Columns
    repeat: Columns
    launches: Columns

    @classmethod
    def of(cls, rows: Iterable[Row], size: int = 1) -> Ledger:
        """The rows as columns for `size` layouts."""
        rows = list(rows)
        words = {name: np.array([getattr(row, name) for row in rows], dtype=object) for name in WORDS}
        numbers = {}
        for name in NUMBERS:
            column = np.empty((len(rows), size))
            for i, row in enumerate(rows):
                column[i] = getattr(row, name)
            numbers[name] = column
        return cls(**words, **numbers)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and layouts."""
        return self.m.shape[0], self.m.shape[1]

    def where(self, **words: str | tuple[str, ...]) -> NDArray[np.bool_]:
        """Mask [R] of the rows whose words are these, or one of these."""
        mask = np.ones(len(self.name), dtype=bool)
        for word, wanted in words.items():
            column = getattr(self, word)
            mask &= np.isin(column, wanted) if isinstance(wanted, tuple) else column == wanted
        return mask

    def take(self, mask: NDArray[np.bool_]) -> Ledger:
        return Ledger(**{field.name: getattr(self, field.name)[mask] for field in fields(self)})

    def total(self, column: str, **words: str | tuple[str, ...]) -> Columns:
        """Sum [N] of a column times `repeat`, over the rows of `where`."""
        mask = self.where(**words)
        return np.asarray((getattr(self, column)[mask] * self.repeat[mask]).sum(axis=0))
