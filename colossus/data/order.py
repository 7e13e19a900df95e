"""The order of samples: sample s of a run is a pure function of (seed, s, data phases).

Nothing here knows ranks, workers or restarts. Random access costs a few microseconds at any s.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from colossus.errors import UserError

ROUNDS = 6
WEIGHT_UNITS = 2**20  # weights are multiples of 1 / WEIGHT_UNITS, so that counts are exact integers
_MASK = 2**64 - 1
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64 (Steele, Lea, Flood 2014)


@dataclass(frozen=True)
class Phase:
    """From sample `first_sample` on: windows of `seq_len` tokens, from corpora in these proportions.

    fingerprints: of each corpus's shards; a running phase whose shards changed is an error.
    """

    first_sample: int
    seq_len: int
    weights: tuple[float, ...]
    fingerprints: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Phase:
        lists = {name: tuple(values[name]) for name in ("weights", "fingerprints")}
        return cls(**(values | lists))


class BatchSchedule:
    """Sequences of each step: `changes` are (from step, sequences), the first from step 0."""

    def __init__(self, changes: Sequence[tuple[int, int]]) -> None:
        ordered = sorted((int(step), int(batch)) for step, batch in changes)
        if not ordered or ordered[0][0] != 0 or len({step for step, _ in ordered}) < len(ordered):
            raise UserError(
                f"run.batch_schedule={[list(c) for c in changes]}: pairs of (from step, sequences), "
                "each step once, the first from step 0"
            )
        self._steps = [step for step, _ in ordered]
        self._batches = [batch for _, batch in ordered]
        self._first = [0]
        for i in range(1, len(ordered)):
            span = self._steps[i] - self._steps[i - 1]
            self._first.append(self._first[-1] + span * self._batches[i - 1])

    def batch(self, step: int) -> int:
        """Sequences of `step`."""
        return self._batches[bisect_right(self._steps, step) - 1]

    def first_sample(self, step: int) -> int:
        """The number of samples before `step`."""
        i = bisect_right(self._steps, step) - 1
        return self._first[i] + (step - self._steps[i]) * self._batches[i]

    def step_of(self, sample: int) -> int:
        """The step that takes `sample`."""
        i = bisect_right(self._first, sample) - 1
        return self._steps[i] + (sample - self._first[i]) // self._batches[i]


class Order:
    """Where each sample lies: (corpus, epoch, window).

    num_tokens: of each corpus. A corpus goes on where the phase before left it; where the sample length
    changes, it starts its next epoch, since windows of another length are other samples.
    skips: half-open intervals of positions in the order that are never trained on; sample s is the
    s-th position outside them.
    """

    def __init__(
        self,
        seed: int,
        phases: Sequence[Phase],
        num_tokens: Sequence[int],
        skips: Sequence[tuple[int, int]] = (),
    ) -> None:
        assert phases and phases[0].first_sample == 0, "the first phase starts at sample 0"
        self.phases = sorted(phases, key=lambda phase: phase.first_sample)
        self._seed = seed
        self._skips = _Skips(skips)
        # Right behind the last sample of the phase before, so that its own first samples can be skipped.
        self._first = [self._skips.position(phase.first_sample - 1) + 1 for phase in self.phases]
        self._mixtures = [Mixture(phase.weights) for phase in self.phases]
        self._windows = [tuple(num_windows(n, p.seq_len) for n in num_tokens) for p in self.phases]
        self._drawn = [(0,) * len(num_tokens)]
        for i in range(1, len(self.phases)):
            self._drawn.append(self._drawn_at_start(i))

    def phase(self, sample: int) -> Phase:
        """The phase that holds at `sample`."""
        return self.phases[self._index(self._skips.position(sample))]

    def locate(self, sample: int) -> tuple[int, int, int]:
        """(corpus, epoch, window) of one sample."""
        position = self._skips.position(sample)
        i = self._index(position)
        corpus, count = self._mixtures[i].draw(position - self._first[i])
        epoch, place = divmod(self._drawn[i][corpus] + count, self._windows[i][corpus])
        return corpus, epoch, self._permutation(i, corpus, epoch)(place)

    def locate_many(self, first: int, stop: int) -> np.ndarray:
        """(corpus, epoch, window) of samples `first` to `stop`, as int64 [stop - first, 3]."""
        out = np.empty((stop - first, 3), np.int64)
        positions = self._skips.positions(np.arange(first, stop, dtype=np.int64))
        phase_of = np.searchsorted(np.array(self._first), positions, side="right") - 1
        for i in np.unique(phase_of):
            rows = np.flatnonzero(phase_of == i)
            corpora, counts = self._mixtures[i].draw_many(positions[rows] - self._first[i])
            drawn = np.array(self._drawn[i])[corpora] + counts
            windows = np.array(self._windows[i])[corpora]
            epochs, places = np.divmod(drawn, windows)
            for corpus, epoch in {*zip(corpora.tolist(), epochs.tolist(), strict=True)}:
                here = (corpora == corpus) & (epochs == epoch)
                places[here] = self._permutation(i, corpus, epoch).many(places[here])
            out[rows] = np.stack([corpora, epochs, places], 1)
        return out

    def _index(self, position: int) -> int:
        return bisect_right(self._first, position) - 1

    def _permutation(self, phase: int, corpus: int, epoch: int) -> Permutation:
        p = self.phases[phase]
        name = f"{self._seed}/{p.fingerprints[corpus]}/{p.seq_len}/{epoch}"
        return permutation(self._windows[phase][corpus], name)

    def _drawn_at_start(self, i: int) -> tuple[int, ...]:
        before, now = self.phases[i - 1], self.phases[i]
        counts = self._mixtures[i - 1].counts(self._first[i] - self._first[i - 1])
        drawn = []
        for corpus, count in enumerate(counts):
            total = self._drawn[i - 1][corpus] + count
            same = (before.seq_len, before.fingerprints[corpus]) == (now.seq_len, now.fingerprints[corpus])
            if not same:
                epochs = -(-total // self._windows[i - 1][corpus])
                total = epochs * self._windows[i][corpus]
            drawn.append(total)
        return tuple(drawn)


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Windows of `seq_len` tokens, each with the one token more that is its last target.

    Raises:
        UserError: the corpus holds less than one.
    """
    windows = (num_tokens - 1) // seq_len
    if windows < 1:
        raise UserError(
            f"data.seq_len={seq_len}: the corpus has only {num_tokens} tokens; "
            f"at most {max(1, num_tokens - 1)}"
        )
    return windows


class Mixture:
    """Which corpus each position of a phase comes from: a low-discrepancy rule with closed-form counts.

    Corpora are split off one by one: among the first n positions left over by those before it, a corpus
    with share w of their weight gets floor(n w + 1/2). So its count never strays from its weight's by more
    than the number of corpora, and the k-th draw of every corpus is found without a walk.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = math.fsum(weights)
        if not weights or min(weights) < 0 or not total > 0:
            raise UserError(f"data.weights={list(weights)}: numbers of at least 0, one above 0")
        units = [round(w / total * WEIGHT_UNITS) for w in weights]
        units = [max(u, 1) if w > 0 else 0 for u, w in zip(units, weights, strict=True)]
        self._shares = [(unit, sum(units[i:]) or 1) for i, unit in enumerate(units)]

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` positions come from each corpus."""
        out = []
        for share, rest in self._shares:
            out.append((2 * n * share + rest) // (2 * rest))
            n -= out[-1]
        return out

    def draw(self, position: int) -> tuple[int, int]:
        """(corpus, its draws before this one) of a position."""
        n = position
        for corpus, (share, rest) in enumerate(self._shares):
            count = (2 * n * share + rest) // (2 * rest)
            if (2 * (n + 1) * share + rest) // (2 * rest) > count:
                return corpus, count
            n -= count
        raise AssertionError("the last corpus takes what is left")

    def draw_many(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`draw` of every position (int64), as int64 arrays."""
        n = positions.astype(np.int64)
        corpora = np.full(len(n), -1, np.int64)
        counts = np.zeros(len(n), np.int64)
        for corpus, (share, rest) in enumerate(self._shares):
            # n x share is taken in two parts, so that it fits into 64 bits at any n.
            rounds, left = np.divmod(n, rest)
            count = rounds * share + (2 * left * share + rest) // (2 * rest)
            after = rounds * share + (2 * (left + 1) * share + rest) // (2 * rest)
            here = (corpora < 0) & (after > count)
            corpora[here] = corpus
            counts[here] = count[here]
            n -= np.where(corpora < 0, count, 0)
        return corpora, counts


class Permutation:
    """A bijection of range(size), O(1) a look-up: a Feistel network over numbers of two mixed digits.

    Black and Rogaway 2002 ("Ciphers with arbitrary finite domains"), with digits of sizes a and b,
    a x b barely above `size`; the few results beyond it walk on.
    """

    def __init__(self, size: int, name: str) -> None:
        assert size >= 1
        self.size = size
        self._a = math.isqrt(size - 1) + 1
        self._b = -(-size // self._a)
        digest = hashlib.sha512(name.encode()).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        a, b = self._a, self._b
        while True:
            right, left = divmod(index, a)
            for i in range(0, ROUNDS, 2):
                z = (right + self._keys[i]) & _MASK
                z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
                z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
                left = (left + (z ^ (z >> 31)) % a) % a
                z = (left + self._keys[i + 1]) & _MASK
                z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
                z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
                right = (right + (z ^ (z >> 31)) % b) % b
            index = right * a + left
            if index < self.size:
                return index

    def many(self, indices: np.ndarray) -> np.ndarray:
        """The images of many indices, as int64."""
        a, b = np.uint64(self._a), np.uint64(self._b)
        out = indices.astype(np.uint64)
        todo = np.arange(len(out))
        while len(todo):
            right, left = np.divmod(out[todo], a)
            for i in range(0, ROUNDS, 2):
                left = (left + _mixed(right, self._keys[i]) % a) % a
                right = (right + _mixed(left, self._keys[i + 1]) % b) % b
            out[todo] = right * a + left
            todo = todo[out[todo] >= np.uint64(self.size)]
        return out.astype(np.int64)


@lru_cache(maxsize=256)
def permutation(size: int, name: str) -> Permutation:
    """The permutation of range(size) that is called `name`."""
    return Permutation(size, name)


def _mixed(values: np.ndarray, key: int) -> np.ndarray:
    z = values + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))


class _Skips:
    """Sample s -> the s-th position that is in no skipped interval."""

    def __init__(self, intervals: Sequence[tuple[int, int]]) -> None:
        self._samples: list[int] = []  # the first sample that comes after each interval
        self._shifts = [0]
        for first, stop in _merged(intervals):
            self._samples.append(first - self._shifts[-1])
            self._shifts.append(self._shifts[-1] + stop - first)

    def position(self, sample: int) -> int:
        """Of a sample; -1 of the one before the first."""
        if sample < 0:
            return sample
        return sample + self._shifts[bisect_right(self._samples, sample)]

    def positions(self, samples: np.ndarray) -> np.ndarray:
        if not self._samples:
            return samples
        return samples + np.array(self._shifts)[np.searchsorted(self._samples, samples, side="right")]


def skipped_before(skips: Sequence[tuple[int, int]], sample: int) -> list[tuple[int, int]]:
    """The positions that are skipped before `sample`, as half-open intervals: what its place depends on."""
    last = _Skips(skips).position(sample - 1)
    return [(first, stop) for first, stop in _merged(skips) if first <= last]


def _merged(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, stop in sorted((int(a), int(b)) for a, b in intervals):
        if first < 0 or stop <= first:
            raise UserError(f"data.skip={[first, stop]}: pairs of (first, stop) with 0 <= first < stop")
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((first, stop))
    return merged
