"""A layout that the planner found, run dry: the ranks of its pipeline that may need most."""

from __future__ import annotations

from collections.abc import Callable

from colossus.derive.to_plan import laid_out_as
from colossus.dryrun.ranks import dry_run
from colossus.job import Job
from colossus.planner.choice import Choice
from colossus.planner.confirm import Answer, Ask
from colossus.planner.estimate import Problem


def confirm(job: Job, say: Callable[[str], None] = lambda line: None) -> Ask:
    """How the planner asks for layouts of `job`. say: is told what is being traced."""

    def ask(problem: Problem, choice: Choice) -> Answer:
        hardware = problem.pricer.hardware
        stages = {0, choice.rank, choice.row["pp"] - 1}
        run = dry_run(laid_out_as(job, problem, choice), hardware, stages=stages, say=say)
        worst = run.worst
        return Answer(choice, worst.reserved, worst.kind.accelerator.memory, len(run.ranks), worst.fused)

    return ask
