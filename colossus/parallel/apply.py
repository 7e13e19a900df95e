"""Turns a model on the meta device into this rank's part of it, in one fixed order."""

from __future__ import annotations

import dataclasses

import torch

from colossus.job import Job
from colossus.models import Decoder, initialise
from colossus.parallel.binaries import choose_cache, drop_torn_binaries
from colossus.parallel.collectives import Group
from colossus.parallel.data import shard
from colossus.parallel.expert import apply_expert_parallel
from colossus.parallel.mesh import shared_slices
from colossus.parallel.pipeline import Pipeline, cut
from colossus.parallel.recompute import recompute_layers
from colossus.parallel.tensor import apply_tensor_parallel, overlap_products
from colossus.parallel.whole import RankShare
from colossus.parallel.world import World
from colossus.precision import apply_precision, torch_type


def build(job: Job, world: World) -> Decoder | Pipeline:
    """This rank's part of the model that `job` describes: nothing is allocated twice, or for other ranks.
    What a layout leaves open is the simplest."""
    return materialise(transformed(job, world), job, world.device)


def transformed(job: Job, world: World) -> Decoder | Pipeline:
    """This rank's part as it will be computed, on the meta device."""
    job = dataclasses.replace(job, layout=job.layout.filled())
    with torch.device("meta"):
        parts = cut(job, world)
    with shared_slices():
        for part in parts:
            apply(part, job, world)
    return parts[0] if job.layout.pp == 1 else Pipeline(parts, job, world)


def materialise(model: Decoder | Pipeline, job: Job, device: torch.device) -> Decoder | Pipeline:
    """Gives it memory and initial values, of the local shard alone."""
    # Else its weights would be NaN, and nothing would say so.
    known = job.model.initializer_range is not None or device.type == "meta"
    assert known, "model.initializer_range is not derived yet"
    model.to_empty(device=device)
    initialise(model, job.model, job.run.seed)
    return model


def apply(model: Decoder, job: Job, world: World) -> None:
    """Precision, tensor, expert and context parallelism, recomputation, compilation, sharding (DESIGN
    section 6)."""
    layout, meshes = job.layout.of_replica(world.place.dp_replicate), world.meshes
    apply_precision(model, job.precision.type)
    if meshes is not None:
        cp, tp = Group(meshes.cp), Group(meshes.tp)
        if tp.size > 1:
            apply_tensor_parallel(model, meshes.dense["tp"], tp)
            if layout.async_tp:
                overlap_products(tp)
        if meshes.expert is not None:
            apply_expert_parallel(model, meshes)
        if cp.size > 1 or tp.size > 1 or layout.pp > 1:
            model.whole = RankShare(job.model, layout, cp, tp)
    recompute_layers(model, layout.recompute, layout.recompute_layers)
    if layout.compile:
        compile_layers(model)
    if meshes is not None:
        shard(model, world, torch_type(job.precision.type))


def compile_layers(model: Decoder) -> None:
    """Compiles layer by layer: they are alike, so one compilation serves all."""
    choose_cache()
    drop_torn_binaries()
    model.compiled = True
    for layer in model.layers:
        layer.compile(dynamic=False)


def uncompile_layers(model: Decoder) -> None:
    """Lets them run as they were written again."""
    model.compiled = False
    for layer in model.layers:
        layer._compiled_call_impl = None  # what `Module.compile` sets; PyTorch has no way back of its own
