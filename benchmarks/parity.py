"""Whether every layout trains as one rank does: the whole matrix, and layouts drawn at random.

Each row takes a few steps of a tiny model in real processes (gloo, on this machine's processor) and on one
rank, and compares losses, gradient norms, every parameter's gradient of the first step and every parameter's
final value, by norm. float64 decides; fp32, bf16 and compiled layers are samples. Losses in bf16 may deviate
by 3 times what one rank deviates from itself by where it takes the batch in parts, and by 2e-3 at most;
gradients by 3 times what bf16 costs one rank.

    python -m benchmarks.parity [--quick] [--out FILE] [--random N] [--only WORDS]
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import combinations

from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt
from tests.ranks.cases import Case, compare
from tests.ranks.matrix import SECTIONS, axes_above_one, random_case
from tests.ranks.pool import Pool

RANDOM = 60
COLUMNS = ("loss", "grad_norm", "gradients", "weights")


def rows(quick: bool, num_random: int, only: str) -> dict[str, list[Case]]:
    sections = dict(SECTIONS) | {"drawn at random": [random_case(seed) for seed in range(num_random)]}
    if quick:
        sections = {name: cases[:1] for name, cases in sections.items() if name != "compiled"}
    return {name: [c for c in cases if only in f"{name} {c}"] for name, cases in sections.items()}


def line(name: str, found: dict[str, tuple[float, float]] | None, seconds: float) -> str:
    if found is None:
        return f"{name:<110} FAILED"
    cells = [f"{found[c][0]:9.1e}" if c in found else " " * 9 for c in COLUMNS]
    worst = max(value / allowed for value, allowed in found.values())
    return f"{name:<110} {' '.join(cells)} {worst:9.1e} {seconds:5.1f} s{'  ABOVE' * (worst > 1)}"


def compared(pool: Pool, case: Case) -> tuple[str, dict[str, tuple[float, float]] | None]:
    """A line of the table, and what was found; None where it failed."""
    began = time.monotonic()
    try:
        found = compare(pool, case)
    except AssertionError as error:
        return f"{line(str(case), None, 0.0)}\n{error}", None
    return line(str(case), found, time.monotonic() - began), found


def figures(section: str, cases: list[Case], pool: Pool) -> list[Figure]:
    """Prints the rows of a section; its largest deviations, by type, as shares of what is allowed."""
    print(f"\n{section:<110} {' '.join(f'{c:>9}' for c in COLUMNS)}  of allowed", flush=True)
    worst: dict[str, float] = {}
    failed = 0
    for case in cases:
        text, found = compared(pool, case)
        print(text, flush=True)
        failed += found is None
        for name, (value, allowed) in (found or {}).items():
            key = f"{section}, {case.type}: {name}"
            worst[key] = max(worst.get(key, 0.0), value / allowed)
    made = [Figure(f"{section}: layouts that failed", failed, f"of {len(cases)}", "0")]
    return made + [Figure(key, value, "of what is allowed", "<= 1") for key, value in worst.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one layout of each section, nothing compiled")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--random", type=int, help=f"layouts drawn at random; default: {RANDOM}, 1 if quick")
    parser.add_argument("--only", default="", help="rows whose section or layout contains these words")
    arguments = parser.parse_args()
    machine = this_machine()
    num_random = arguments.random if arguments.random is not None else 1 if arguments.quick else RANDOM
    sections = rows(arguments.quick, num_random, arguments.only)
    found: list[Figure] = []
    with Pool() as pool:
        for name, cases in sections.items():
            found += figures(name, cases, pool) if cases else []
    cases = [case for of_section in sections.values() for case in of_section]
    pairs = {pair for case in cases for pair in combinations(axes_above_one(case), 2)}
    wrong = sum(f.value > (1 if f.goal == "<= 1" else 0) for f in found)
    layouts = len({(case.layout, case.arch.experts is None) for case in cases})
    goal = None if arguments.quick or arguments.only else ">= 60"
    found += [
        Figure("layouts", layouts, "layouts", goal),
        Figure("comparisons with one rank", len(cases), "trainings"),
        Figure("pairs of axes above 1 together", len(pairs), "of 15"),
        Figure("figures above what is allowed", wrong, "figures", "0"),
    ]
    print()
    print_figures(found)
    write_receipt("parity", found, arguments.out, machine.to_dict())
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
