"""Hands a rank its part of each step's samples, read ahead in a thread so that no step waits."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from colossus.architecture import IGNORED
from colossus.data.order import BatchSchedule, Order
from colossus.data.packing import TokenSource, fill_window

if TYPE_CHECKING:
    import torch

AHEAD_BYTES = 64 * 2**20
AHEAD_STEPS = 16


@dataclass(frozen=True)
class Batch:
    """A rank's rows of one step's global batch, int64; rows beyond its samples have no targets.

    num_targets: of these rows. num_tokens_global: of the whole step. wait_seconds: how long `next` waited.
    """

    step: int
    first_sample: int
    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    documents_BT: torch.Tensor | None
    num_targets: int
    num_tokens_global: int
    wait_seconds: float = 0.0


class Batches:
    """The batches of the steps from `start_step` on, in order, for rank `rank` of `size`.

    Every rank gets equally many rows, a multiple of `micro_batch`, so that all take as many passes;
    where the global batch does not divide, the last rows are padding without targets.

    micro_batch: or (from step, rows), where it changes on the way.
    shares: of replicas that take unequal parts of a batch, the part of each; the ranks are theirs in turn.

    Raises (from `next`): what reading raised.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        order: Order,
        schedule: BatchSchedule,
        *,
        start_step: int = 0,
        rank: int = 0,
        size: int = 1,
        micro_batch: int | Sequence[tuple[int, int]] = 1,
        shares: Sequence[int] = (1,),
        mask_documents: bool = False,
        device: Any = "cpu",
    ) -> None:
        self._sources, self._order, self._schedule = list(sources), order, schedule
        self._rank, self._size, self._shares = rank, size, list(shares)
        self._cuts = [(0, micro_batch)] if isinstance(micro_batch, int) else list(micro_batch)
        self._mask_documents, self._device = mask_documents, device
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=self._depth(start_step))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, args=(start_step,), name="data", daemon=True)
        self._thread.start()

    def next(self, step: int) -> Batch:
        """The batch of `step`, which is the one after the last that was asked for."""
        started = time.perf_counter()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # for who asks again: the thread has ended
            raise item
        assert item["step"] == step, f"asked for step {step}, the next is {item['step']}"
        return self._to_tensors(item, time.perf_counter() - started)

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, step: int) -> dict[str, Any]:
        """This rank's rows of `step` as numpy arrays, read now."""
        first, count = self._schedule.first_sample(step), self._schedule.batch(step)
        seq_len = self._order.phase(first).seq_len
        mine, share = rank_rows(count, self._rank, self._size, self._shares)
        micro_batch = [rows for since, rows in self._cuts if since <= step][-1]
        rows = -(-share // micro_batch) * micro_batch
        tokens_BT = np.zeros((rows, seq_len), np.int64)
        targets_BT = np.full((rows, seq_len), IGNORED, np.int64)
        documents_BT = np.zeros((rows, seq_len), np.int64) if self._mask_documents else None
        places = self._order.locate_many(first + mine.start, first + mine.stop).tolist()
        for row, (corpus, _, window) in enumerate(places):
            documents_T = documents_BT[row] if documents_BT is not None else None
            fill_window(self._sources[corpus], window, tokens_BT[row], targets_BT[row], documents_T)
        return {
            "step": step,
            "first_sample": first,
            "tokens_BT": tokens_BT,
            "targets_BT": targets_BT,
            "documents_BT": documents_BT,
            "num_targets": int(np.count_nonzero(targets_BT != IGNORED)),
            "num_tokens_global": count * seq_len,
        }

    def _read_ahead(self, step: int) -> None:
        item: Any = None
        while not self._stop.is_set():
            try:
                item = self.read(step)
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def _to_tensors(self, item: dict[str, Any], wait_seconds: float) -> Batch:
        import torch

        names = ("tokens_BT", "targets_BT", "documents_BT")
        tensors = {name: torch.from_numpy(item[name]) for name in names if item[name] is not None}
        if torch.device(self._device).type == "cuda":
            tensors = {n: t.pin_memory().to(self._device, non_blocking=True) for n, t in tensors.items()}
        return Batch(**(item | tensors), wait_seconds=wait_seconds)

    def _depth(self, step: int) -> int:
        """Steps that are read ahead: as many as fit into AHEAD_BYTES, at least 2."""
        seq_len = self._order.phase(self._schedule.first_sample(step)).seq_len
        one = 24 * seq_len * -(-self._schedule.batch(step) // self._size)
        return max(2, min(AHEAD_STEPS, AHEAD_BYTES // one))


def rank_rows(count: int, rank: int, size: int, shares: Sequence[int] = (1,)) -> tuple[range, int]:
    """Which of a batch's `count` rows are rank `rank`'s, and how many it takes with padding.

    size: of all ranks. shares: see `Batches`.
    """
    replica, place = divmod(rank, size // len(shares))
    ends = [count * sum(shares[:n]) // sum(shares) for n in range(len(shares) + 1)]
    first, last = ends[replica], ends[replica + 1]
    share = max(1, -(-(last - first) // (size // len(shares))))
    return range(min(last, first + place * share), min(last, first + (place + 1) * share)), share


def micro_batches(batch: Batch, micro_batch: int) -> list[tuple[Any, Any, Any]]:
    """(tokens_BT, targets_BT, documents_BT or None) of each pass of a step, `micro_batch` rows each."""
    parts = [
        t.split(micro_batch) if t is not None else None
        for t in (batch.tokens_BT, batch.targets_BT, batch.documents_BT)
    ]
    count = len(batch.tokens_BT) // micro_batch
    return [tuple(part[i] if part is not None else None for part in parts) for i in range(count)]  # type: ignore[misc]
