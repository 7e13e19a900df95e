"""The norm of all gradients, and clipping by it, whatever meshes the parameters lie on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

Place = tuple[DeviceMesh, tuple[Placement, ...]] | None  # None: the whole tensor is here


@torch.no_grad()
def clip(
    parameters: Iterable[torch.Tensor],
    max_norm: float,
    pipeline: dist.ProcessGroup | None = None,
    copies: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Scales the gradients in place so that their norm is at most `max_norm`; returns the norm before, which
    no host waits for.

    The squares are summed in float64 by mesh and placement: shards are summed over the ranks that hold
    them, replicas are counted once (`clip_grad_norm_` mixes meshes up, PyTorch issue 180346). Ranks of
    `pipeline` hold other parameters, but for `copies`, which another rank counts.
    """
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    copied = {id(copy.grad) for copy in copies}
    by_place: dict[tuple[Place, bool], list[torch.Tensor]] = {}
    for grad in grads:
        place = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        key = (place, id(grad) not in copied)
        by_place.setdefault(key, []).append(grad.to_local() if isinstance(grad, DTensor) else grad)
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device)
    for (place, counts), local in by_place.items():
        squares = torch.stack(torch._foreach_norm(local)).double().square().sum()
        if place is not None:
            mesh, placements = place
            for axis, placement in enumerate(placements):
                if not placement.is_replicate():
                    dist.all_reduce(squares, group=mesh.get_group(axis))
        if counts:
            total += squares
    if pipeline is not None and pipeline.size() > 1:
        dist.all_reduce(total, group=pipeline)
    norm = total.sqrt()
    scale = (max_norm / norm).clamp(max=1.0)
    for local in by_place.values():
        torch._foreach_mul_(local, scale)
    return norm
