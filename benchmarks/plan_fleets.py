"""The plan's best for the largest fleets, asked of the training program by dry runs, beside what an earlier
build claimed for layouts that do not fit.

That build (commit 5d44f60) planned 405B on colossus-100k at 12,288 sequences a step with an MFU of 38.8%, and
on colossus-200k at 24,576 with 38.7%; the first of these layouts needs 182 GiB of 79. The goal is those
claims, less three points, at the same batch. Each is planned at the batch that a plan chooses by itself, too.

    python -m benchmarks.plan_fleets [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import time

import colossus
from colossus.job import load_job
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt

GIB = 2**30
CLAIMED = {"colossus-100k": (12_288, 0.3876), "colossus-200k": (24_576, 0.3871)}  # sequences, MFU
LESS = 0.03


def of_fleet(fleet: str, batch: int | None, goal: float | None) -> list[Figure]:
    words = ["model=llama3.1-405b", f"fleet={fleet}", "run.tokens=15e12"]
    began = time.perf_counter()
    made = colossus.plan(
        load_job(None, [*words, *([f"run.global_batch={batch}"] if batch else [])]), confirm=True
    )
    seconds, best = time.perf_counter() - began, made.confirmed.best
    name = f"{fleet}, {made.problem.global_batch:,} sequences a step{' by itself' if batch is None else ''}"
    print(f"{name}: {made.best.name}, {len(made.confirmed.refused)} refused before it", flush=True)
    assert best is not None, "no layout fits by dry runs"
    return [
        Figure(f"{name}: MFU", made.best.mfu, "", None if goal is None else f">= {goal:.4f}"),
        Figure(f"{name}: by dry runs", best.reserved / GIB, "GiB", f"<= {best.capacity / GIB:.1f}"),
        Figure(f"{name}: by formulas", made.best.reserved / GIB, "GiB"),
        Figure(f"{name}: to plan and ask", seconds, "s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the smaller fleet at one batch alone")
    parser.add_argument("--out", help="the receipt")
    arguments = parser.parse_args()
    figures = []
    for fleet, (batch, claim) in list(CLAIMED.items())[: 1 if arguments.quick else None]:
        figures += of_fleet(fleet, batch, claim - LESS)
        if not arguments.quick:
            figures += of_fleet(fleet, None, None)
    print_figures(figures)
    write_receipt("plan_fleets", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
