"""How quickly `plan` searches: `python -m benchmarks.plan_speed [--quick] [--out FILE]`.

Seconds of one core's own time (so that other programs on the machine count for nothing), from a parsed job to
a plan, and layouts priced a second.
"""

from __future__ import annotations

import argparse
import time

from colossus import api
from colossus.job import load_job
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt

CASES = (
    ("405B on 100,000 H100", "model=llama3.1-405b", "fleet=colossus-100k", "under 5 s"),
    ("405B on 150,000 H100 and 50,000 H200", "model=llama3.1-405b", "fleet=colossus-200k", "under 15 s"),
    ("405B on 24,576 H100", "model=llama3.1-405b", "fleet=llama3-24k", None),
    ("DeepSeek-V3 on 2,048 H800", "model=deepseek-v3", "fleet=deepseek-2k", None),
    ("Grok-1 on 512 H100", "model=grok-1", "fleet=dgx-h100-64", None),
    ("8B on 8 H100, all layouts", "model=llama3.1-8b", "fleet=dgx-h100-1", None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first two alone")
    parser.add_argument("--out", help="write a receipt")
    arguments = parser.parse_args()
    figures = []
    for name, model, fleet, goal in CASES[: 2 if arguments.quick else None]:
        job = load_job(None, [model, fleet, "run.tokens=15e12"])
        began = time.process_time()
        made = api.plan(job)
        seconds = time.process_time() - began
        print(
            f"{name}: {made.best.name}, {made.best.seconds:.3g} s a step, MFU {100 * made.best.mfu:.1f}%",
            flush=True,
        )
        figures.append(Figure(f"{name}: search", seconds, "s", goal))
        goal = "at least 100,000" if goal else None
        figures.append(Figure(f"{name}: priced", made.priced / seconds, "layouts/s", goal))
    print_figures(figures)
    write_receipt("plan_speed", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
