"""Pipeline schedules: the order of work of every rank, its exact timeline, and what is held meanwhile.

Orders are those of PyTorch's `distributed.pipelining`, which the trainer runs (a test compares them).
Sources: GPipe (arXiv 1811.06965), 1F1B and its interleaving (arXiv 2104.04473), zero bubble (arXiv
2401.10241), ZB-V (arXiv 2405.15362), DualPipeV (DeepSeek-V3, arXiv 2412.19437, cut in half).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from colossus.layout import INTERLEAVED, V_SHAPED

HALF = 0.3  # of what a layer holds, that the gradients of its inputs take beside it
EXACT_ROUNDS = 4  # of micro-batches, that a timeline takes; the rest repeats them

Work = Literal["F", "B", "I", "W"]  # forward, whole backward, gradients of inputs, of weights


class Action(NamedTuple):
    """A stage's work on a micro-batch. Stages are numbered over the model."""

    work: Work
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Timeline:
    """What a schedule takes. busy, idle: seconds of each rank, [pp]; events: (rank, start, end, action)."""

    seconds: float
    busy: NDArray[np.float64]
    events: tuple[tuple[int, float, float, Action], ...]

    @property
    def idle(self) -> NDArray[np.float64]:
        return self.seconds - self.busy


def stages_of(schedule: str, rank: int, pp: int, per_rank: int) -> list[int]:
    """The stages of a rank: every pp-th, or of V-shaped schedules one from each end."""
    if schedule in V_SHAPED:
        return [rank, 2 * pp - 1 - rank]
    return [rank + pp * i for i in range(per_rank)]


def orders(schedule: str, pp: int, per_rank: int, micro_batches: int) -> list[list[Action]]:
    """The work of each rank, in its order."""
    return [list(order_of(schedule, rank, pp, per_rank, micro_batches)) for rank in range(pp)]


def order_of(schedule: str, rank: int, pp: int, per_rank: int, micro_batches: int) -> Iterable[Action]:
    """The work of one rank, in its order."""
    if schedule == "gpipe":
        return _gpipe(rank, micro_batches)
    if schedule == "zbv_zero_bubble":
        return _zbv(rank, pp, micro_batches)
    if schedule == "dualpipe_v":
        return _dualpipe_v(rank, pp, micro_batches)
    stages = 1 if schedule == "1f1b" else per_rank
    return _one_forward_one_backward(
        rank, pp, stages, micro_batches, zero_bubble=schedule == "interleaved_zero_bubble"
    )


def _gpipe(rank: int, micro_batches: int) -> list[Action]:
    every = range(micro_batches)
    return [Action("F", rank, i) for i in every] + [Action("B", rank, i) for i in every]


def _one_forward_one_backward(
    rank: int, pp: int, per_rank: int, micro_batches: int, zero_bubble: bool
) -> Iterator[Action]:
    """Forward passes until the pipeline is full, then one of each, then what is left of the backward passes.

    Interleaved, a rank takes a round of micro-batches through one of its stages, then through the next.
    """
    in_round = _in_round(pp, micro_batches)
    total = micro_batches * per_rank
    after = (pp - 1 - rank) * (1 if zero_bubble or per_rank == 1 else 2)
    warm = min(total, (per_rank - 1) * in_round + after)
    if per_rank == 1:
        warm = min(micro_batches, pp - rank) - 1
    next_forward: Counter[int] = Counter()
    next_backward: Counter[int] = Counter()
    waiting: list[Action] = []  # gradients of weights that are put off

    def forward(step: int) -> Action:
        stage = rank + pp * (step // in_round % per_rank)
        next_forward[stage] += 1
        return Action("F", stage, next_forward[stage] - 1)

    def backward(step: int) -> Iterator[Action]:
        stage = rank + pp * (per_rank - 1 - step // in_round % per_rank)
        micro_batch = next_backward[stage]
        next_backward[stage] += 1
        if not zero_bubble:
            yield Action("B", stage, micro_batch)
            return
        yield Action("I", stage, micro_batch)
        waiting.append(Action("W", stage, micro_batch))
        if step >= rank:  # so many gradients of weights stay behind, to fill the bubble at the end
            yield waiting.pop(0)

    for step in range(warm):
        yield forward(step)
    for step in range(warm, total):
        yield forward(step)
        yield from backward(step - warm)
    for step in range(total - warm, total):
        yield from backward(step)
    yield from waiting


class _Rank:
    """One rank's counters while an order is written down."""

    def __init__(self, first: int, last: int) -> None:
        self.stages = (first, last)
        self.done: Counter[tuple[str, int]] = Counter()
        self.waiting: list[Action] = []

    def do(self, work: Work, chunk: int) -> Iterator[Action]:
        counted = "I" if work == "B" else work
        micro_batch = self.done[counted, chunk]
        self.done[counted, chunk] += 1
        yield Action(work, self.stages[chunk], micro_batch)

    def backward(self, chunk: int, *, put_off: bool) -> Iterator[Action]:
        """Gradients of the inputs; those of the weights at once, or when `weights` is asked for one."""
        for action in self.do("I", chunk):
            yield action
            later = Action("W", action.stage, action.micro_batch)
            if put_off:
                self.waiting.append(later)
            else:
                yield later

    def weights(self) -> Iterator[Action]:
        if self.waiting:
            yield self.waiting.pop(0)


def _zbv(rank: int, pp: int, micro_batches: int) -> Iterator[Action]:
    """ZB-V: the last stage sits with the first, so that a backward pass starts as soon as a forward ends."""
    least = max(2 * pp - 1, micro_batches)  # the order is written for so many; the others are left out
    for action in _whole_zbv(rank, pp, least):
        if action.micro_batch < micro_batches:
            yield action


def _whole_zbv(rank: int, pp: int, micro_batches: int) -> Iterator[Action]:
    state = _Rank(rank, 2 * pp - 1 - rank)
    for _ in range(2 * (pp - rank) - 1):
        yield from state.do("F", 0)
    for _ in range(rank):
        yield from state.do("F", 1)
        yield from state.do("F", 0)
    for _ in range(pp - rank):
        yield from state.do("F", 1)
        yield from state.backward(1, put_off=False)
    while state.done["F", 1] < state.done["F", 0] or state.done["F", 0] < micro_batches:
        if state.done["F", 0] < micro_batches:
            yield from state.do("F", 0)
        yield from state.backward(0, put_off=False)
        yield from state.do("F", 1)
        yield from state.backward(1, put_off=False)
    late: tuple[list[Action], list[Action]] = ([], [])
    for _ in range(rank):
        for chunk in (0, 1):
            for action in state.do("I", chunk):
                yield action
                late[chunk].append(Action("W", action.stage, action.micro_batch))
    for _ in range(pp - rank):
        for action in state.do("I", 0):
            yield action
            late[0].append(Action("W", action.stage, action.micro_batch))
        yield late[0].pop(0)
    yield from late[1]
    yield from late[0]


def _dualpipe_v(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """DualPipeV, its eight steps; a forward and a backward pass that it runs side by side follow each other
    here, as PyTorch runs them."""
    state, after = _Rank(rank, 2 * pp - 1 - rank), pp - rank - 1
    made: list[Action] = []

    def add(*work: Iterator[Action]) -> None:
        for actions in work:
            made.extend(actions)

    for _ in range(2 * after):
        add(state.do("F", 0))
    for _ in range(rank + 1):
        add(state.do("F", 0), state.do("F", 1))
    for _ in range(after):
        add(state.backward(1, put_off=True))
        add(state.weights())
        add(state.do("F", 1))
    for _ in range(micro_batches - 2 * pp + rank + 1):
        add(state.do("F", 0), state.do("B", 1), state.do("F", 1), state.do("B", 0))
    for _ in range(after):
        add(state.do("B", 1), state.do("F", 1), state.do("B", 0))
    put_off = False
    for i in range(rank + 1):
        for chunk in (1, 0):
            # odd ranks put gradients of weights off from the second half's first chunk on, even ranks from
            # its second
            if i == (rank + 1) // 2 and rank % 2 == chunk:
                put_off = True
            add(state.backward(chunk, put_off=True) if put_off else state.do("B", chunk))
    for _ in range(after):
        add(state.weights())
        add(state.backward(0, put_off=True) if put_off else state.do("B", 0))
    for _ in range(rank + 1):
        add(state.weights())
    return made


def timeline(
    schedule: str,
    pp: int,
    per_rank: int,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    weights: Sequence[float],
    send: float = 0.0,
    own: Mapping[Action, float] | None = None,
) -> Timeline:
    """Runs the orders against each other.

    forward, backward, weights: seconds of each stage, for a micro-batch: gradients of inputs and of weights
    apart. send: seconds until what one rank made is at the next. own: seconds of actions that differ.
    """
    to_do = orders(schedule, pp, per_rank, micro_batches)
    owner = {s: rank for rank in range(pp) for s in stages_of(schedule, rank, pp, per_rank)}
    last = len(owner) - 1
    whole = [i + w for i, w in zip(backward, weights, strict=True)]
    seconds: dict[str, Sequence[float]] = {"F": forward, "B": whole, "I": backward, "W": weights}
    late = [send if s and owner[s - 1] != owner[s] else 0.0 for s in range(last + 1)]  # between s - 1 and s
    never = float("inf")
    forwards = [[never] * micro_batches for _ in owner]  # when a stage's pass of a micro-batch has ended
    gradients = [[never] * micro_batches for _ in owner]
    clock, at, busy = [0.0] * pp, [0] * pp, np.zeros(pp)
    events: list[tuple[int, float, float, Action]] = []
    left = sum(map(len, to_do))
    while left:
        before = left
        for rank in range(pp):
            order, now = to_do[rank], clock[rank]
            for number in range(at[rank], len(order)):
                action = order[number]
                work, stage, i = action
                start = now
                if work == "F":
                    if stage:
                        start = max(now, forwards[stage - 1][i] + late[stage])
                elif work != "W" and stage < last:
                    start = max(now, gradients[stage + 1][i] + late[stage + 1])
                if start == never:
                    break
                now = start + (seconds[work][stage] if own is None else own.get(action, seconds[work][stage]))
                if work == "F":
                    forwards[stage][i] = now
                elif work != "W":
                    gradients[stage][i] = now
                events.append((rank, start, now, action))
                busy[rank] += now - start
                at[rank] += 1
                left -= 1
            clock[rank] = now
        assert left < before, f"{schedule} waits for itself"
    return Timeline(max(clock), busy, tuple(events))


def pipeline_seconds(
    schedule: str,
    pp: int,
    per_rank: int,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    weights: Sequence[float],
    send: float = 0.0,
) -> float:
    """Of all micro-batches: a `timeline` of a few rounds, and what the slowest rank takes for the rest.

    That is the whole timeline's, where all stages take the same and messages nothing.
    """
    few = shortened(schedule, pp, micro_batches)
    line = timeline(schedule, pp, per_rank, few, forward, backward, weights, send)
    if few == micro_batches:
        return line.seconds
    work = [f + b + w for f, b, w in zip(forward, backward, weights, strict=True)]
    slowest = max(sum(work[s] for s in stages_of(schedule, rank, pp, per_rank)) for rank in range(pp))
    return line.seconds + (micro_batches - few) * slowest


def fullest(
    schedule: str, pp: int, per_rank: int, micro_batches: int, layers: tuple[float, ...] | None = None
) -> NDArray[np.float64]:
    """The moments at which a rank may need most, [4, 3, stages]: in a backward pass when it holds the most
    micro-batches, in one when it does after all its stages have gradients of weights; and, of the rank that
    has the last stage (0 of others), the same two at a loss.

    Of each stage how many are held, until the gradients of weights are made; of how many of these the
    gradients of inputs are made by then; and 1 where the stage has gradients of weights.

    layers: of each stage, by which what it holds counts; None: alike.
    """
    held = _held(schedule, pp, per_rank, shortened(schedule, pp, micro_batches), layers)
    return np.array(held, dtype=float)


def shortened(schedule: str, pp: int, micro_batches: int) -> int:
    """Micro-batches after which nothing new happens: the middle of a schedule repeats itself.

    What is left out are whole rounds, of the size that `micro_batches` are cut into.
    """
    if schedule == "gpipe":
        return micro_batches
    in_round = _in_round(pp, micro_batches) if schedule in INTERLEAVED else pp
    left_out = max(0, micro_batches // in_round - EXACT_ROUNDS)
    return micro_batches - left_out * in_round


def _in_round(pp: int, micro_batches: int) -> int:
    """Micro-batches that a rank takes through one of its stages before it turns to the next."""
    return micro_batches // max(1, micro_batches // pp)


Counts = tuple[int, ...]


@lru_cache(maxsize=4096)
def _held(
    schedule: str, pp: int, per_rank: int, micro_batches: int, layers: tuple[float, ...] | None
) -> tuple[tuple[Counts, Counts, Counts], ...]:
    if schedule == "gpipe":
        none, every = (0,) * pp, (1,) * pp
        before = ((micro_batches,) * pp, none, none)
        return before, ((micro_batches - 1,) * pp, none, every), before, (none, none, none)
    stages = pp * per_rank
    size = layers or (1.0,) * stages
    held, half, summed = [0] * stages, [0] * stages, [0] * stages
    found = [[[0] * stages for _ in range(3)] for _ in range(4)]
    for rank in range(pp):
        own = stages_of(schedule, rank, pp, per_rank)
        peaks = [-1.0] * 4
        for work, stage, _ in order_of(schedule, rank, pp, per_rank, micro_batches):
            held[stage] += work == "F"
            half[stage] += work == "I"  # on top, beside what waits for gradients of weights
            now = sum(size[s] * (held[s] + HALF * half[s]) for s in own)
            if work != "F" or stage == stages - 1:
                moment = 2 if work == "F" else 0
                later = all(summed[s] for s in own)
                for index in (moment, moment + 1) if later else (moment,):
                    if now >= peaks[index]:  # the last such moment: sums only become more
                        peaks[index] = now
                        for s in own:
                            found[index][0][s], found[index][1][s] = held[s], half[s]
                            found[index][2][s] = summed[s]
            if work in ("B", "W"):
                held[stage] -= 1
                half[stage] -= work == "W"
                summed[stage] = 1
    return tuple((tuple(a), tuple(b), tuple(c)) for a, b, c in found)


def bubble(
    schedule: str,
    pp: int,
    per_rank: int,
    micro_batches: int,
    forward: float = 1.0,
    backward: float = 1.0,
    weights: float = 1.0,
) -> float:
    """Seconds that a rank waits in a step, where all stages take the same: exact.

    The middle of a schedule repeats itself, so that many micro-batches wait as long as a few rounds do.
    """
    return _bubble(schedule, pp, per_rank, shortened(schedule, pp, micro_batches), forward, backward, weights)


@lru_cache(maxsize=65536)
def _bubble(
    schedule: str, pp: int, per_rank: int, micro_batches: int, forward: float, backward: float, weights: float
) -> float:
    if pp == 1:
        return 0.0
    stages = pp * (per_rank if schedule not in ("gpipe", "1f1b") else 1)
    line = timeline(
        schedule, pp, per_rank, micro_batches,
        [forward] * stages, [backward] * stages, [weights] * stages,
    )  # fmt: skip
    return float(line.seconds - line.busy.max())
