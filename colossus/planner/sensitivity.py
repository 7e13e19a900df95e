"""How a plan changes with what was assumed: the size of the fleet, the network, failures, rates."""

from __future__ import annotations

from dataclasses import replace

from colossus.errors import UserError
from colossus.hardware.fleets import Hardware
from colossus.planner.estimate import Problem
from colossus.planner.goodput import DAY, goodput
from colossus.planner.plan import BAND, Plan, costs_of, layouts_of_row
from colossus.planner.search import Limits, refined, search

SHARES = (1, 2, 4, 8)  # of the fleet: all, a half, and so on


def days_by_count(plan: Plan) -> list[tuple[int, float, float]]:
    """(accelerators, days, million dollars) of the best layout on parts of the fleet, failures between few
    and many."""
    found = []
    for share in SHARES:
        count = plan.hardware.count // share
        if count < 1 or len(plan.hardware.pools) > 1:
            break
        hardware = plan.hardware.with_count(count)
        problem = replace(plan.problem, pricer=replace(plan.problem.pricer, hardware=hardware))
        try:
            best = plan.best if share == 1 else search(problem, Limits({}, 0)).choices[0]
        except UserError:
            break
        costs = costs_of(hardware, best, plan.tokens, problem.tokens, sum(hardware.failures) / 2)
        found.append((count, costs.days, costs.money / 1e6))
    return found


def days_if(plan: Plan) -> list[tuple[str, float, float]]:
    """(what, days if it is better, days if it is worse) for the winner as it is."""
    hardware = plan.hardware
    rate = sum(hardware.failures) / 2
    rows = []

    def days(seconds: float, failing: float, fleet: Hardware = hardware) -> float:
        share = goodput(fleet, plan.best.ranks, failing).share
        return plan.tokens / plan.problem.tokens * seconds / share / DAY

    seconds = plan.best.seconds
    rows.append((f"failures: {hardware.failures[0]:g} or {hardware.failures[1]:g} per 1000 node-days",
                 days(seconds, hardware.failures[0]), days(seconds, hardware.failures[1])))  # fmt: skip
    rows.append((f"step time {BAND:.0%} shorter or longer", days(seconds * (1 - BAND), rate),
                 days(seconds * (1 + BAND), rate)))  # fmt: skip
    quick, slow = (replace(hardware, restart_seconds=hardware.restart_seconds * x) for x in (0.3, 2.0))
    rows.append(
        ("restart in a third of the time, or twice", days(seconds, rate, quick), days(seconds, rate, slow))
    )
    if not plan.best.pools:
        for times in (2.0, 4.0):
            worse = replace(hardware, oversubscription=hardware.oversubscription * times)
            rows.append((f"network between pods {times:g} times slower", days(seconds, rate),
                         days(_again(plan, worse), rate)))  # fmt: skip
    return rows


def _again(plan: Plan, hardware: Hardware) -> float:
    """Seconds of the winner's step on other hardware."""
    problem: Problem = replace(plan.problem, pricer=replace(plan.problem.pricer, hardware=hardware))
    return refined(problem, layouts_of_row(plan.best.row), plan.best.compiled).seconds
