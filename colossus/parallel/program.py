"""The forward and backward passes of one step, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from colossus.architecture import IGNORED
from colossus.models import Decoder
from colossus.parallel.data import prepare_backward
from colossus.parallel.grad_norm import clip
from colossus.parallel.pipeline import Pipeline
from colossus.parallel.world import World

MicroBatch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def forward_backward(
    model: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    *,
    num_targets: float | torch.Tensor,
    num_tokens: int,
    zero: int,
    z_loss: float = 0.0,
    between: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """The summed cross entropy of this rank's tokens, in float64; leaves gradients of (the global batch's
    loss divided by its targets), z-loss and what keeps experts' loads alike included. Without any target,
    these are 0 but for the latter.

    model: a Decoder, or this rank's `Pipeline`.
    micro_batches: (tokens_BT, targets_BT, documents_BT or None) of this rank's rows. num_targets, num_tokens:
        of the global batch (targets may be counted on the device), by which loss and balance terms are
        divided once, so that accumulation, padding and the number of ranks leave loss and gradient alone.
    zero: see `layout.Layout`; a pipeline knows its own.
    between: called between two micro batches, but of a pipeline; it may raise.
    """

    def token_share(targets_BT: torch.Tensor) -> torch.Tensor:
        """Of each row, as `Decoder.forward` takes it, in float64: rows without targets are padding."""
        return (targets_BT != IGNORED).any(1).double() / num_tokens

    device = micro_batches[0][0].device
    num_targets = torch.as_tensor(num_targets, dtype=torch.float64).to(device, non_blocking=True).clamp(min=1)
    if isinstance(model, Pipeline):
        return model.forward_backward(micro_batches, token_share, num_targets, z_loss)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, (tokens_BT, targets_BT, documents_BT) in enumerate(micro_batches):
        if index:
            between()
        prepare_backward(model, zero, last=index == len(micro_batches) - 1)
        share = token_share(targets_BT)
        loss, _ = model(tokens_BT, targets_BT, documents_BT, z_loss=z_loss, token_share=share)
        (loss / num_targets.to(loss.dtype)).backward()
        total += loss.detach()
    return total


def take_z_loss(model: torch.nn.Module) -> torch.Tensor:
    """The summed z-loss of this rank's tokens since the last call, in float64."""
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for part in decoders(model):
        for term in part.z_terms:
            total += term
        part.z_terms.clear()
    return total


def decoders(model: torch.nn.Module) -> list[Decoder]:
    """The decoders that `model` is: one, or the stages of a pipeline that this rank has."""
    return model.decoders if isinstance(model, Pipeline) else [model]  # type: ignore[list-item]


def clip_gradients(model: torch.nn.Module, max_norm: float, world: World) -> torch.Tensor:
    """Of this rank's part of a model, by the norm of the whole model's gradients, which is returned.

    Parameters that two stages of a pipeline hold count once.
    """
    if not isinstance(model, Pipeline) or world.meshes is None:
        return clip(model.parameters(), max_norm)
    return clip(model.parameters(), max_norm, world.meshes.pp, model.copies)
