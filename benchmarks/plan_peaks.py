"""The planner's bytes of a rank beside published peaks of other programs, row by row.

Every complete row of `benchmarks/published/runs.csv` that prints a peak, as its program's formulas have it.
What is compared is what tensors and libraries take (`allocated`), for torchtitan what is reserved, as the
sources print it. Where a row leaves part of its layout open, the mean over what it may have been.

    python -m benchmarks.plan_peaks [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict

from benchmarks.plan_rows import Run, load
from colossus.measure.machine import this_machine
from colossus.perf.price import Pricer
from colossus.perf.receipts import Figure, print_figures, write_receipt
from colossus.planner.columns import Layouts
from colossus.planner.estimate import Problem
from colossus.planner.memory import GIB, memory


def predicted(run: Run) -> float:
    """Bytes."""
    problem = Problem(
        run.arch, run.seq_len, run.global_batch, run.precision, Pricer.of(run.hardware, run.software, None)
    )
    needs = memory(problem, Layouts.of(list(run.variants)))
    return float((needs.reserved if run.source.startswith("torchtitan") else needs.allocated).mean())


def name_of(run: Run) -> str:
    row = run.variants[0]
    axes = " ".join(f"{axis}={row[axis]}" for axis in ("tp", "pp", "cp", "ep") if row.get(axis, 1) != 1)
    return f"{run.id} {run.group}, {run.seq_len:,} tokens, {axes or 'data parallel'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the first ten rows")
    parser.add_argument("--out", help="the receipt")
    arguments = parser.parse_args()
    runs = [run for run in load() if run.peak_bytes][: 10 if arguments.quick else None]
    figures, errors = [], defaultdict(list)
    for run in runs:
        assert run.peak_bytes is not None
        found = predicted(run)
        ratio = found / run.peak_bytes
        figures.append(Figure(name_of(run), found / GIB, "GiB", peer=run.peak_bytes / GIB, ratio=ratio))
        for group in ("all", run.source.partition("(")[0].strip()):
            errors[group].append(ratio - 1)
    for group, each in errors.items():
        figures.append(Figure(f"{group}: mean error", statistics.mean(map(abs, each)), f"of {len(each)}"))
        figures.append(Figure(f"{group}: mean of signed errors", statistics.mean(each), f"of {len(each)}"))
    print_figures(figures)
    write_receipt("plan_peaks", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
