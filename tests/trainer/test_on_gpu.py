"""A step on a GPU: nobody waits for it, a bad one is taken back there, and it can be repeated to the bit."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from colossus.data.loader import Batch
from colossus.job import Job
from colossus.layout import Layout
from colossus.parallel.world import World
from colossus.sections import Data, Optimizer, Precision, RunSection
from colossus.trainer.state import TrainState
from colossus.trainer.step import StepResult, train_step
from tests.perf.tiny import tiny
from tests.ranks.cases import DEFAULTS, RATES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
ROWS, TOKENS = 8, 32


@pytest.fixture
def world() -> Iterator[World]:
    with World.join(Layout().filled(), "cuda") as world:
        yield world


def job_of(preset: str, optimizer: str, kind: str) -> Job:
    return Job(
        model=tiny(preset, vocab_size=64, intermediate_size=48),
        data=Data(seq_len=TOKENS),
        optimizer=Optimizer(name=optimizer, **RATES),
        layout=Layout(**(DEFAULTS | {"micro_batch": 2, "zero": 3})),
        precision=Precision(type=kind),
        run=RunSection(seed=7, global_batch=ROWS),
    )


def batch_of(number: int, device: str) -> Batch:
    draw = torch.Generator().manual_seed(number)
    tokens_BT = torch.randint(64, (ROWS, TOKENS + 1), generator=draw).to(device)
    targets_BT = tokens_BT[:, 1:].clone()
    return Batch(number, 0, tokens_BT[:, :-1].contiguous(), targets_BT, None, ROWS * TOKENS, ROWS * TOKENS)


def take(state: TrainState, batch: Batch, job: Job, world: World) -> StepResult:
    return train_step(state, batch, batch.num_targets, 1.0, job, world)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("preset", ["llama3.1-8b", "mixtral-8x7b"])
def test_no_host_waits_for_a_step(preset: str, optimizer: str, world: World) -> None:
    """CUDA refuses whatever would wait; the figures are read afterwards, and are a processor's."""
    job = job_of(preset, optimizer, "fp32")
    state, batches = TrainState.build(job, world), [batch_of(number, "cuda") for number in range(4)]
    results = [take(state, batch, job, world) for batch in batches[:2]]  # kernels are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results += [take(state, batch, job, world) for batch in batches[2:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    alone = World(0, 1, torch.device("cpu"))
    other = TrainState.build(job, alone)
    for number, result in enumerate(results):
        expected = take(other, batch_of(number, "cpu"), job, alone)
        assert result.loss == pytest.approx(expected.loss, rel=1e-3)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2)
        assert not result.skipped and result.num_targets == ROWS * TOKENS


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_taken_back_on_the_device(optimizer: str, world: World) -> None:
    job = job_of("mixtral-8x7b", optimizer, "bf16")
    state = TrainState.build(job, world)
    assert not take(state, batch_of(0, "cuda"), job, world).skipped
    before = {key: tensor.clone() for key, tensor in state.tensors().items()}
    handle = state.model.norm.weight.register_hook(lambda grad: grad * math.nan)  # type: ignore[union-attr, operator]
    assert take(state, batch_of(1, "cuda"), job, world).skipped
    assert state.optimizer.num_steps == 1
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.tensors().items())
    handle.remove()
    assert not take(state, batch_of(2, "cuda"), job, world).skipped
    assert not all(torch.equal(tensor, before[key]) for key, tensor in state.tensors().items())


@pytest.mark.parametrize("preset", ["llama3.1-8b", "mixtral-8x7b", "deepseek-v3"])
def test_steps_that_are_taken_again_are_the_same_to_the_bit(preset: str, world: World) -> None:
    job = job_of(preset, "muon", "bf16")

    def run() -> tuple[list[float | None], dict[str, torch.Tensor]]:
        state = TrainState.build(job, world)
        losses = [take(state, batch_of(number, "cuda"), job, world).loss for number in range(5)]
        return losses, {name: p.detach().clone() for name, p in state.model.named_parameters()}

    (losses, weights), (again, others) = run(), run()
    assert losses == again
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
