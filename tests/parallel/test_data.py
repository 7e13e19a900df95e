"""What data parallelism sums, against each rank's own gradients."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from colossus.layout import Layout
from colossus.measure.counter import flop_counter
from colossus.models import build
from colossus.parallel.data import prepare_backward, shard
from colossus.parallel.world import World
from tests.dryrun.programs import Listener
from tests.models.reference import architecture, random_tokens
from tests.parallel.real_ranks import in_ranks


def shares_of_exact_sums(layout: Layout) -> dict[str, float]:
    """Of gradients by name, after a backward pass in bf16: which share of a sharded model's is to the bit the
    sum over ranks of what each has, rounded to bf16 as its weights are."""
    found = {}
    with World.join(layout, "cpu") as world:
        arch = architecture(num_layers=1)
        alone, sharded = build(arch, seed=0), build(arch, seed=0)
        shard(sharded, world, torch.bfloat16)
        tokens_BT = random_tokens(arch, 2, 8, seed=world.rank)
        for model in (alone, sharded):
            model.compute_dtype = torch.bfloat16
            loss, _ = model(tokens_BT, tokens_BT.roll(-1, 1))
            loss.backward()
        for (name, own), (_, shared) in zip(
            alone.named_parameters(), sharded.named_parameters(), strict=True
        ):
            assert own.grad is not None
            total = own.grad.bfloat16().float()
            dist.all_reduce(total)
            assert isinstance(shared.grad, DTensor) and shared.grad.dtype == torch.float32
            found[name] = float((shared.grad.full_tensor() == total).double().mean())
    return found


@pytest.mark.parametrize("axis", ["dp_shard", "dp_replicate"])
def test_gradients_in_bf16_are_summed_in_fp32(axis: str) -> None:
    layout = Layout.model_validate({"dp_shard": 1, "dp_replicate": 1} | {axis: 2})
    shares, same = in_ranks(2, shares_of_exact_sums, layout)
    assert shares == same and len(shares) >= 9
    assert min(shares.values()) > 0.9, shares


def gradients_by_pass(layout: Layout, zero: int) -> tuple[list[int], dict[str, int], float]:
    """After each of 3 passes, how many parameters have a sum of gradients; how often ranks said what; how far
    the last sums are from those of one pass over all tokens, in parts of the largest."""
    counts, errors = [], []
    with World.join(layout.model_copy(update={"zero": zero}), "cpu") as world:
        arch = architecture(num_layers=1)
        model, whole = build(arch, seed=0), build(arch, seed=0)
        for each in (model, whole):
            shard(each, world, torch.float32)
        tokens_BT = random_tokens(arch, 3, 8, seed=world.rank)
        with Listener(flop_counter().flop_registry) as heard:
            for i in range(3):
                prepare_backward(model, zero, last=i == 2)
                loss, _ = model(tokens_BT[i : i + 1], tokens_BT[i : i + 1].roll(-1, 1))
                loss.backward()
                counts.append(sum(p.grad is not None for p in sharded_parameters(model)))
        loss, _ = whole(tokens_BT, tokens_BT.roll(-1, 1))
        loss.backward()
        for one, other in zip(model.parameters(), whole.parameters(), strict=True):
            assert isinstance(one.grad, DTensor) and isinstance(other.grad, DTensor)
            found, expected = one.grad.full_tensor(), other.grad.full_tensor()
            errors.append(float((found - expected).abs().max() / expected.abs().max()))
    said = Counter(message.operation for message in heard.messages)
    return counts, dict(said), max(errors)


def sharded_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Gathered or not."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    return [p.sharded_param for state in states for p in state._fsdp_param_group.fsdp_params]


# A layer, which ZeRO-3 gathers for both passes, and what is around it, for which the passes follow at once.
@pytest.mark.parametrize(("zero", "gathered", "summed"), [(1, 2, 2), (2, 2, 6), (3, 9, 6)])
@pytest.mark.parametrize("replicas", [1, 2])
def test_what_is_whole_through_the_micro_batches_of_a_step(
    replicas: int, zero: int, gathered: int, summed: int
) -> None:
    layout = Layout(dp_shard=2, dp_replicate=replicas)
    for counts, said, error in in_ranks(2 * replicas, gradients_by_pass, layout, zero):
        some = 0 if zero == 1 or replicas == 2 else counts[2]
        assert counts[:2] == [some, some] and counts[2] >= 9
        assert said.pop("_allgather_base_") == gathered and said.pop("_reduce_scatter_base_") == summed
        assert said == ({"allreduce_": 2} if replicas == 2 else {})  # at the end of the step
        assert error < 1e-5
