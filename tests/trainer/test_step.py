"""One update against a plain loop in float64, written here; and how a batch is cut up leaves it alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from colossus import optim
from colossus.data.loader import Batch, Batches
from colossus.data.order import BatchSchedule
from colossus.data.sources import TrainingData
from colossus.job import Job
from colossus.models import Decoder, initialise
from colossus.parallel.world import World
from colossus.trainer.state import TrainState
from colossus.trainer.step import StepResult, train_step
from tests.trainer.running import run_of, train_in_processes

ALONE = World(0, 1, torch.device("cpu"))
Make = Callable[..., Job]


def exact_state(job: Job) -> TrainState:
    """What a run begins with, in float64."""
    model = Decoder(job.model)
    initialise(model, job.model, job.run.seed)
    model.double()
    model.compute_dtype = torch.float64
    return TrainState(job.model, model, optim.build(model, job.model, job.optimizer, torch.float64))


def batch_of(
    tokens_BT: torch.Tensor, targets_BT: torch.Tensor, documents_BT: torch.Tensor | None = None
) -> Batch:
    targets = int((targets_BT != -100).sum())
    return Batch(0, 0, tokens_BT, targets_BT, documents_BT, targets, tokens_BT.numel())


def random_batch(job: Job, rows: int, seed: int = 0) -> Batch:
    """Some targets are ignored, unevenly: a mean of the rows' means is not the mean."""
    draw = torch.Generator().manual_seed(seed)
    stream_BT = torch.randint(job.model.vocab_size, (rows, 17), generator=draw)
    targets_BT = stream_BT[:, 1:].clone()
    for row in range(rows):
        targets_BT[row, : row % 5 * 3] = -100
    return batch_of(stream_BT[:, :-1].contiguous(), targets_BT)


def plain_loss(model: Decoder, batch: Batch, z_loss: float = 0.0) -> torch.Tensor:
    """The mean over targets, row by row, document by document."""
    losses = []
    for row, tokens_T in enumerate(batch.tokens_BT):
        documents_T = (
            batch.documents_BT[row] if batch.documents_BT is not None else torch.zeros(len(tokens_T))
        )
        for document in documents_T.unique():
            here = documents_T == document
            logits_TV = model(tokens_T[here][None])[0]
            targets_T = batch.targets_BT[row][here]
            nats_T = F.cross_entropy(logits_TV, targets_T, reduction="none", ignore_index=-100)
            nats_T = nats_T + z_loss * logits_TV.logsumexp(-1).square() * (targets_T != -100)
            losses.append(nats_T.sum())
    return torch.stack(losses).sum() / batch.num_targets


def gradients_of(job: Job, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model = exact_state(job).model
    loss = plain_loss(model, batch, job.optimizer.z_loss)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters()}


def step(state: TrainState, batch: Batch, job: Job, factor: float = 1.0) -> StepResult:
    return train_step(state, batch, batch.num_targets, factor, job, ALONE)


def assert_near(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-9
) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= tolerance * theirs[name].norm() + 1e-14, name


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_adamw_steps_like_a_plain_loop(small_job: Make, z_loss: float) -> None:
    """Three steps of clipped AdamW with weight decay for matrices alone, from torch's own gradients; the loss
    is told without z-loss."""
    job = small_job("run", "optimizer.name=adamw", f"optimizer.z_loss={z_loss}", "optimizer.grad_clip=0.5")
    ours, theirs = exact_state(job), exact_state(job).model
    settings = job.optimizer
    groups = [
        {"params": [p], "weight_decay": settings.weight_decay if "layers" in n and p.ndim == 2 else 0.0}
        for n, p in theirs.named_parameters()
    ]
    adamw = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    for number, factor in enumerate((1 / 3, 2 / 3, 1.0)):
        batch = random_batch(job, 4, seed=number)
        loss, without = plain_loss(theirs, batch, z_loss), plain_loss(theirs, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert norm > 0.5  # so that clipping is tried
        for group in adamw.param_groups:
            group["lr"] = settings.lr * factor
        adamw.step()
        adamw.zero_grad()
        result = step(ours, batch, job, factor)
        assert math.isclose(result.loss, float(without.detach()), rel_tol=1e-12)
        z = float((loss - without).detach())
        assert math.isclose(result.z_loss, z, rel_tol=1e-9, abs_tol=1e-15) and bool(z) == bool(z_loss)
        assert math.isclose(result.grad_norm, float(norm), rel_tol=1e-6)  # theirs adds 1e-6 when it clips
        assert (result.step, result.num_targets, result.skipped) == (number, batch.num_targets, False)
    assert_near(weights(ours), {n: p.detach() for n, p in theirs.named_parameters()}, tolerance=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_how_a_batch_is_cut_changes_nothing(small_job: Make, micro_batch: int, name: str) -> None:
    job = small_job(
        "run", "run.global_batch=8", f"layout.micro_batch={micro_batch}", f"optimizer.name={name}"
    )
    whole = small_job("whole", "run.global_batch=8", "layout.micro_batch=8", f"optimizer.name={name}")
    batch = random_batch(job, 8)
    ours, theirs = exact_state(job), exact_state(whole)
    result, expected = step(ours, batch, job), step(theirs, batch, whole)
    assert math.isclose(result.loss, expected.loss, rel_tol=1e-12)
    assert math.isclose(result.grad_norm, expected.grad_norm, rel_tol=1e-9)
    assert_near(weights(ours), weights(theirs))
    loss, gradients = gradients_of(job, batch)
    assert math.isclose(result.loss, loss, rel_tol=1e-12)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    assert math.isclose(result.grad_norm, norm, rel_tol=1e-9)


def test_packed_documents_are_kept_apart(small_job: Make) -> None:
    job = small_job("run", "layout.micro_batch=2")
    batch = random_batch(job, 2)
    documents_BT = torch.tensor([[0] * 5 + [1] * 11, [0] * 16])
    batch = batch_of(batch.tokens_BT, batch.targets_BT, documents_BT)
    loss, _ = gradients_of(job, batch)
    apart = step(exact_state(job), batch, job).loss
    assert math.isclose(apart, loss, rel_tol=1e-9)  # positions count on through a window
    together = step(exact_state(job), batch_of(batch.tokens_BT, batch.targets_BT), job).loss
    assert not math.isclose(apart, together, rel_tol=1e-6)


def test_padding_counts_for_nothing(small_job: Make) -> None:
    """Rows without targets, as where a batch does not divide among ranks."""
    job = small_job("run", "layout.micro_batch=1")
    batch = random_batch(job, 3)
    padded = batch_of(F.pad(batch.tokens_BT, (0, 0, 0, 2)), F.pad(batch.targets_BT, (0, 0, 0, 2), value=-100))
    ours, theirs = exact_state(job), exact_state(job)
    result, expected = step(ours, padded, job), step(theirs, batch, job)
    assert math.isclose(result.loss, expected.loss, rel_tol=1e-12)
    assert_near(weights(ours), weights(theirs))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_whose_gradient_is_not_finite_is_skipped(small_job: Make, value: float, name: str) -> None:
    job = small_job("run", f"optimizer.name={name}")
    state = exact_state(job)
    step(state, random_batch(job, 4), job)
    before = {key: tensor.clone() for key, tensor in state.tensors().items()}
    handle = state.model.norm.weight.register_hook(lambda grad: grad * value)
    result = step(state, random_batch(job, 4, seed=1), job)
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert (state.step, state.optimizer.num_steps) == (2, 1)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.tensors().items())
    handle.remove()
    assert not step(state, random_batch(job, 4, seed=2), job).skipped
    assert not all(torch.equal(tensor, before[key]) for key, tensor in state.tensors().items())


def batches_of(job: Job, steps: Sequence[int], size: int) -> list[list[Batch]]:
    """Each rank's batches of some steps, as they are read from shards."""
    schedule = BatchSchedule(job.run.batch_schedule)
    data = TrainingData.open(job, schedule)
    ranks = []
    for rank in range(size):
        micro = job.layout.micro_batch
        with Batches(data.train, data.order, schedule, rank=rank, size=size, micro_batch=micro) as batches:
            ranks.append([batches.next(number) for number in steps])
    return ranks


def test_two_ranks_with_a_batch_that_does_not_divide(small_job: Make) -> None:
    """Five rows: rank 0 takes three, rank 1 two and one of padding. Real processes, fp32."""
    settings = ["run.global_batch=5", "run.steps=5", "optimizer.name=adamw", "run.validate_every=0"]
    alone = small_job("alone", *settings, "layout.micro_batch=5")
    two = small_job("two", *settings, "layout.dp_shard=2", "layout.micro_batch=3")
    assert train_in_processes(alone) == [0]
    assert train_in_processes(two) == [0, 0]
    steps = [run_of(job).events("step") for job in (alone, two)]
    for one, other in zip(*steps, strict=True):
        assert one["targets"] == other["targets"] == 5 * 32
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-5)
        assert math.isclose(one["grad_norm"], other["grad_norm"], rel_tol=1e-5)
    first, second = batches_of(two, range(5), 2)
    assert [len(batch.tokens_BT) for batch in first + second] == [3] * 10
    assert [batch.num_targets for batch in second] == [2 * 32] * 5


def test_a_batch_schedule_is_followed(small_job: Make) -> None:
    job = small_job("run", "run.batch_schedule=[[0,2],[3,6]]", "run.global_batch=2", "layout.micro_batch=2")
    assert train_in_processes(job) == [0]
    assert [event["tokens"] for event in run_of(job).events("step")] == [64] * 3 + [192] * 9
    (batches,) = batches_of(job, range(5), 1)
    assert [batch.first_sample for batch in batches] == [0, 2, 4, 6, 12]


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_rate_of_every_step(small_job: Make, schedule: str) -> None:
    """Written out: 2 steps of warm-up, 12 in all, the last 6 of wsd in decay, or half a cosine."""
    job = small_job("run", f"optimizer.schedule={schedule}", "optimizer.final_lr_fraction=0.1")
    assert train_in_processes(job) == [0]
    factors = [event["lr_factor"] for event in run_of(job).events("step")]
    if schedule == "wsd":
        expected = [1 / 3, 2 / 3, 1, 1, 1, 1] + [1 - 0.9 * k / 6 for k in range(6)]
    else:
        falling = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]
        expected = [1 / 3, 2 / 3, *falling]
    assert factors == pytest.approx(expected, rel=1e-9)
