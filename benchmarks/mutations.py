"""Whether comparisons with one rank notice what goes wrong: every mutation, by how much it deviates.

Each mutation switches off one reduction, or brings back a trap of PyTorch, in the processes of the ranks; the
comparison that `benchmarks.parity` makes of the same layout must find it. A training that fails outright is
noticed as well.

    python -m benchmarks.mutations [--quick] [--out FILE] [--only WORDS]
"""

from __future__ import annotations

import argparse
import math
import sys

from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt
from tests.ranks.mutations import MUTATIONS
from tests.ranks.pool import Pool

MOST = 1e18  # stands for a training that failed, or gave no number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="three of them, nothing compiled")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--only", default="", help="those whose name contains these words")
    arguments = parser.parse_args()
    machine = this_machine()
    chosen = [m for m in MUTATIONS.values() if arguments.only in m.name]
    if arguments.quick:
        chosen = [m for m in chosen if not m.compiled][:3]
    figures = []
    with Pool() as pool:
        for mutation in chosen:
            deviation = mutation.deviation(pool)
            said = "training failed" if math.isinf(deviation) else f"{deviation:.1e} times what is allowed"
            print(f"{mutation.name} ({mutation.case}): {said}", flush=True)
            figures.append(Figure(mutation.name, min(deviation, MOST), "times what is allowed", "> 1"))
    missed = sum(figure.value <= 1 for figure in figures)
    figures += [
        Figure("mutations", len(chosen), "mutations"),
        Figure("mutations that were not noticed", missed, "mutations", "0"),
    ]
    print()
    print_figures(figures)
    write_receipt("mutations", figures, arguments.out, machine.to_dict())
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
