"""Data parallelism: FSDP2 over dp_shard x cp, replicated over dp_replicate; experts over their own ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from colossus.models import Decoder
from colossus.models.experts import Experts
from colossus.parallel.world import World


def shard(model: Decoder, world: World, compute_dtype: torch.dtype) -> None:
    """Shards layer by layer. Gradients are summed over ranks, not averaged: the loss is divided by the
    targets of the global batch already."""
    layout, meshes = world.layout, world.meshes
    assert meshes is not None
    # The model casts what it computes itself: what blocks are given beside activations stays exact.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if compute_dtype.itemsize < 4:
        policy = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def shard_over(
        module: nn.Module,
        mesh: DeviceMesh,
        *,
        dims: dict[nn.Parameter, int] | None = None,
        keep: bool = False,
    ) -> None:
        # FSDP's own choice is the first dimension, of which ranks beyond its size would have nothing.
        chosen = None if dims is None else lambda p: Shard(dims[p]) if p in dims else None
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=layout.zero == 3 and not keep,
            shard_placement_fn=chosen,
        )
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor

    apart = meshes.expert is not None and (layout.ep > 1 or layout.tp > 1)
    for layer in model.layers:
        stacks = [module for module in layer.modules() if isinstance(module, Experts)]
        if apart:
            assert meshes.expert is not None
            for experts in stacks:
                shard_over(
                    experts, _mesh(meshes.expert, "efsdp"), dims=_dims([experts], meshes.expert["efsdp"])
                )
        dims = None if apart or not stacks else _dims(stacks, meshes.dense["fsdp"])
        shard_over(layer, _mesh(meshes.dense, "fsdp"), dims=dims)
    shard_over(model, _mesh(meshes.dense, "fsdp"), keep=True)  # its backward pass follows at once


def _mesh(mesh: DeviceMesh, axis: str) -> DeviceMesh:
    return mesh["dp_replicate", axis] if mesh["dp_replicate"].size() > 1 else mesh[axis]


def _dims(stacks: Sequence[Experts], mesh: DeviceMesh) -> dict[nn.Parameter, int]:
    return {p: _dim(p, mesh.size()) for experts in stacks for p in experts.parameters()}


def _dim(parameter: torch.Tensor, num_ranks: int) -> int:
    """The first dimension that ranks can share equally; else the first, of which some have less."""
    here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return next((dim for dim, size in enumerate(here.shape[:2]) if size % num_ranks == 0), 0)


def reshard(model: nn.Module) -> None:
    """Lets go of gathered weights. A forward pass without a backward pass leaves those of the root gathered,
    cast to the type of the products: to save them would lose the digits that only the shards hold."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prepare_backward(model: nn.Module, zero: int, *, last: bool) -> None:
    """For the backward pass of one micro batch of several: what `zero` (see `layout.Layout`) says stays whole
    until the last one. Replicas always add up their sums after the last."""
    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(last)
    model.set_requires_gradient_sync(last or zero >= 2)
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(last or zero == 3)


def end_backward(model: nn.Module, *, last: bool) -> None:
    """After weights' gradients that were computed apart: FSDP, which waits for those of activations, takes
    them as it does behind any backward pass."""
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    for state in states:
        if (group := state._fsdp_param_group) is not None:
            group.post_backward()
    if last and states:
        states[0]._root_post_backward_final_callback()
