"""What the planner's formulas say that a rank's tensors take, beside dry runs of the training program.

Random legal layouts of small models of several families, not compiled, on H100s: sharded, in replicas, with
tensor, context and pipeline parallelism, every schedule, level of ZeRO and kind of recomputation. The figure
is the planner's bytes on the rank that needs most, without what it adds for CUDA and NCCL, over the most that
lives on any kind of rank in the dry run.

    python -m benchmarks.plan_memory [--quick] [--out FILE] [--cases N] [--seed N]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import time
from collections import defaultdict
from typing import Any
from unittest.mock import patch

import torch

import colossus
from colossus.dryrun import ranks
from colossus.dryrun.rank import trace
from colossus.errors import UserError
from colossus.job import load_job
from colossus.layout import ONE_STAGE, SCHEDULES, ZERO_BUBBLE
from colossus.measure.machine import this_machine
from colossus.perf.receipts import Figure, print_figures, write_receipt

AROUND = ("buffers of messages", "context")  # of the planner's parts, what no tensor takes
SIZES = ["model.hidden_size=1024", "model.num_layers=8", "model.num_heads=16", "model.head_dim=64",
         "model.num_kv_heads=8", "model.intermediate_size=2816", "model.vocab_size=32768",
         "data.seq_len=2048", "model.max_seq_len=2048"]  # fmt: skip
LATENT = ["model.hidden_size=1024", "model.num_layers=8", "model.num_heads=16", "model.num_kv_heads=16",
          "model.intermediate_size=2816", "model.vocab_size=32768", "model.latent.q_rank=384",
          "model.latent.kv_rank=128", "model.experts.num_experts=32", "model.experts.per_token=4",
          "model.experts.num_groups=4", "model.experts.groups_per_token=2",
          "model.experts.intermediate_size=512", "data.seq_len=2048", "model.max_seq_len=2048"]  # fmt: skip
FAMILIES: dict[str, list[str]] = {
    "llama": ["model=llama3.1-8b", *SIZES],
    "tied": ["model=llama3.2-1b", *SIZES],
    "qwen3": ["model=qwen3-8b", *SIZES],
    "experts": ["model=mixtral-8x7b", *SIZES],
    "latent": ["model=deepseek-v3", *LATENT],
}
OF_EXPERTS = ("experts", "latent")


def drawn(draw: random.Random, family: str) -> list[str]:
    """Words of a layout, legal or not."""
    one = draw.choice
    axes = {"dp_replicate": one((1, 1, 2)), "dp_shard": one((1, 2, 4, 8)), "tp": one((1, 1, 2, 4)),
            "cp": one((1, 1, 2)), "pp": one((1, 1, 2, 4))}  # fmt: skip
    schedule = one(SCHEDULES) if axes["pp"] > 1 else "1f1b"
    apart = schedule in ZERO_BUBBLE and axes["pp"] > 1
    values: dict[str, Any] = axes | {
        "schedule": schedule,
        "stages_per_rank": 1 if schedule in ONE_STAGE else 2,
        "micro_batch": one((1, 2)),
        "recompute": "none" if apart else one(("none", "selective", "full")),
        "zero": 1 if apart else one((1, 2, 3)),
        "compile": "false",
        "ep": one((1, 2, 4)) if family in OF_EXPERTS else 1,
        "etp": one((1, axes["tp"])) if family in OF_EXPERTS else 1,
    }
    ranks = axes["dp_replicate"] * axes["dp_shard"] * axes["tp"] * axes["cp"] * axes["pp"]
    batch = axes["dp_replicate"] * axes["dp_shard"] * values["micro_batch"] * one((1, 4, 8))
    words = [f"layout.{name}={value}" for name, value in values.items()]
    optimizer = one(("adamw", "muon"))
    words += [f"run.global_batch={batch}", f"optimizer.name={optimizer}", "run.steps=10"]
    return [
        *FAMILIES[family],
        *words,
        "precision.type=bf16",
        "fleet.accelerator=h100-sxm",
        f"fleet.count={ranks}",
    ]


def ratio(words: list[str]) -> tuple[float, dict[str, float], dict[str, int]]:
    """Planned over dry, and both by use. Traces in this process, which no other world has been in."""
    job = load_job(None, words)
    planned = colossus.plan(job).best.memory
    with patch.object(ranks, "traces", lambda wanted, begun: [trace(*each) for each in wanted]):
        dry = colossus.dry_run(job)
    peak = max((judged.traced.peak for judged in dry.ranks), key=lambda peak: peak.num_bytes)
    tensors = {name: value for name, value in planned.items() if name not in AROUND}
    return sum(tensors.values()) / peak.num_bytes, tensors, peak.by_use


def case(seed: str) -> tuple[list[str], float, str]:
    """The words of the first legal layout of those that a seed draws, planned over dry, and what to say."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    while True:
        family = draw.choice(list(FAMILIES))
        words = drawn(draw, family)
        try:
            each, planned, dry = ratio(words)
        except UserError:
            continue
        said = [word.removeprefix("layout.") for word in words if word.startswith("layout.")]
        text = " ".join([f"{each:.3f}", family, *said, *words[-6:-4]])
        if abs(each - 1) > 0.03:
            text += (
                f"\n   plan { ({name: round(value / 2**20) for name, value in planned.items() if value}) }"
            )
            text += f"\n   dry  { ({name: value >> 20 for name, value in dry.items() if value >> 20}) }"
        return [family, *words], each, text


def measure(cases: int, seed: int) -> list[Figure]:
    found: dict[str, list[float]] = defaultdict(list)
    began = time.perf_counter()
    seeds = [f"{seed} {index}" for index in range(cases)]
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        for (family, *words), each, text in pool.imap(case, seeds, chunksize=1):
            print(text, flush=True)
            layout = load_job(None, words).layout
            for name in (
                "all",
                family,
                f"recompute={layout.recompute}",
                f"zero={layout.zero}",
                layout.schedule if layout.pp != 1 else "no pipeline",
            ):
                found[str(name)].append(each)
    figures = [
        Figure("layouts", cases, "layouts"),
        Figure("seconds of a layout", (time.perf_counter() - began) / cases, "s"),
    ]
    for name, ratios in found.items():
        errors = [abs(each - 1) for each in ratios]
        goal = "<= 0.01" if name == "all" else None
        figures.append(Figure(f"{name}: mean error", statistics.mean(errors), f"of {len(errors)}", goal))
        figures.append(Figure(f"{name}: median error", statistics.median(errors), f"of {len(errors)}"))
        figures.append(Figure(f"{name}: largest error", max(errors), f"of {len(errors)}"))
        if name == "all":
            within = sum(error <= 0.01 for error in errors)
            figures.append(Figure("within 1%", within, f"of {len(errors)}"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few layouts")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--cases", type=int, help="layouts; by default 200, quick 4")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures = measure(arguments.cases or (4 if arguments.quick else 200), arguments.seed)
    print_figures(figures)
    write_receipt("plan_memory", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
