"""A layout that the planner found, run dry: the ranks of its pipeline that may need most."""

from __future__ import annotations

from collections.abc import Callable

from colossus.derive.to_plan import laid_out_as
from colossus.dryrun.ranks import Judged, dry_run, fused_bytes
from colossus.job import Job
from colossus.planner.choice import Choice
from colossus.planner.confirm import Answer, Ask
from colossus.planner.estimate import Problem
from colossus.planner.plan import layouts_of_row


def confirm(job: Job, say: Callable[[str], None] = lambda line: None) -> Ask:
    """How the planner asks for layouts of `job`. say: is told what is being traced."""

    def ask(problem: Problem, choice: Choice) -> Answer:
        hardware = problem.pricer.hardware
        stages = {0, choice.rank, choice.row["pp"] - 1}
        run = dry_run(laid_out_as(job, problem, choice), hardware, stages=stages, say=say)
        needs = [(judged, judged.reserved - _fused(problem, choice, judged)) for judged in run.ranks]
        judged, reserved = min(needs, key=lambda each: each[0].kind.accelerator.memory - each[1])
        return Answer(choice, reserved, judged.kind.accelerator.memory, len(run.ranks))

    return ask


def _fused(problem: Problem, choice: Choice, judged: Judged) -> float:
    """Bytes that compiled layers need less on a pool's ranks."""
    if not choice.compiled:
        return 0.0
    pools = {pool.accelerator: pool for pool in choice.pools}
    pool = pools.get(judged.kind.accelerator.name)
    own = {} if pool is None else {"micro_batch": pool.micro_batch, "recompute": pool.recompute}
    return fused_bytes(problem, layouts_of_row(choice.row | own))
