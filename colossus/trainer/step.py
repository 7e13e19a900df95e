"""One update of the weights: forward, backward, clip, update. Knows no schedule and no mesh.

No host waits for a device here, but where figures are read: what a step did is a sum over the ranks that has
begun when it returns, and is told to who asks. So a GPU is given its next step before it is done with this
one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from colossus.data.loader import Batch, micro_batches
from colossus.job import Job
from colossus.parallel.program import clip_gradients, forward_backward, take_z_loss
from colossus.parallel.world import Sum, World
from colossus.trainer.balance import Balance, ExpertLoads
from colossus.trainer.state import TrainState

LATEST = 64  # a sum of such powers of ranks' seconds is that of the largest: a sum is all that is told


@dataclass(frozen=True)
class StepResult:
    """What one update did. The first of its figures that is asked for waits until all ranks have got so far.

    step: the number of updates taken before it. num_tokens: of the global batch; seq_len: of each sample.
    loss: cross entropy, nats a target token, over the global batch; z_loss: what that term adds to it; None
    where no token was a target. skipped: the gradient was not finite, and the weights stayed as they were.
    experts: None without experts, or where they had no tokens. From the end of the step before to this one's
    there were data_wait_seconds for the batch, between_seconds of all else that this rank did between them,
    rank_wait_seconds until the last rank had done so too, and seconds of the step itself; together
    wall_seconds.
    """

    step: int
    lr_factor: float
    num_tokens: int
    seq_len: int
    wall_seconds: float
    data_wait_seconds: float
    own_seconds: float
    figures: Sum
    balance: Balance
    num_beside: int = 0

    @cached_property
    def _told(self) -> list[float]:
        return self.figures.wait()

    @property
    def num_targets(self) -> int:
        return round(self._told[0])

    @property
    def loss(self) -> float | None:
        return self._told[1] / self.num_targets if self.num_targets else None

    @property
    def z_loss(self) -> float | None:
        return self._told[2] / self.num_targets if self.num_targets else None

    @property
    def grad_norm(self) -> float:
        return self._told[3]

    @property
    def skipped(self) -> bool:
        return not self.grad_norm < float("inf")

    @property
    def rank_wait_seconds(self) -> float:
        return max(0.0, self._told[4] ** (1 / LATEST) - self.own_seconds)

    @property
    def between_seconds(self) -> float:
        return max(0.0, self.own_seconds - self.data_wait_seconds)

    @property
    def seconds(self) -> float:
        return max(0.0, self.wall_seconds - self.own_seconds - self.rank_wait_seconds)

    @cached_property
    def experts(self) -> ExpertLoads | None:
        return self.balance.told(self._told[5 : len(self._told) - self.num_beside])

    @property
    def beside(self) -> list[float]:
        """The sums of what `train_step` was given beside."""
        return self._told[len(self._told) - self.num_beside :]


def train_step(
    state: TrainState,
    batch: Batch,
    num_targets: float | torch.Tensor,
    lr_factor: float | Callable[[], float],
    job: Job,
    world: World,
    *,
    since: float | None = None,
    data_wait_seconds: float | None = None,
    beside: Callable[[], Sequence[float]] = list,
    between: Callable[[], None] = lambda: None,
) -> StepResult:
    """Takes one step on this rank's slice `batch` of a global batch of `num_targets` targets.

    Each micro batch's summed loss is divided once, by the targets of the whole global batch, so that
    accumulation, padding and the number of ranks leave loss and gradient alone. So with what keeps experts'
    loads alike: it is divided by the tokens of the global batch, and follows the visits of all of them.
    Without any target the gradient is 0, and the optimizer goes on from what it remembers. An update from a
    gradient that is not finite is taken back where it is computed.

    lr_factor: or what gives it, called when the gradient is computed and nothing is changed yet; it may
    raise.
    since: when the step before ended, by `perf_counter`. data_wait_seconds: of the time from then on; None:
    the batch's. beside: gives numbers to be summed with the figures, as many on every rank. between: see
    `forward_backward`.
    """
    started = time.perf_counter()
    since = started if since is None else since
    state.model.train()
    loss_sum = forward_backward(
        state.model,
        micro_batches(batch, job.layout.of_replica(world.place.dp_replicate).micro_batch),
        num_targets=num_targets,
        num_tokens=batch.num_tokens_global,
        zero=job.layout.zero,
        z_loss=job.optimizer.z_loss,
        between=between,
    )
    grad_norm = clip_gradients(state.model, job.optimizer.grad_clip, world)
    losses = torch.stack((loss_sum, take_z_loss(state.model)))
    if callable(lr_factor):
        lr_factor = lr_factor()
    numbers = list(beside())
    own_seconds = started - since

    def on(rank_counts: bool, value: torch.Tensor | float) -> torch.Tensor:
        """Of one rank of those that have the same."""
        value = torch.as_tensor(value, dtype=torch.float64).to(loss_sum.device, non_blocking=True)
        return value if rank_counts else torch.zeros_like(value)

    first = world.rank == 0
    parts = [
        on(first, num_targets).view(1),
        on(world.place.tp == 0, losses),
        on(first, grad_norm).view(1),
        on(True, min(own_seconds, 1e4) ** LATEST).view(1),
        state.balance.take(),
        on(True, torch.tensor(numbers, dtype=torch.float64)),
    ]
    figures = world.begin_sum(torch.cat(parts))
    taken = grad_norm < float("inf")
    state.updating = True
    state.optimizer.step(lr_factor, taken)
    state.optimizer.zero_grad()
    if state.arch.experts is not None:
        state.balance.update(figures.total[5 : 5 + len(parts[4])], move=taken)
    state.step += 1
    state.updating = False
    return StepResult(
        step=state.step - 1,
        lr_factor=lr_factor,
        num_tokens=batch.num_tokens_global,
        seq_len=batch.tokens_BT.shape[1],
        wall_seconds=time.perf_counter() - since,
        data_wait_seconds=batch.wait_seconds if data_wait_seconds is None else data_wait_seconds,
        own_seconds=own_seconds,
        figures=figures,
        balance=state.balance,
        num_beside=len(numbers),
    )


def drop_step(state: TrainState) -> None:
    """Forgets what a step that was given up before its update has computed."""
    state.optimizer.zero_grad()
    state.balance.take()
    take_z_loss(state.model)
