"""One training of a few steps in any layout, compared with one rank's: float64 decides."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from colossus.architecture import Architecture
from colossus.job import Data, Job, Optimizer, Precision, RunSection
from colossus.layout import Layout
from colossus.models.box import box, local
from colossus.parallel.program import clip_gradients, forward_backward
from colossus.parallel.world import World
from colossus.trainer.state import TrainState
from tests.perf.tiny import tiny

STEPS = 3
IGNORED = -100
DEFAULTS: dict[str, Any] = {
    "dp_replicate": 1,
    "dp_shard": 1,
    "tp": 1,
    "pp": 1,
    "cp": 1,
    "ep": 1,
    "etp": 1,
    "schedule": "1f1b",
    "stages_per_rank": 1,
    "cp_method": "gather",
    "micro_batch": 1,
    "recompute": "none",
    "async_tp": False,
    "compile": False,
    "pools": [],
}
RATES: dict[str, Any] = {
    "lr": 3e-3,
    "matrix_lr": 3e-3,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "momentum": 0.95,
    "grad_clip": 1.0,
    "z_loss": 1e-4,
}


@dataclass(frozen=True)
class Case:
    """A layout and what is trained in it.

    preset: whose parts a tiny model has; changed: what else is of its own. packed: with documents that end
    within samples. padding: the last rows of the global batch are no samples.
    """

    layout: tuple[tuple[str, Any], ...]
    preset: str = "llama3.1-8b"
    changed: tuple[tuple[str, Any], ...] = ()
    type: str = "fp64"
    optimizer: str = "adamw"
    batch: int = 8
    seq_len: int = 16
    packed: bool = False
    steps: int = STEPS

    @property
    def arch(self) -> Architecture:
        return tiny(self.preset, vocab_size=64, intermediate_size=48, **dict(self.changed))

    def job(self, one_rank: bool = False) -> Job:
        values = DEFAULTS | ({"micro_batch": self.batch} if one_rank else dict(self.layout))
        values.setdefault("reshard", values["pp"] == 1)
        return Job(
            model=self.arch,
            data=Data(seq_len=self.seq_len),
            optimizer=Optimizer(name=self.optimizer, **RATES),
            layout=Layout(**values),
            precision=Precision(type=self.type),
            run=RunSection(seed=7, global_batch=self.batch),
        )

    def rows(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The global batch of a step: some targets are not scored, in some rows more than in others."""
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(0, 16, (self.batch, self.seq_len + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        hidden = torch.rand(targets.shape, generator=generator) < torch.linspace(0, 0.6, self.batch)[:, None]
        targets[hidden] = IGNORED
        documents = None
        if self.packed:
            cuts = torch.rand(targets.shape, generator=generator) < 0.2
            documents = cuts.long().cumsum(1)
        return tokens[:, :-1].contiguous(), targets, documents


@dataclass
class Result:
    """losses, grad_norms: of each step. gradients: of the first, weights: after the last; by name the boxes
    that this rank holds: (offset, sizes, values)."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    loads: list[Any] = field(default_factory=list)


def train(case: Case, one_rank: bool = False) -> Result:
    """Takes the steps of `case` as this rank of its layout."""
    job = case.job(one_rank)
    with World.join(job.layout, "cpu", experts=job.model.experts is not None) as world:
        torch.set_num_threads(1)
        state = TrainState.build(job, world)
        result = Result()
        for step in range(case.steps):
            _step(case, job, world, state, step, result)
        result.weights = _boxes(state, lambda parameter: parameter)
    return result


def _step(case: Case, job: Job, world: World, state: TrainState, step: int, result: Result) -> None:
    tokens, targets, documents = case.rows(step)
    num_targets, num_tokens = int((targets != IGNORED).sum()), targets.numel()
    data, micro = world.data, job.layout.micro_batch
    share = -(-case.batch // data.size)
    mine = slice(data.rank * share, (data.rank + 1) * share)
    rows = [None if x is None else x[mine].split(micro) for x in (tokens, targets, documents)]
    parts = [tuple(None if x is None else x[i] for x in rows) for i in range(len(rows[0] or ()))]
    loss = forward_backward(
        state.model,
        parts,  # type: ignore[arg-type]
        num_targets=num_targets,
        num_tokens=num_tokens,
        z_loss=job.optimizer.z_loss,
    )
    if step == 0:
        result.gradients = _boxes(state, lambda parameter: parameter.grad)
    norm = clip_gradients(state.model, job.optimizer.grad_clip, world)
    total, *loads = world.sum([float(loss) * (world.place.tp == 0), *state.balance.take()])
    state.optimizer.step(1.0)
    state.optimizer.zero_grad()
    result.loads.append(state.balance.update(loads, move=True))
    result.losses.append(total / num_targets)
    result.grad_norms.append(float(norm))


def _boxes(state: TrainState, of: Any) -> dict[str, Any]:
    from colossus.models.init import logical_name

    found: dict[str, Any] = {}
    for name, parameter in state.model.named_parameters():
        tensor = of(parameter)
        assert tensor is not None, f"{name} has no gradient"
        found[logical_name(name)] = (*box(tensor), local(tensor.detach()).clone())
    return found


@functools.cache
def reference(case: Case) -> Result:
    """The same on one rank."""
    return train(case, one_rank=True)


def deviations(case: Case, results: list[Result]) -> dict[str, float]:
    """The largest relative deviation from one rank: of losses and norms, of gradients and weights by norm."""
    expected = reference(case)

    def relative(found: list[float], right: list[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(found, right, strict=True))

    found = {
        "loss": max(relative(r.losses, expected.losses) for r in results),
        "grad_norm": max(relative(r.grad_norms, expected.grad_norms) for r in results),
        "gradients": _of_tensors([r.gradients for r in results], expected.gradients),
        "weights": _of_tensors([r.weights for r in results], expected.weights),
    }
    loads = [[load and load.expert_load for load in r.loads] for r in results]
    assert all(of_rank == loads[0] for of_rank in loads)
    if expected.loads[0] is not None:
        right = [load.expert_load for load in expected.loads]
        found["loads"] = max(abs(a - b) for a, b in zip(loads[0], right, strict=True))
    return found


def _of_tensors(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> float:
    """Every box of every rank, replicas too, against the whole tensor; every element must be somewhere."""
    assert set().union(*ranks) == set(expected), set(expected).symmetric_difference(set().union(*ranks))
    worst, worst_name = 0.0, ""
    # A gradient that is 0 but for rounding, as a key's bias has, is compared in units of all of them.
    total = sum(float(whole.double().square().sum()) for _, _, whole in expected.values())
    for name, (_, _, whole) in expected.items():
        squares: dict[Any, float] = {}
        covered = torch.zeros(whole.shape, dtype=torch.bool)
        for rank in ranks:
            if name not in rank:
                continue
            offset, sizes, values = rank[name]
            here = tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))
            covered[here] = True
            difference = float((values.double() - whole[here].double()).square().sum())
            key = (offset, sizes)
            squares[key] = max(squares.get(key, 0.0), difference)
        assert covered.all(), f"no rank holds all of {name}"
        size = max(float(whole.double().square().sum()), 1e-6 * total)
        deviation = (sum(squares.values()) / size) ** 0.5
        if deviation > worst:
            worst, worst_name = deviation, name
    if worst > 1e-9:
        print(f"  largest at {worst_name}: {worst:.1e}")
    return worst
