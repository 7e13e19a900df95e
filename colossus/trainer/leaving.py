"""What an error that ends a run must not cost: the steps since the last save."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor

from colossus.parallel.ending import is_of_peer
from colossus.trainer.hooks import Hook
from colossus.trainer.state import TrainState
from colossus.trainer.training import Training

WAIT_SECONDS = 5.0  # for the other ranks: what fails on all of them does so within a moment


def before_leaving(training: Training, hooks: Sequence[Hook], error: Exception) -> None:
    """Lets hooks keep what `error` would cost, where weights and optimizer are whole on every rank.

    Of several ranks, all must have failed after the same step: who still computes can hear of nothing. A rank
    waits for that, and never in a collective. What goes wrong here is a warning; `error` is what is raised.
    """
    world, saver = training.world, training.saver
    try:
        if is_of_peer(error) or training.torn or not training.step or not is_whole(training.state):
            return
        if not world.all_come(f"leave-{training.step}-{saver.num_saves}", WAIT_SECONDS):
            return
    except Exception as other:
        _warn(other)
        return
    for hook in hooks:
        try:
            hook.on_error(training)
        except Exception as other:
            _warn(other)


def is_whole(state: TrainState) -> bool:
    """Whether no update is half done, and whatever this rank has of the weights and of what the optimizer
    remembers is finite."""
    if state.updating:
        return False
    held = (t.to_local() if isinstance(t, DTensor) else t for t in state.tensors().values())
    return all(bool(torch.isfinite(t).all()) for t in held if t.is_floating_point())


def _warn(error: Exception) -> None:
    logging.getLogger(__name__).warning("on the way out: %s", error)
