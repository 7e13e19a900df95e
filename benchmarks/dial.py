"""Whether the dial picks a model of about the best size: at three budgets of compute, with two seeds, the
model that it derives against the next smaller and the next larger one, each trained on the same FLOPs.

A neighbour should end worse, or within 1% of the chosen one. Budgets are in model FLOPs, so that the result
does not depend on the machine's speed; the largest is about what five minutes give on two quick cores.

    python -m benchmarks.dial [--quick] [--out FILE] [--budgets FLOPS ...] [--seeds N]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from colossus import api
from colossus.derive import derive_data, dial
from colossus.derive.dial import WIDTH_STEP
from colossus.job import load_job
from colossus.measure.machine import this_machine
from colossus.perf.flops import model_flops_per_token
from colossus.perf.receipts import Figure, print_figures, write_receipt

BUDGETS = (1.5e12, 6e12, 2.4e13)


def final_bits_per_byte(width: int, compute: float, seed: int, folder: Path) -> float:
    """Trains the default model of a width on `compute` FLOPs; bits per byte on the held-out documents."""
    sized = [f"model.hidden_size={width}", f"run.seed={seed}", "run.validate_every=0"]
    resolved = api.resolve(load_job(None, [*sized, "run.tokens=1000000"]))
    tokens = compute / model_flops_per_token(resolved.model, resolved.data.seq_len)
    name = f"{compute:.1e}-{width}-{seed}"
    job = load_job(None, [*sized, f"run.tokens={round(tokens)}", f"run.folder={folder / name}"])
    run = api.train(job)
    assert run.bits_per_byte is not None
    print(f"{name}: {tokens / 1e6:.2f}M tokens, {run.bits_per_byte:.4f} bits per byte", flush=True)
    return run.bits_per_byte


def chosen_width(compute: float) -> int:
    """What the dial picks for a budget."""
    return dial(derive_data(load_job()), lambda arch: compute).arch.hidden_size


def measure(budgets: list[float], seeds: int, folder: Path) -> list[Figure]:
    figures = []
    for compute in budgets:
        chosen = chosen_width(compute)
        bits: dict[int, float] = {}
        for width in (chosen - WIDTH_STEP, chosen, chosen + WIDTH_STEP):
            bits[width] = mean(final_bits_per_byte(width, compute, seed, folder) for seed in range(seeds))
        for width, value in bits.items():
            side = {-1: "smaller", 0: "chosen", 1: "larger"}[(width > chosen) - (width < chosen)]
            name = f"{compute:.1e} FLOPs, {side}: width {width}"
            if side == "chosen":
                figures.append(Figure(name, value, "bits per byte"))
                continue
            ratio = value / bits[chosen]
            figures.append(Figure(name, value, "bits per byte", "ratio >= 0.99", bits[chosen], ratio))
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
