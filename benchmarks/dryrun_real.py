"""What a dry run says, beside real ranks that do it: the tests' matrix of layouts, a larger tiny model.

Each job takes two steps in real processes (gloo, on this machine's processor); in the second every message
and every product is heard. The dry run of every rank must have the same messages (operation, bytes, ranks) in
the same order, the same FLOPs, the same bytes of weights, gradients and optimizer. The most that lives, which
may differ by 1%, is compared with what PyTorch's allocator says of the same step on real tensors in a group
that talks to nobody: gloo's own copies of what it sums, a fifth of such small steps, are not the program's.
In bf16 a processor's products have scratch memory that fakes have not. Tokens visit experts in turns, as dry
runs take it.

    python -m benchmarks.dryrun_real [--quick] [--out FILE] [--only WORDS]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from colossus.dryrun import fake
from colossus.dryrun.rank import Traced
from colossus.job import Job
from colossus.measure.machine import this_machine
from colossus.models.router import Router
from colossus.parallel import expert
from colossus.perf.receipts import Figure, print_figures, write_receipt
from tests.dryrun.programs import ROW_COUNTS, Done, allocated, dry_gradients, really
from tests.ranks import matrix
from tests.ranks.cases import Case
from tests.ranks.pool import Pool

SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048}
SEQ_LEN = 256
CASES = [*matrix.ALONE[::2], *matrix.PAIRS[::2], *matrix.PIPELINES[::3], *matrix.MANY, *matrix.OPTIONS[::2]]


def cases(only: str) -> list[Case]:
    """Documents say nothing of their ends to fakes; what is asked for twice is asked once."""
    found: dict[str, Case] = {}
    for case in CASES:
        if not case.packed and case.layout:
            large = dict(case.changed) | SIZES
            of_type = "bf16" if len(found) % 2 else "fp32"
            made = dataclasses.replace(
                case, changed=tuple(large.items()), type=of_type, seq_len=SEQ_LEN, packed=False
            )
            found[str(made)] = made
    return [case for name, case in found.items() if only in name]


def real(job: Job) -> Done:
    """As this rank of real ones."""
    with in_turns():
        return really(job)


def most(job: Job, rank: int) -> int:
    """Bytes at once, by the allocator, of rank `rank` among ranks that say nothing: what others would have
    counted is what this one has."""
    with (
        in_turns(),
        patch.object(expert, "all_to_all", lambda counts_X, *_: counts_X.clone()),
        patch.object(fake, "_row_counts", lambda loads, rank, *given: ROW_COUNTS(*given)),
    ):
        return allocated(job, rank)[0]


def in_turns() -> Any:
    """Tokens visit one expert after the other, whatever their scores."""

    def choose(router: Router, scores_BTX: torch.Tensor) -> torch.Tensor:
        *tokens, num_experts = scores_BTX.shape
        per_token = router.settings.per_token
        visits = torch.arange(scores_BTX[..., 0].numel() * per_token) % num_experts
        return visits.view(*tokens, per_token)

    return patch.object(Router, "_choose", choose)


def differences(done: Done, found: Traced, gradients: int) -> Iterator[str]:
    """In words, what should be identical and is not."""
    plain = [dataclasses.replace(message, phase="") for message in found.messages]
    if plain != [dataclasses.replace(message, phase="") for message in done.messages]:
        yield f"messages ({len(plain)} for {len(done.messages)})"
    for name, dry_bytes, real_bytes in (
        ("flops", sum(found.flops.values()), done.flops),
        ("weights", found.at_rest["weights"], done.weights),
        ("gradients", gradients, done.gradients),
        ("optimizer", found.at_rest["optimizer"], done.optimizer),
    ):
        if dry_bytes != real_bytes:
            yield f"{name} ({dry_bytes:,} for {real_bytes:,})"


def measure(chosen: list[Case]) -> list[Figure]:
    apart = ranks = messages = 0
    errors: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with Pool() as pool:
        for case in chosen:
            job = case.job()
            done = pool.run(job.layout.num_ranks, real, job)
            said, worst = [], 1.0
            for rank, one in enumerate(done):
                ((found, gradients),) = pool.run(1, dry_gradients, job, rank)
                (at_once,) = pool.run(1, most, job, rank)
                said += [f"rank {rank}: {text}" for text in differences(one, found, gradients)]
                worst = max(worst, found.peak.num_bytes / at_once, key=lambda each: abs(each - 1))
                messages += len(one.messages)
            ranks += len(done)
            apart += bool(said)
            errors[case.type].append(abs(worst - 1))
            print(f"{worst:.4f}  {case}  {'; '.join(said) or 'identical'}", flush=True)
    return [
        Figure("jobs", len(chosen), "jobs"),
        Figure("ranks", ranks, "ranks"),
        Figure("messages compared", messages, "messages"),
        Figure("jobs with a message, FLOP or byte apart", apart, f"of {len(chosen)}", "0"),
        *(
            Figure(
                f"most that lives, worst rank of a job, {name}: {kind} error",
                of(each),
                f"of {len(each)}",
                "<= 0.01",
            )
            for name, each in errors.items()
            for kind, of in (("median", statistics.median), ("largest", max))
            if each
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="three jobs")
    parser.add_argument("--out", help="the receipt")
    parser.add_argument("--only", default="", help="jobs whose words contain this")
    arguments = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # of ranks that are started from here on
    chosen = cases(arguments.only)
    figures = measure(chosen[:3] if arguments.quick else chosen)
    print_figures(figures)
    write_receipt("dryrun_real", figures, arguments.out, this_machine().to_dict())


if __name__ == "__main__":
    main()
