"""Whether the dial picks a model of about the best size: at three budgets of compute, with two seeds, the
model that it derives against the next smaller and the next larger one, each trained on the same FLOPs.

A neighbour should end worse, or within 1% of the chosen one. Budgets are in model FLOPs, so that the result
does not depend on the machine's speed: the largest is about what five minutes give on two cores with AVX2.
Below them it is chance that orders the models: after some two million tokens, sooner with one seed than with
another, a model learns to copy, and its loss falls by a quarter.

    python -m benchmarks.dial [--quick] [--out FILE] [--budgets FLOPS ...] [--seeds N]
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from colossus import api
from colossus.data.prepare import prepare_data
from colossus.derive import derive_data, dial
from colossus.derive.dial import WIDTH_STEP
from colossus.job import load_job
from colossus.measure.machine import this_machine
from colossus.perf.flops import model_flops_per_token
from colossus.perf.receipts import Figure, print_figures, write_receipt

BUDGETS = (1.5e13, 2.1e13, 3e13)


@dataclass(frozen=True)
class Trial:
    """One training: the default model of a width, on `compute` FLOPs."""

    compute: float
    width: int
    seed: int
    folder: Path

    def bits_per_byte(self) -> float:
        """On the held-out documents, at the end. On one thread: trials run side by side, one a core."""
        sized = [
            f"model.hidden_size={self.width}",
            f"run.seed={self.seed}",
            "run.threads=1",
            "run.validate_every=0",
            f"layout.compile={str(this_machine().compiler is not None).lower()}",
        ]
        resolved = api.resolve(load_job(None, [*sized, "run.tokens=1000000"]))
        tokens = round(self.compute / model_flops_per_token(resolved.model, resolved.data.seq_len))
        name = f"{self.compute:.1e}-{self.width}-{self.seed}"
        run = api.train(load_job(None, [*sized, f"run.tokens={tokens}", f"run.folder={self.folder / name}"]))
        assert run.bits_per_byte is not None
        print(f"{name}: {tokens / 1e6:.2f}M tokens, {run.bits_per_byte:.4f} bits per byte", flush=True)
        return run.bits_per_byte


def chosen_width(compute: float) -> int:
    """What the dial picks for a budget."""
    return dial(derive_data(load_job()), lambda arch: compute).arch.hidden_size


def measure(budgets: list[float], seeds: int, folder: Path) -> list[Figure]:
    chosen = {compute: chosen_width(compute) for compute in budgets}
    trials = [
        Trial(compute, width, seed, folder)
        for compute in sorted(budgets, reverse=True)  # the long ones first: the cores end together
        for width in (chosen[compute] + step for step in (-WIDTH_STEP, 0, WIDTH_STEP))
        for seed in range(seeds)
    ]
    prepare_data(api.resolve(load_job(None, ["run.tokens=1000000"])))
    with ProcessPoolExecutor(this_machine().cores, multiprocessing.get_context("spawn")) as pool:
        results = dict(zip(trials, pool.map(Trial.bits_per_byte, trials), strict=True))
    figures = []
    for compute in budgets:
        bits = {
            width: mean(results[Trial(compute, width, seed, folder)] for seed in range(seeds))
            for width in (chosen[compute] + step for step in (-WIDTH_STEP, 0, WIDTH_STEP))
        }
        for width, value in bits.items():
            side = {-1: "smaller", 0: "chosen", 1: "larger"}[
                (width > chosen[compute]) - (width < chosen[compute])
            ]
            name, best = f"{compute:.1e} FLOPs, {side}: width {width}", bits[chosen[compute]]
            if side == "chosen":
                figures.append(Figure(name, value, "bits per byte"))
            else:
                figures.append(Figure(name, value, "bits per byte", "ratio >= 0.99", best, value / best))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one small budget, one seed")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, help="in model FLOPs")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    budgets = [5e11] if arguments.quick else list(arguments.budgets)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(budgets, 1 if arguments.quick else arguments.seeds, Path(folder))
    print_figures(figures)
    write_receipt("dial", figures, arguments.out, hardware=asdict(this_machine()))


if __name__ == "__main__":
    main()
