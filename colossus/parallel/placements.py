"""Parameters cut over the ranks of a mesh by the names of their axes, and read by modules as local tensors.

A parameter is a DTensor at rest: what saves, counts or updates it sees the logical tensor. The module that
owns it computes with this rank's part, and says how the ranks' gradients of it belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor


def place(
    module: nn.Module, name: str, mesh: DeviceMesh, dims: Sequence[int | None], divisor: int = 1
) -> None:
    """Cuts the parameter `name` of `module` along `dims`, one for each axis of the mesh; None: replicas.

    Replicas are read by ranks that compute different things with it, so their gradients are summed.
    divisor: the module reads the parameter divided by it, where ranks each add it to a sum.
    """
    parameter = module._parameters[name]
    assert parameter is not None
    placements: list[Placement] = [Replicate() if dim is None else Shard(dim) for dim in dims]
    cut = distribute_tensor(parameter.data, mesh, placements, src_data_rank=None)
    module._parameters[name] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
    gradients = tuple(Partial() if dim is None else Shard(dim) for dim in dims)
    reads: dict[str, Any] = module.__dict__.setdefault("_local_reads", {})
    reads[name] = (gradients, divisor)
    kind = getattr(type(module), "_reads_whole", type(module))
    module.__class__ = _reading(kind, tuple(sorted(reads)))  # type: ignore[arg-type]


def replicated(tensor: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor that all ranks of a mesh hold equal; shares its memory."""
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


@cache
def _reading(kind: type, names: tuple[str, ...]) -> type:
    """A subclass whose attributes `names` are the local parts of the parameters."""
    attributes: dict[str, Any] = {name: property(_reader(name)) for name in names}
    return type(kind.__name__, (kind,), attributes | {"_reads_whole": kind})


def _reader(name: str) -> Any:
    def read(module: nn.Module) -> torch.Tensor | None:
        parameter = module._parameters[name]
        if not isinstance(parameter, DTensor):
            return parameter
        gradients, divisor = module._local_reads[name]  # type: ignore[index]
        if parameter.device_mesh.ndim > len(gradients):
            return parameter  # at rest, sharded over ranks of data too: FSDP asks for it
        here = parameter.to_local(grad_placements=gradients)
        return here if divisor == 1 else here / divisor

    return read
