"""One link of a chain of layouts: what the ranks of `test_reshard` do in their processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from colossus.checkpoints.load import newest_whole
from colossus.checkpoints.save import Saver
from colossus.data.loader import Batch
from colossus.parallel.world import World
from colossus.trainer.state import TrainState
from colossus.trainer.step import train_step
from tests.ranks.cases import IGNORED, Case


def go_on(case: Case, before: Path | None, folder: Path, steps: int) -> tuple[list[float], list[float]]:
    """Loads what is in `before`, saves it again in `folder` as it is, takes some steps and saves after each.

    Returns the losses and the norms of gradients.
    """
    torch.set_num_threads(1)
    job = case.job()
    with World.join(job.layout, "cpu", experts=job.model.experts is not None) as world:
        state = TrainState.build(job, world)
        with Saver(folder, world, keep=100) as saver:
            if before is not None:
                checkpoint = newest_whole(before, world)
                assert checkpoint is not None
                state.restore(checkpoint)
                saver.save(state.step, state.tensors(), state.meta())
            results = []
            for _ in range(steps):
                batch, num_targets = batch_of(case, state.step, world)
                results.append(train_step(state, batch, num_targets, 1.0, job, world))
                saver.save(state.step, state.tensors(), state.meta())
    return [r.loss for r in results], [r.grad_norm for r in results]


def batch_of(case: Case, step: int, world: World) -> tuple[Batch, int]:
    """This rank's rows, padded to as many as others have; the targets of all."""
    tokens, targets, documents = case.rows(step)
    data, micro = world.data, case.job().layout.micro_batch
    share = -(-case.batch // data.size)
    rows = -(-share // micro) * micro
    mine = slice(data.rank * share, min(case.batch, (data.rank + 1) * share))
    count = max(0, mine.stop - mine.start)

    def own(x: torch.Tensor, fill: int) -> torch.Tensor:
        return F.pad(x[mine], (0, 0, 0, rows - count), value=fill)

    here = own(targets, IGNORED)
    batch = Batch(
        step=step,
        first_sample=step * case.batch,
        tokens_BT=own(tokens, 0),
        targets_BT=here,
        documents_BT=None if documents is None else own(documents, 0),
        num_targets=int((here != IGNORED).sum()),
        num_tokens_global=targets.numel(),
    )
    return batch, int((targets != IGNORED).sum())
