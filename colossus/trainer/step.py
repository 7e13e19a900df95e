"""One update of the weights: forward, backward, clip, update. Knows no schedule and no mesh."""

from __future__ import annotations

import time
from dataclasses import dataclass

from colossus.data.loader import Batch, micro_batches
from colossus.job import Job
from colossus.parallel.program import clip_gradients, forward_backward
from colossus.parallel.world import World
from colossus.trainer.balance import ExpertLoads
from colossus.trainer.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """What one update did.

    step: the number of updates taken before it. loss: nats a target token, over the global batch.
    skipped: the gradient was not finite, and the weights stayed as they were. experts: None without experts.
    """

    step: int
    loss: float
    grad_norm: float
    lr_factor: float
    num_tokens: int
    num_targets: int
    seconds: float
    data_wait_seconds: float
    skipped: bool
    experts: ExpertLoads | None = None


def train_step(
    state: TrainState, batch: Batch, num_targets: int, lr_factor: float, job: Job, world: World
) -> StepResult:
    """Takes one step on this rank's slice `batch` of a global batch of `num_targets` targets.

    Each micro batch's summed loss is divided once, by the targets of the whole global batch, so that
    accumulation, padding and the number of ranks leave loss and gradient alone. So with what keeps experts'
    loads alike: it is divided by the tokens of the global batch, and follows the visits of all of them.
    """
    started = time.perf_counter()
    state.model.train()
    loss_sum = forward_backward(
        state.model,
        micro_batches(batch, job.layout.of_replica(world.place.dp_replicate).micro_batch),
        num_targets=num_targets,
        num_tokens=batch.num_tokens_global,
        z_loss=job.optimizer.z_loss,
    )
    grad_norm = float(clip_gradients(state.model, job.optimizer.grad_clip, world))
    figures = world.begin_sum([float(loss_sum) * (world.place.tp == 0), *state.balance.take()])
    skipped = not (grad_norm < float("inf"))
    if not skipped:
        state.optimizer.step(lr_factor)
    state.optimizer.zero_grad()
    total, *loads = figures.wait()
    experts = state.balance.update(loads, move=not skipped)
    state.step += 1
    return StepResult(
        step=state.step - 1,
        loss=total / num_targets,
        grad_norm=grad_norm,
        lr_factor=lr_factor,
        num_tokens=batch.num_tokens_global,
        num_targets=num_targets,
        seconds=time.perf_counter() - started,
        data_wait_seconds=batch.wait_seconds,
        skipped=skipped,
        experts=experts,
    )
