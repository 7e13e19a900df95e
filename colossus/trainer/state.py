"""What training changes: weights, optimizer state, and how many steps were taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colossus import optim
from colossus.architecture import Architecture
from colossus.checkpoints.format import Key
from colossus.checkpoints.load import Checkpoint
from colossus.checkpoints.passing import pass_on
from colossus.checkpoints.weights import Weights
from colossus.errors import UserError
from colossus.job import Job
from colossus.models.init import kept_buffers, logical_name
from colossus.optim import Optimizer
from colossus.parallel.apply import build
from colossus.parallel.data import reshard
from colossus.parallel.pipeline import Pipeline
from colossus.parallel.placements import replicated
from colossus.parallel.program import decoders
from colossus.parallel.world import World
from colossus.precision import torch_type
from colossus.trainer.balance import Balance

LogicalTensors = dict[Key, torch.Tensor]


@dataclass
class TrainState:
    """Model, optimizer and the number of updates taken; `step` is also the next step's number.

    mesh: of the ranks that have the same part of the model, or shards of it; None: this one has all.
    updating: an update has begun and not ended.
    """

    arch: Architecture
    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    mesh: DeviceMesh | None = None
    updating: bool = False
    balance: Balance = field(init=False)

    def __post_init__(self) -> None:
        self.balance = Balance(*decoders(self.model))

    @classmethod
    def build(cls, job: Job, world: World) -> TrainState:
        """Builds on the meta device, shards, and initialises this rank's part: nothing is allocated twice."""
        model = build(job, world)
        optimizer = optim.build(model, job.model, job.optimizer, torch_type(job.precision.type))
        mesh = None if world.meshes is None else world.meshes.dense
        return cls(job.model, model, optimizer, mesh=mesh)

    def tensors(self) -> LogicalTensors:
        """(name, kind) -> tensor, for checkpoints: what this rank's stages have of weights in fp32, buffers
        and optimizer state; but for what an earlier stage of another rank has too."""
        copied = self._copied()
        return {key: tensor for key, tensor in self.held() if key[0] not in copied}

    def restore(self, checkpoint: Checkpoint, *, share: bool = False) -> None:
        """Takes weights, optimizer state and step from a checkpoint of any layout.

        share: reads its share of what ranks have in common; once all have done so, `pass_on` brings the rest.

        Raises:
            UserError: it is of another model, on every rank. MachineError: it is damaged.
        """
        check_model(checkpoint.path, checkpoint.meta, self.arch)
        checkpoint.load_into(self.held(), share=share)
        self.optimizer.num_steps = checkpoint.meta["optimizer_steps"]
        self.step = checkpoint.meta["step"]

    def pass_on(self) -> None:
        """Brings what each rank has read to all that hold it. Every rank calls this."""
        pass_on(self.held())

    def begin_with(self, weights: Weights) -> None:
        """Takes the weights of another model, and no more: step 0 of a new schedule."""
        reshard(self.model)
        for part in decoders(self.model):
            weights.load_into(part)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return meta_of(self.arch, self.step, self.optimizer.num_steps)

    def held(self) -> Iterator[tuple[Key, torch.Tensor]]:
        """All that this rank has a part of. Its first and its last stage may have a parameter of one name."""
        reshard(self.model)
        for name, parameter in self.model.named_parameters():
            yield (logical_name(name), "weight"), parameter.detach()
        for name, buffer in kept_buffers(self.model).items():
            yield (name, "buffer"), buffer if self.mesh is None else replicated(buffer, self.mesh)
        yield from self.optimizer.named_state()

    def _copied(self) -> set[str]:
        if not isinstance(self.model, Pipeline) or any(part.is_first for part in self.model.decoders):
            return set()
        copies = {id(parameter) for parameter in self.model.copies}
        return {logical_name(n) for n, p in self.model.named_parameters() if id(p) in copies}


def meta_of(arch: Architecture, step: int = 0, optimizer_steps: int = 0) -> dict[str, Any]:
    """What a checkpoint says of its model and how far that is trained; the run adds what it decided."""
    return {
        "step": step,
        "optimizer_steps": optimizer_steps,
        "architecture": arch.model_dump(exclude={"init_from"}),
    }


def check_model(path: Path, meta: Mapping[str, Any], arch: Architecture) -> None:
    """Raises `UserError` where the checkpoint at `path` is of another model, and says in what they differ."""
    there, here = (
        meta.get("architecture", {}),
        arch.model_dump(mode="json", exclude={"preset", "init_from"}),
    )
    if differing := [
        f"{n}: {there[n]!r}, {here[n]!r}" for n in here if n in there and _is_other(there[n], here[n])
    ]:
        raise UserError(f"{path}: of another model; differing in model (there, here): {'; '.join(differing)}")


def _is_other(there: Any, here: Any) -> bool:
    """Of a table, what is not there yet had the default then."""
    if isinstance(there, dict) and isinstance(here, dict):
        return any(name in there and _is_other(there[name], value) for name, value in here.items())
    return bool(there != here)
