"""Turns a model on the meta device into this rank's part of it, in one fixed order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from colossus.job import Job
from colossus.models import Decoder, initialise
from colossus.parallel.binaries import choose_cache, drop_torn_binaries
from colossus.parallel.world import World
from colossus.precision import apply_precision, torch_type


def apply(model: Decoder, job: Job, world: World) -> Decoder:
    """Recomputation, compilation, sharding; then memory and initial values for the local shard alone.

    Tensor, expert and context parallelism have their places before recomputation (DESIGN section 6).
    """
    apply_precision(model, job.precision.type)
    if job.layout.recompute == "full":
        recompute_layers(model)
    if job.layout.compile:
        compile_layers(model)
    if world.mesh is not None:
        shard(model, world, torch_type(job.precision.type))
    model.to_empty(device=world.device)
    initialise(model, job.model, job.run.seed)
    return model


def recompute_layers(model: Decoder) -> None:
    """Keeps only each layer's input; its forward pass is computed once more in the backward pass."""
    for index, layer in enumerate(model.layers):
        model.layers[index] = checkpoint_wrapper(layer)


def compile_layers(model: Decoder) -> None:
    """Compiles layer by layer: they are alike, so one compilation serves all."""
    choose_cache()
    drop_torn_binaries()
    for layer in model.layers:
        layer.compile(dynamic=False)


def shard(model: Decoder, world: World, compute_dtype: torch.dtype) -> None:
    """FSDP2 over dp_shard, replicated over dp_replicate. Gradients are summed over ranks, not averaged:
    the loss is divided by the targets of the global batch already."""
    assert world.mesh is not None
    mesh = world.mesh if world.mesh["dp_replicate"].size() > 1 else world.mesh["dp_shard"]
    # The model casts what it computes itself: what blocks are given beside activations stays exact.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if compute_dtype != torch.float32:
        policy = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor


def reshard(model: nn.Module) -> None:
    """Lets go of gathered weights. A forward pass without a backward pass leaves those of the root gathered,
    cast to the type of the products: to save them would lose the digits that only the shards hold."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def accumulate(model: nn.Module, *, last: bool) -> Iterator[None]:
    """One backward pass of several: gradients cross ranks in the last one alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield
