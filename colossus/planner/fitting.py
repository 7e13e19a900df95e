"""The quickest layouts that fit: priced by columns, then looked at from the quickest on, with as few layers
recomputed as their memory asks for."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from colossus.planner.columns import ALL, Layouts
from colossus.planner.estimate import Problem, estimate, shapes_of
from colossus.planner.memory import memory
from colossus.planner.space import NONE, Limits, legal

SHAPE = ("tp", "cp", "pp", "ep")
CHUNK = 65536  # layouts that are priced at once
SAMPLE = 16  # every so manieth layout is priced before all others
FIRST, MOST = 512, 8192  # layouts whose memory is computed at once, from the quickest on
LEAST_SECONDS = 10.0  # that a search may take
SLOW_CORE = 50_000  # layouts a second that a slow core prices which it has for itself
PATIENCE = 3.0  # times the seconds of such a core, after which the best so far is the answer


@dataclass
class Search:
    """How far a search is. priced: layouts. complete: false once time ran out before all were looked at."""

    began: float = field(default_factory=time.monotonic)
    seconds: float = LEAST_SECONDS
    priced: int = 0
    complete: bool = True

    def expect(self, layouts: int) -> None:
        """More time, for so many more layouts."""
        self.seconds += PATIENCE * layouts / SLOW_CORE

    def is_late(self) -> bool:
        """Whether to answer now; the search is no longer complete then."""
        late = time.monotonic() - self.began > self.seconds
        self.complete &= not late
        return late


@dataclass(frozen=True)
class Priced:
    """Layouts with their seconds by closed form, [N]; infinite where time ran out before."""

    layouts: Layouts
    seconds: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> Priced:
        return Priced(self.layouts.take(index), self.seconds[index])

    def of_each_shape(self, most: int) -> Priced:
        """The quickest of each way to cut a replica (tp, cp, pp, ep), at most so many."""
        known = self.take(np.isfinite(self.seconds))
        shape = np.zeros(len(known), dtype=np.int64)
        for name in SHAPE:
            shape = shape * 4096 + known.layouts[name].astype(np.int64)
        order = np.lexsort((known.seconds, shape))
        starts = np.searchsorted(shape[order], shape[order], side="left")
        return known.take(order[np.arange(len(order)) - starts < most])

    def best(self, most: int) -> Priced:
        """The quickest, in their order."""
        known = int(np.isfinite(self.seconds).sum())
        return self.take(np.argsort(self.seconds, kind="stable")[: min(most, known)])


def price(problem: Problem, layouts: Layouts, search: Search) -> Priced:
    """All of them, or a sample of all and as many more as there is time for."""
    seconds = np.full(len(layouts), np.inf)
    search.expect(len(layouts))
    every = np.arange(len(layouts))
    first = every[::SAMPLE] if len(layouts) > CHUNK else every[:0]
    rest = np.delete(every, first)
    parts = [part for part in (first, *np.split(rest, range(CHUNK, len(rest), CHUNK))) if len(part)]
    for number, part in enumerate(parts):
        if number and search.is_late():
            break
        seconds[part] = estimate(problem, layouts.take(part)).seconds
        search.priced += len(part)
    return Priced(layouts, seconds)


def fits(problem: Problem, layouts: Layouts, limits: Limits) -> NDArray[np.bool_]:
    """Which ones the memory has room for."""
    needs = memory(problem, layouts)
    room = needs.fits(problem.pricer.hardware.accelerator)
    return np.asarray(room & (needs.parts["activations"] <= limits.activation_bytes))


def fitting(
    problem: Problem, priced: Priced, limits: Limits, wanted: int, compiled: bool, search: Search
) -> Priced:
    """The quickest that fit, at most `wanted`, in their order.

    Where nothing says what is recomputed, a layout that does not fit is tried with the fewest layers of each
    stage recomputed, selectively or in full, with which it does: it can't be quicker than as it was.
    """
    order = np.argsort(priced.seconds, kind="stable")
    order = order[np.isfinite(priced.seconds[order])]
    best = priced.take(order[:0])
    start, size = 0, FIRST
    while start < len(order):
        rows = priced.take(order[start : start + size])
        enough = len(best) == wanted and best.seconds[-1] <= rows.seconds[0]
        if enough or (len(best) and search.is_late()):
            break
        room = fits(problem, rows.layouts, limits)
        found = [best, rows.take(room)]
        again = rows.layouts.take(~room & (rows.layouts["recompute"] == NONE))
        for recompute in limits.kinds:
            some = with_fewest_layers(problem, again, recompute, limits, compiled)
            if len(some):
                search.priced += len(some)
                found.append(Priced(some, estimate(problem, some).seconds))
        several = [part for part in found if len(part)]
        if several:
            joined = Layouts.joined([part.layouts for part in several])
            best = Priced(joined, np.concatenate([part.seconds for part in several])).best(wanted)
        start, size = start + size, min(2 * size, MOST)
    return best


def with_fewest_layers(
    problem: Problem, layouts: Layouts, recompute: float, limits: Limits, compiled: bool
) -> Layouts:
    """Those of `layouts` that fit with some layers of each stage recomputed, with the fewest for which they
    do."""
    again = layouts.with_columns(recompute=np.full(len(layouts), recompute))
    again = legal(problem, again, compiled)
    if not len(again):
        return again
    again = again.take(fits(problem, again, limits))
    if not len(again):
        return again
    most = np.ones(len(again), dtype=np.int64)
    for (schedule, pp, per_rank), index in shapes_of(again).items():
        most[index] = problem.shape(schedule, pp, per_rank).most_layers
    few, enough = np.zeros_like(most), most.copy()  # so many do not suffice; so many do
    while (open_ := np.nonzero(enough - few > 1)[0]).size:
        middle = (few[open_] + enough[open_]) // 2
        tried = again.take(open_).with_columns(recompute_layers=middle)
        room = fits(problem, tried, limits)
        enough[open_] = np.where(room, middle, enough[open_])
        few[open_] = np.where(room, few[open_], middle)
    return again.with_columns(recompute_layers=np.where(enough == most, ALL, enough))
