"""What training changes: weights, optimizer state, and how many steps were taken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from colossus import optim
from colossus.architecture import Architecture
from colossus.checkpoints.load import Checkpoint
from colossus.checkpoints.weights import Weights
from colossus.job import Job
from colossus.models.init import logical_name
from colossus.optim import Optimizer
from colossus.parallel.apply import build
from colossus.parallel.data import reshard
from colossus.parallel.program import decoders
from colossus.parallel.world import World
from colossus.precision import torch_type
from colossus.trainer.balance import Balance

LogicalTensors = dict[tuple[str, str], torch.Tensor]


@dataclass
class TrainState:
    """Model, optimizer and the number of updates taken; `step` is also the next step's number."""

    arch: Architecture
    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    balance: Balance = field(init=False)

    def __post_init__(self) -> None:
        self.balance = Balance(*decoders(self.model))

    @classmethod
    def build(cls, job: Job, world: World) -> TrainState:
        """Builds on the meta device, shards, and initialises this rank's part: nothing is allocated twice."""
        model = build(job, world)
        optimizer = optim.build(model, job.model, job.optimizer, torch_type(job.precision.type))
        return cls(job.model, model, optimizer)

    def tensors(self) -> LogicalTensors:
        """(name, kind) -> tensor, for checkpoints: weights in fp32, buffers, optimizer state."""
        reshard(self.model)
        weights = {(logical_name(n), "weight"): p.detach() for n, p in self.model.named_parameters()}
        named_buffers = ((logical_name(name), b) for name, b in self.model.named_buffers())
        buffers = {(n, "buffer"): b for n, b in named_buffers if n in self.model.state_dict()}
        return weights | buffers | self.optimizer.state()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes weights, optimizer state and step from a checkpoint of any layout."""
        checkpoint.load_into(self.tensors())
        self.optimizer.num_steps = checkpoint.meta["optimizer_steps"]
        self.step = checkpoint.meta["step"]

    def begin_with(self, weights: Weights) -> None:
        """Takes the weights of another model, and no more: step 0 of a new schedule."""
        reshard(self.model)
        weights.load_into(self.model)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says beside its tensors."""
        return {
            "step": self.step,
            "optimizer_steps": self.optimizer.num_steps,
            "architecture": self.arch.model_dump(exclude={"init_from"}),
        }
