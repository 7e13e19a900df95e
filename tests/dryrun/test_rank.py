"""What a dry run says a rank does, against ranks that do it."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import pytest
import torch

from colossus.architecture import parameter_table
from colossus.dryrun.rank import Traced
from colossus.dryrun.work import Message
from colossus.errors import UserError
from colossus.job import Job
from colossus.layout import ONE_STAGE, SCHEDULES
from colossus.models import mlp
from tests.dryrun.programs import allocated, dry, dry_gradients, really
from tests.ranks.cases import Case
from tests.ranks.pool import Pool

MIXTRAL = "mixtral-8x7b"
# The gradient of the head comes with those of weights, of the norm before it with those of activations: FSDP
# sums both at once, and wants one type.
ONE_MICRO_BATCH = Case.of(
    {"num_layers": 4, "tie_embeddings": False},
    pp=2,
    dp_shard=2,
    schedule="interleaved_zero_bubble",
    stages_per_rank=2,
    batch=2,
    type="bf16",
)
LAYOUTS = [
    Case.of(dp_shard=2, tp=2, type="bf16"),
    Case.of(dp_replicate=2, dp_shard=2, recompute="selective", type="fp32"),
    Case.of(dp_shard=2, cp=2, recompute="full", type="fp32"),
    Case.of(pp=2, dp_shard=2, recompute="full", type="fp32"),
    Case.of(
        pp=2, tp=2, schedule="interleaved_1f1b", stages_per_rank=2, changed={"num_layers": 4}, type="fp32"
    ),
    Case.of(pp=2, schedule="zbv_zero_bubble", stages_per_rank=2, changed={"num_layers": 4}, type="fp32"),
    Case.of(dp_shard=2, tp=2, optimizer="muon", type="fp32"),
    ONE_MICRO_BATCH,
]


def plain(messages: list[Message]) -> list[Message]:
    """Without the phase, which real ranks do not say."""
    return [dataclasses.replace(message, phase="") for message in messages]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_it_says_computes_and_keeps_what_real_ranks_do(case: Case, pool: Pool) -> None:
    """Every message in its order, every product, every byte of weights, of gradients as the update finds them
    and of the optimizer, of the first rank and the last."""
    job = case.job()
    real = pool.run(job.layout.num_ranks, really, job)
    for rank, done in [(0, real[0]), (len(real) - 1, real[-1])]:
        ((found, gradients),) = pool.run(1, dry_gradients, job, rank)
        assert plain(found.messages) == plain(done.messages), f"rank {rank}"
        assert sum(found.flops.values()) == done.flops
        assert found.at_rest["weights"] == done.weights
        assert gradients == done.gradients > 0
        assert found.at_rest["optimizer"] == done.optimizer


HALVES = [Case.of(pp=2, tp=2, schedule="interleaved_zero_bubble", stages_per_rank=2, seq_len=128)]
# Their weights are gathered and summed within a layer, over ranks of their own.
EXPERTS = [
    Case.of(ep=2, dp_shard=4, recompute="full", preset=MIXTRAL, batch=8),
    Case.of(tp=2, dp_shard=2, recompute="selective", preset=MIXTRAL),
    Case.of(pp=2, ep=2, dp_shard=2, schedule="interleaved_zero_bubble", stages_per_rank=2, preset=MIXTRAL),
]


@pytest.mark.parametrize("case", [*LAYOUTS[2::2], *HALVES, *EXPERTS], ids=str)
def test_layers_that_stand_for_each_other_change_nothing(case: Case, pool: Pool) -> None:
    """Not a FLOP, not a message, not what lives between steps; the most that lives by less than 1%: where a
    gradient is added to one that is there, PyTorch may let go of it a moment earlier or later."""
    num_layers = 4 if case.job().layout.pp == 1 else 8
    job = dataclasses.replace(case, changed=(("num_layers", num_layers),)).job()
    (found,), (whole,) = pool.run(1, dry, job, 0), pool.run(1, in_full, job, 0)
    assert found.at_rest == whole.at_rest
    assert found.peak.num_bytes == pytest.approx(whole.peak.num_bytes, rel=0.01)
    assert found.flops == whole.flops and found.messages == whole.messages
    assert found.num_operators < whole.num_operators


def in_full(job: Job, rank: int) -> object:
    return dry(job, rank, replay=False)


def two_steps(job: Job, rank: int) -> object:
    return dry(job, rank, steps=2)


@pytest.mark.parametrize("case", LAYOUTS[:1], ids=str)
def test_the_first_step_is_like_all_others(case: Case, pool: Pool) -> None:
    (first,), (second,) = pool.run(1, dry, case.job(), 0), pool.run(1, two_steps, case.job(), 0)
    assert dataclasses.replace(first, seconds=0, num_operators=0) == dataclasses.replace(
        second, seconds=0, num_operators=0
    )


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "gpipe"])
def test_a_pipeline_keeps_no_more_of_more_micro_batches(schedule: str, pool: Pool) -> None:
    """No message, no output, no graph behind a loss: only the figures of each."""
    per_rank = 1 if schedule in ONE_STAGE else 2
    changed = {"hidden_size": 64, "num_layers": 4}

    def peaks(num_micro_batches: int) -> list[int]:
        case = Case.of(changed, pp=2, schedule=schedule, stages_per_rank=per_rank, batch=num_micro_batches,
                       seq_len=32, type="fp32")  # fmt: skip
        ranks = range(2 if schedule == "1f1b" else 1)
        traced = [pool.run(1, dry, case.job(), rank)[0] for rank in ranks]
        return [found.peak.num_bytes - found.at_rest["batch"] for found in traced]

    activation = 32 * 64 * 4
    for few, many in zip(peaks(8), peaks(16), strict=True):
        assert many - few < activation  # of eight micro batches more


def test_what_zero_divides(pool: Pool) -> None:
    """Of a model that is large beside its activations, on four ranks and over four micro batches."""

    def traced(zero: int) -> Traced:
        case = Case.of(LARGE, dp_shard=4, seq_len=16, batch=16, type="fp32", zero=zero)
        return pool.run(1, dry, case.job(), 0)[0]

    first, second, third = (traced(zero) for zero in (1, 2, 3))
    weights = sum(p.numel for p in parameter_table(Case.of(LARGE).arch)) * 4
    assert first.at_rest == second.at_rest == third.at_rest
    assert first.peak.by_use["gathered weights"] == pytest.approx(weights, rel=0.01)
    assert second.peak.by_use["gathered weights"] == pytest.approx(weights, rel=0.01)
    assert third.peak.by_use["gathered weights"] < 0.6 * weights
    assert first.peak.num_bytes > second.peak.num_bytes > third.peak.num_bytes
    # The group of all ranks has the name of the axis that it is, too.
    assert {axis for axis, *_ in first.said()} == {"fsdp", "figures"}
    sums = [
        said
        for found in (first, second, third)
        for (_, operation, _), said in found.said().items()
        if operation == "_reduce_scatter_base_"
    ]
    assert sums[1] == sums[2] == tuple(4 * number for number in sums[0])


@pytest.mark.parametrize("ep", [1, 2])
def test_fewer_experts_than_ranks_are_still_shared_by_all(ep: int, pool: Pool) -> None:
    """Eight experts on 16 ranks: else the first eight would have all of them, and the others none."""
    wide = {"hidden_size": 128, "experts.intermediate_size": 256}
    case = Case.of(wide, dp_shard=16, ep=ep, preset=MIXTRAL, batch=16, type="bf16")
    whole = sum(4 * p.numel for p in parameter_table(case.arch))
    for rank in (0, 15):
        (found,) = pool.run(1, dry, case.job(), rank)
        assert found.at_rest["weights"] == pytest.approx(whole / 16, rel=0.1)


def test_what_selective_recomputation_keeps_is_divided_by_tp(pool: Pool) -> None:
    """Of each token and layer what products gave, whose columns are shared, and the two sums that it gets; no
    tokens of other ranks, and nothing that is a part of a sum."""
    heads, ffn, tp, num_bytes = 4 * 16, 128, 4, 2
    sizes = {"hidden_size": 64, "intermediate_size": ffn, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16}

    def peak(recompute: str, num_layers: int) -> int:
        case = Case.of(
            sizes | {"num_layers": num_layers},
            tp=tp,
            recompute=recompute,
            seq_len=256,
            batch=8,
            micro_batch=8,
            type="bf16",
        )
        return pool.run(1, dry, case.job(), 0)[0].peak.num_bytes

    kept = [peak(name, 6) - peak(name, 3) for name in ("selective", "full")]
    products, sums = 3 * heads + 2 * ffn, 2 * 64
    assert kept[0] - kept[1] == 3 * 8 * 256 * (products + sums) // tp * num_bytes


def needing_numbers(job: Job, how: str) -> str:
    """What is said of a program whose MLPs look at the values of their tensors."""
    forward = mlp.MLP.forward

    def looks(self: mlp.MLP, x_BTD: torch.Tensor) -> torch.Tensor:
        seen = x_BTD.nonzero() if how == "shape" else torch.equal(x_BTD, x_BTD)
        assert seen is not None
        return forward(self, x_BTD)

    with patch.object(mlp.MLP, "forward", looks), pytest.raises(UserError) as error:
        dry(job, 0)
    return str(error.value)


@pytest.mark.parametrize(("how", "operator"), [("shape", "aten.nonzero"), ("number", "aten.equal")])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_what_needs_numbers_is_told_with_its_module(
    how: str, operator: str, recompute: str, pool: Pool
) -> None:
    case = Case.of(dp_shard=2, type="fp32", recompute=recompute)
    (said,) = pool.run(1, needing_numbers, case.job(), how)
    inner = "._checkpoint_wrapped_module" * (recompute == "full")
    assert said.startswith(f"dryrun: layers.0{inner}.mlp (")
    assert operator in said and "depends on values" in said


LARGE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "vocab_size": 2048,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
    "num_layers": 4,
}


@pytest.mark.parametrize("case", [
    Case.of(LARGE, dp_shard=2, type="fp32", seq_len=256),
    Case.of(LARGE, tp=2, dp_shard=2, recompute="full", type="fp32", seq_len=256),
    Case.of(LARGE, tp=2, dp_shard=2, recompute="selective", type="fp32", seq_len=256),
    Case.of(LARGE, pp=2, dp_shard=2, type="fp32", seq_len=256),
    Case.of(LARGE, cp=2, dp_shard=2, recompute="full", type="fp32", seq_len=256),
], ids=str)  # fmt: skip
def test_the_most_that_lives_is_what_the_allocator_gives(case: Case, pool: Pool) -> None:
    job = case.job()
    (found,), ((most, after),) = pool.run(1, dry, job, 0), pool.run(1, allocated, job, 0)
    at_rest = sum(found.at_rest.values()) - found.at_rest.get("batch", 0)
    assert found.peak.num_bytes == pytest.approx(most, rel=0.01)
    assert at_rest == pytest.approx(after, rel=0.001)
