"""How a plan changes with what was assumed: batch, size of the fleet, network, failures, rates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from colossus.errors import UserError
from colossus.hardware.fleets import DAY, Hardware
from colossus.planner.batch import more_tokens
from colossus.planner.estimate import Problem
from colossus.planner.goodput import goodput
from colossus.planner.plan import Plan, costs_of, layouts_of_row
from colossus.planner.search import refined, search

SHARES = (1, 2, 4, 8)  # of the fleet: all, a half, and so on
BATCHES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the plan's
SHAPE = ("tp", "cp", "ep", "etp", "compile")  # of the winner, that other batches keep
PIPELINE = ("pp", "schedule", "stages_per_rank")  # likewise of several pools, which take longer to search


@dataclass(frozen=True)
class AtBatch:
    """The run with another batch. share: of the accelerators that work. more: tokens for the same loss, over
    what small batches need (see `planner.batch`)."""

    sequences: int
    seconds: float
    days: float
    share: float
    more: float


def by_batch(plan: Plan) -> list[AtBatch]:
    """Smaller and larger batches in layouts like the winner's, failures between few and many."""
    batches = sorted({max(1, round(times * plan.global_batch)) for times in BATCHES})
    return [row for batch in batches if (row := _at_batch(plan, batch)) is not None]


def _at_batch(plan: Plan, batch: int) -> AtBatch | None:
    best, hardware = plan.best, plan.hardware
    problem = replace(plan.problem, global_batch=batch)
    if batch != plan.global_batch:
        names = (*SHAPE, *PIPELINE) if best.pools else SHAPE
        shape = {name: best.row[name] for name in names}
        limits = replace(plan.limits, fixed=shape | dict(plan.limits.fixed))
        try:
            best = search(problem, limits).choices[0]
        except UserError:
            return None
    rate = sum(hardware.failures) / 2
    return AtBatch(
        sequences=batch,
        seconds=best.seconds,
        days=costs_of(hardware, best, plan.tokens, problem.tokens, rate).days,
        share=best.ranks / hardware.count,
        more=more_tokens(problem.tokens, plan.tokens),
    )


def days_by_count(plan: Plan) -> list[tuple[int, float, float]]:
    """(accelerators, days, dollars) of the best layout on parts of the fleet, failures between few and many;
    what the job fixes of the layout stays."""
    found = []
    for share in SHARES:
        count = plan.hardware.count // share
        if count < 1 or len(plan.hardware.pools) > 1:
            break
        hardware = plan.hardware.with_count(count)
        problem = replace(plan.problem, pricer=replace(plan.problem.pricer, hardware=hardware))
        try:
            limits = replace(plan.limits, spares=plan.limits.spares // share)
            best = plan.best if share == 1 else search(problem, limits).choices[0]
        except UserError:
            break
        costs = costs_of(hardware, best, plan.tokens, problem.tokens, sum(hardware.failures) / 2)
        found.append((count, costs.days, costs.money))
    return found


def days_if(plan: Plan) -> list[tuple[str, float, float]]:
    """(what, days if it is better, days if it is worse) for the winner as it is; nothing of a run that the
    clock ends."""
    if plan.by_clock:
        return []
    hardware = plan.hardware
    rate = sum(hardware.failures) / 2
    rows = []

    def days(seconds: float, failing: float, fleet: Hardware = hardware) -> float:
        share = goodput(fleet, plan.best.ranks, failing).share
        return plan.tokens / plan.problem.tokens * seconds / share / DAY

    seconds = plan.best.seconds
    low, high = hardware.failures
    if high > 0:
        rows.append(
            (
                f"failures: {low:g} or {high:g} per 1000 days of a server",
                days(seconds, low),
                days(seconds, high),
            )
        )
    band = plan.band.share
    rows.append((f"step time {band:.0%} shorter or longer", days(seconds * (1 - band), rate),
                 days(seconds * (1 + band), rate)))  # fmt: skip
    if high > 0:
        quick, slow = (replace(hardware, restart_seconds=hardware.restart_seconds * x) for x in (0.3, 2.0))
        rows.append(("restart in a third of the time, or twice", days(seconds, rate, quick),
                     days(seconds, rate, slow)))  # fmt: skip
    if not plan.best.pools and plan.best.ranks > hardware.pod:
        for times in (2.0, 4.0):
            worse = replace(hardware, oversubscription=hardware.oversubscription * times)
            rows.append((f"network between pods {times:g} times slower", days(seconds, rate),
                         days(_again(plan, worse), rate)))  # fmt: skip
    return rows


def _again(plan: Plan, hardware: Hardware) -> float:
    """Seconds of the winner's step on other hardware."""
    problem: Problem = replace(plan.problem, pricer=replace(plan.problem.pricer, hardware=hardware))
    return refined(problem, layouts_of_row(plan.best.row), plan.best.compiled).seconds
