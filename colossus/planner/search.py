"""The search: all legal layouts priced by columns, the best of those that fit refined by the exact timeline
of their pipeline; unequal pools share the batch by their speed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from colossus.errors import UserError
from colossus.layout import AXES, RULES, SIMPLEST, in_words
from colossus.planner.choice import Choice, PoolShare, all_refined, refined
from colossus.planner.estimate import Problem
from colossus.planner.fitting import Priced, Search, fits, fitting, price
from colossus.planner.formulas import RECOMPUTE
from colossus.planner.pools import shared
from colossus.planner.space import Limits, facts_of, layouts_of
from colossus.words import plural

REFINED = 16  # layouts whose pipeline is run in time, compiled and not
FEW = 4  # of them where time ran out
UNBOUND = 4  # the quickest, whether they fit or not
WORTH = 1.1  # times the seconds of the best so far, up to which others are
LEAN = {"recompute": 2.0, "micro_batch": 1, "zero": 3, "schedule": "1f1b"}  # what needs least memory
OTHERS, OF_SHAPE = 12, 4  # layouts of other shapes that are run in time too; looked at of each shape
FAR = 1.5  # times the seconds of the best, up to which other shapes are worth a look
KIND = ("tp", "cp", "pp", "ep", "recompute")  # layouts that differ in nothing else are one choice
SHOWN = (*AXES, "ep", "etp", "schedule", "stages_per_rank", "micro_batch")  # of a row of the table
LEANER = 0.9  # times the memory, up to which what recomputes more and is slower is another choice
OF_A_KIND = 2  # choices that differ in the ranks of the pipeline alone
TABLE = 8  # layouts that a report shows
RESERVE_WORTH = 2.0  # times its share of the accelerators, that a reserve may cost of a step's seconds


@dataclass(frozen=True)
class Found:
    """What a search found, the best first.

    priced: layouts. unbound: the quickest if memory were no limit. all_working: seconds of the best layout
    that leaves no accelerator for the reserve, where there is to be one; infinite where none fits. complete:
    false where time ran out before all layouts were looked at.
    """

    choices: tuple[Choice, ...]
    priced: int
    unbound: Choice
    all_working: float = float("inf")
    complete: bool = True


class NothingFits(UserError):
    """No legal layout fits the memory of the fleet. The command line ends with exit code 1."""


def search(problem: Problem, limits: Limits) -> Found:
    """The best layouts for a model on a fleet.

    Accelerators stay in reserve where that costs little, and all work where the user's layout takes all.

    Raises:
        UserError: what is fixed breaks a rule; NothingFits: no layout fits, or none is legal.
    """
    _check_fixed(problem, limits)
    if len(problem.pricer.hardware.pools) > 1:
        return _of_pools(problem, limits)
    count, run = problem.pricer.hardware.count, Search()
    resting, working = _Side(), _Side()
    fixed = limits.fixed.get("compile")
    for compiled in (True, False) if fixed is None else (bool(fixed),):
        mine = problem.as_ours(compiled)
        space = layouts_of(mine, count, limits, compiled=compiled)
        if not len(space):
            continue
        priced = price(mine, space, run)
        rests = space.ranks <= count - limits.spares
        resting.look(mine, priced.take(rests), limits, compiled, run)
        quicker = priced.take(~rests & (priced.seconds < resting.seconds))
        working.look(mine, quicker, limits, compiled, run)
    if not resting.choices and not working.choices:
        raise NothingFits(_why(problem, limits, run.priced))
    first, second = resting, working
    cost = RESERVE_WORTH * limits.spares / count
    if working.seconds < (1 - cost) * resting.seconds:
        first, second = working, resting
    choices = sorted(first.choices, key=lambda choice: choice.seconds)
    choices += [c for c in second.choices if c.seconds >= choices[0].seconds]
    choices.sort(key=lambda choice: choice.seconds)
    assert first.unbound is not None
    return Found(
        choices=tuple(_distinct(choices)[:TABLE]),
        priced=run.priced,
        unbound=first.unbound,
        all_working=working.seconds,
        complete=run.complete,
    )


class _Side:
    """The best of one part of the layouts."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []
        self.unbound: Choice | None = None

    @property
    def seconds(self) -> float:
        """Of the best."""
        return min((choice.seconds for choice in self.choices), default=float("inf"))

    def look(self, problem: Problem, priced: Priced, limits: Limits, compiled: bool, run: Search) -> None:
        quickest = priced.best(UNBOUND)
        if not len(quickest):
            return
        best = fitting(problem, priced, limits, REFINED, compiled, run)
        best = best.take(best.seconds <= WORTH * self.seconds)
        if run.is_late():
            best, quickest = best.best(FEW), quickest.best(1)
        found = all_refined(problem, best.layouts, compiled) if len(best) else []
        self.choices += found
        unbound = list(found)
        if not len(best) or quickest.seconds[0] < best.seconds[0]:  # it does not fit as it is
            unbound += all_refined(problem, quickest.layouts, compiled)
        unbound += [] if self.unbound is None else [self.unbound]
        self.unbound = min(unbound, key=lambda choice: choice.seconds)
        if len(best) and not run.is_late():
            others = self.others(problem, priced, limits, compiled, run)
            self.choices += all_refined(problem, others.layouts, compiled) if len(others) else []

    def others(self, problem: Problem, priced: Priced, limits: Limits, compiled: bool, run: Search) -> Priced:
        """What else fits: the quickest of each kind that there is no choice of yet."""
        near = priced.take(priced.seconds <= FAR * self.seconds).of_each_shape(OF_SHAPE)
        found = fitting(problem, near, limits, len(near) * (1 + len(limits.kinds)), compiled, run)
        seen = {_kind(choice.row) for choice in self.choices}
        kept = []
        for i in range(len(found)):
            kind = _kind(found.layouts.row(i))
            if kind not in seen:
                seen.add(kind)
                kept.append(i)
        return found.take(np.array(kept[:OTHERS], dtype=np.intp))


def _kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KIND)


def _distinct(choices: list[Choice]) -> list[Choice]:
    """The best of each kind, few that differ in the ranks of the pipeline alone, and of those that differ in
    what they recompute alone the ones that need clearly less memory."""
    seen: set[tuple[Any, ...]] = set()
    alike: dict[tuple[Any, ...], int] = defaultdict(int)
    least: dict[tuple[Any, ...], float] = defaultdict(lambda: float("inf"))  # memory, of what is quicker
    kept = []
    for choice in choices:
        kind = _kind(choice.row)
        rest = tuple(choice.row[name] for name in KIND if name != "pp")
        shown = tuple(choice.row[name] for name in SHOWN)
        leaner = choice.reserved < LEANER * least[shown]
        if kind not in seen and alike[rest] < OF_A_KIND and leaner:
            least[shown] = choice.reserved
            seen.add(kind)
            alike[rest] += 1
            kept.append(choice)
    return kept


def _fixed_row(limits: Limits) -> dict[str, Any]:
    """What the user fixed, as rules read it."""
    return {
        name: int(value) if isinstance(value, (bool, float)) else value
        for name, value in limits.fixed.items()
        if name in SIMPLEST
    }


def _broken(problem: Problem, row: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    """What is wrong with fixed fields, at the first shape of the run where it is, in the words of rules."""
    rows = [{**row, **shape} for shape in problem.occurring()]
    rules = (rule for rule in RULES if rule.asks <= rows[0].keys() and rule.asks & fixed.keys())
    return in_words(rules, [{**SIMPLEST, **each} for each in rows])


def _check_fixed(problem: Problem, limits: Limits) -> None:
    """Raises `UserError` where what the user fixed can be in no layout, in the words of the rules."""
    fixed = _fixed_row(limits)
    facts = facts_of(problem, bool(fixed.get("compile")))
    if fixed.get("compile") is None:
        del facts["compile"]
    said = _broken(problem, facts | fixed, fixed)
    if said:
        raise UserError("\n".join(said))
    ranks = int(np.prod([fixed.get(axis, 1) for axis in AXES]))
    count = problem.pricer.hardware.count
    if ranks > count:
        words = " x ".join(f"layout.{axis}={fixed[axis]}" for axis in AXES if fixed.get(axis, 1) > 1)
        raise NothingFits(f"{words}: {plural(ranks, 'rank')}; at most fleet.count={count:,}")


def _why(problem: Problem, limits: Limits, priced: int) -> str:
    """What keeps every layout out, and the smallest fleet that works."""
    hardware = problem.pricer.hardware
    part, model = hardware.accelerator, problem.arch.preset or "the model"
    least = smallest_fleet(problem)
    if least is not None and least <= hardware.count:
        words = " ".join(f"layout.{name}={_plain(name, value)}" for name, value in limits.fixed.items())
        seen = "legal" if not priced else "both legal and small enough"
        said = (
            f"fleet.count={hardware.count}: with {words or 'nothing fixed'}, no layout of {model} is {seen}"
        )
        row = _fixed_row(limits)
        whole = {**SIMPLEST, **facts_of(problem, compiled=False), **row}
        alone = [] if priced else _broken(problem, whole, row)
        return f"{said}; leave some open" + "".join(f"\n{line}" for line in alone)
    name, them = (part.title, "machines like it") if part.device == "cpu" else (part.name, "them")
    words = f"fleet.count={hardware.count}: {model} fits no layout in {part.memory / 2**30:.0f} GiB of {name}"
    if least is None:
        return f"{words}; memory binds, and no larger fleet of {them} helps"
    return (
        f"{words}; memory binds: {least} {'of them' if them == 'them' else them} are the fewest that hold it"
    )


def _plain(name: str, value: Any) -> Any:
    """As the user wrote it."""
    names = {number: word for word, number in RECOMPUTE.items()}
    return names[int(value)] if name == "recompute" else str(value).lower()


def smallest_fleet(problem: Problem, most: int = 65536) -> int | None:
    """The fewest accelerators, by powers of two and then by servers, on which a layout fits; None beyond
    `most`."""
    hardware = problem.pricer.hardware

    def holds(count: int) -> bool:
        mine = problem.as_ours(True).on(hardware.with_count(count))
        limits = Limits(LEAN)
        space = layouts_of(mine, count, limits, compiled=True)
        parts = (space.take(slice(start, start + 4096)) for start in range(0, len(space), 4096))
        return any(fits(mine, part, limits).any() for part in parts)

    size = hardware.node_size
    count = 1
    while count <= most and not holds(count):
        count *= 2
    if count > most:
        return None
    low = count // 2
    step = 1 if count <= size else size
    for candidate in range(low + step, count, step):
        if count > 16 * size:
            break
        if holds(candidate):
            return candidate
    return count


def _of_pools(problem: Problem, limits: Limits) -> Found:
    """Replicas of one shape on every pool: see `pools.shared`."""
    run = Search()
    choices, unbound = shared(problem, limits, REFINED, run)
    if not choices:
        largest = max(problem.pricer.hardware.pools, key=lambda pool: pool.count)
        alone = problem.on(replace(problem.pricer.hardware, pools=(largest,)))
        raise NothingFits(_why(alone, limits, run.priced))
    choices.sort(key=lambda choice: choice.seconds)
    return Found(tuple(_distinct(choices)[:TABLE]), run.priced, unbound or choices[0], complete=run.complete)


def fixed_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a layout that the user gave, as the space reads them."""
    found = {name: value for name, value in values.items() if value is not None}
    if "recompute" in found:
        found["recompute"] = float(RECOMPUTE[found["recompute"]])
    return found


__all__ = ["Choice", "Found", "Limits", "NothingFits", "PoolShare", "fixed_of", "refined", "search"]
