"""The norm of all gradients against PyTorch's on whole tensors and against float64, and sharded ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from colossus.layout import Layout
from colossus.parallel.grad_norm import clip
from colossus.parallel.world import World
from tests.parallel.real_ranks import in_ranks

SHAPES = ((7, 5), (4,), (1, 3), (2, 3, 2), (6, 1))
LAYOUTS = [{"dp_replicate": 1, "dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 1}]


def gradients(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [scale * torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in SHAPES]


def parameters(grads: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    found = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(found, grads, strict=True):
        parameter.grad = grad.clone()
    return found


def exact_norm(grads: list[torch.Tensor]) -> float:
    return math.sqrt(math.fsum(x * x for grad in grads for x in grad.double().flatten().tolist()))


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clips_as_pytorch_does(max_norm: float) -> None:
    """Theirs divides by the norm + 1e-6."""
    ours, theirs = parameters(gradients()), parameters(gradients())
    norm = clip(ours, max_norm)
    assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, max_norm)), rel=1e-12)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_afterwards_the_norm_is_the_limit_and_the_direction_the_same(dtype: torch.dtype) -> None:
    before = gradients(dtype)
    clipped = parameters(before)
    norm = clip(iter(clipped), 0.125)
    assert norm.dtype == torch.float64
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert float(norm) == pytest.approx(exact_norm(before), rel=tolerance)
    assert exact_norm([p.grad for p in clipped]) == pytest.approx(0.125, rel=tolerance)
    for parameter, grad in zip(clipped, before, strict=True):
        torch.testing.assert_close(parameter.grad, grad * (0.125 / float(norm)), rtol=tolerance, atol=0)


def test_below_the_limit_not_a_bit_changes() -> None:
    small = parameters(gradients(torch.float32, scale=1e-3))
    norm = float(clip(small, 1.0))
    assert norm < 1.0
    assert all(torch.equal(p.grad, g) for p, g in zip(small, gradients(torch.float32, 1e-3), strict=True))
    assert float(clip(small, norm)) == norm  # at the limit, too
    assert all(torch.equal(p.grad, g) for p, g in zip(small, gradients(torch.float32, 1e-3), strict=True))


def test_squares_of_all_tensors_are_summed_in_float64() -> None:
    """In fp32 each of ten thousand small tensors would be lost beside a large one."""
    grads = [torch.tensor([1e4]), *([torch.tensor([1.0])] * 10_000)]
    assert float(clip(parameters(grads), 1e9)) == pytest.approx(math.sqrt(1e8 + 1e4), rel=1e-7)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_returned(value: float) -> None:
    grads = gradients()
    grads[2][0, 1] = value
    norm = float(clip(parameters(grads), 1.0))
    assert math.isnan(norm) if math.isnan(value) else norm == math.inf


def test_parameters_without_a_gradient_count_for_nothing() -> None:
    ours = parameters(gradients())
    ours.append(torch.nn.Parameter(torch.full((3,), 1e6)))
    assert float(clip(ours, 0.5)) == pytest.approx(exact_norm(gradients()), rel=1e-12)
    assert ours[-1].grad is None


def sharded(layout: dict[str, int], placements: list[tuple[Placement, ...]]) -> tuple[float, list]:
    """The norm, and the clipped gradients whole, of one rank; no placements: that tensor is not sharded."""
    with World.join(Layout(**layout), "cpu") as world:
        assert world.meshes is not None
        grads = [
            distribute_tensor(grad, world.meshes.dense["dp_replicate", "fsdp"], list(where))
            if where
            else grad
            for grad, where in zip(gradients(), placements, strict=True)
        ]
        found = parameters(grads)
        norm = float(clip(found, 0.5))
        wholes = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in found]
        return norm, [whole.tolist() for whole in wholes]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_are_summed_and_replicas_are_counted_once(layout: dict[str, int]) -> None:
    """On two ranks: shards of unequal size, an empty one, replicas, and tensors that are not sharded."""
    shard, copy = Shard(0), Replicate()
    placements = [(copy, shard), (copy, copy), (copy, shard), (), (copy, Shard(1))]
    expected = parameters(gradients())
    norm = float(clip(expected, 0.5))
    assert norm == pytest.approx(exact_norm(gradients()), rel=1e-12)
    for found, wholes in in_ranks(2, sharded, layout, placements):
        assert found == pytest.approx(norm, rel=1e-12)
        for whole, parameter in zip(wholes, expected, strict=True):
            torch.testing.assert_close(
                torch.tensor(whole, dtype=torch.float64), parameter.grad, rtol=1e-12, atol=0
            )
