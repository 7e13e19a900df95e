"""One training of a few steps in any layout, compared with one rank's: float64 decides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from colossus.architecture import Architecture
from colossus.job import Job
from colossus.layout import ZERO_BUBBLE, Layout
from colossus.models.box import box, local
from colossus.models.init import logical_name
from colossus.parallel.program import clip_gradients, forward_backward
from colossus.parallel.world import World
from colossus.sections import Data, Optimizer, Precision, RunSection
from colossus.trainer.state import TrainState
from tests.perf.tiny import tiny
from tests.ranks.pool import Pool
from tests.ranks.routes import Routes

STEPS = 3
TINY = 1e-6
# Final weights decide in fp64 alone: AdamW makes of rounding what it makes of a gradient.
ALLOWED = {
    "fp64": dict.fromkeys(("loss", "grad_norm", "gradients", "weights", "loads"), 1e-9),
    "fp32": dict.fromkeys(("loss", "grad_norm", "gradients", "loads"), 1e-5),
}
SPLITS = (1, 2, 4)  # rows at once, of one rank whose noise is asked for
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

    preset: whose parts a tiny model has; changed: what else is of its own, `experts.` before what is in that
    table. batch: samples of a step; where
    ranks and micro batches do not divide it, rows without targets follow. packed: with documents that end
    within samples.
    """

    layout: tuple[tuple[str, Any], ...] = ()
    preset: str = "llama3.1-8b"
    changed: tuple[tuple[str, Any], ...] = ()
    type: str = "fp64"
    optimizer: str = "adamw"
    batch: int = 8
    seq_len: int = 16
    packed: bool = False
    steps: int = STEPS

    @classmethod
    def of(cls, changed: dict[str, Any] | None = None, **values: Any) -> Case:
        """Values are of the case, or of its layout; `changed` of its model."""
        own = {f.name for f in fields(cls)}
        layout = tuple((name, value) for name, value in values.items() if name not in own)
        rest = {name: value for name, value in values.items() if name in own}
        return cls(layout, changed=tuple((changed or {}).items()), **rest)

    def __str__(self) -> str:
        default = Case()
        said = [f"{name}={value}" for name, value in self.layout if value != DEFAULTS.get(name)]
        said += [
            getattr(self, n)
            for n in ("preset", "type", "optimizer")
            if getattr(self, n) != getattr(default, n)
        ]
        said += [f"{name}={value}" for name, value in self.changed]
        said += [
            f"{n}={getattr(self, n)}" for n in ("batch", "seq_len") if getattr(self, n) != getattr(default, n)
        ]
        return " ".join([*said, *["packed"] * self.packed])

    @property
    def one_rank(self) -> Case:
        """The same, whatever the layout."""
        return replace(self, layout=())

    @property
    def arch(self) -> Architecture:
        arch = tiny(self.preset, vocab_size=64, intermediate_size=48)
        values = arch.model_dump(exclude_unset=True)
        for name, value in self.changed:
            table, _, key = name.rpartition(".")
            (values[table] if table else values)[key] = value
        return Architecture.model_validate(values)

    def job(self) -> Job:
        """Without a layout: of one rank that takes the batch at once."""
        values = DEFAULTS | {"micro_batch": 1 if self.layout else self.batch} | dict(self.layout)
        apart = values["pp"] > 1 and values["schedule"] in ZERO_BUBBLE
        values.setdefault("zero", 1 if apart else 3 if values["pp"] == 1 else 2)
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
    """losses, grad_norms: of each step; loads: what routers counted in it, over all ranks. gradients: of the
    first, weights: after the last; by name the boxes that this rank holds: (offset, sizes, values)."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    loads: list[list[float]] = field(default_factory=list)
    routes: Routes = field(default_factory=Routes)


def train(case: Case, routes: Routes | None = None) -> Result:
    """Takes the steps of `case` as this rank of its layout. routes: that tokens take, where given."""
    job = case.job()
    if job.layout.compile:
        torch._dynamo.reset()  # or the layers of earlier calls use up what may be compiled
        torch._dynamo.utils.counters.clear()
    with World.join(job.layout, "cpu", experts=job.model.experts is not None) as world:
        state = TrainState.build(job, world)
        result = Result()
        result.routes.take(state.model, world, given=routes)
        for step in range(case.steps):
            result.routes.begin(step, case.rows(step)[0])
            _step(case, job, world, state, step, result)
        result.weights = _boxes(state, lambda parameter: parameter)
    if job.layout.compile:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    return result


def _step(case: Case, job: Job, world: World, state: TrainState, step: int, result: Result) -> None:
    tokens, targets, documents = case.rows(step)
    num_targets, num_tokens = int((targets != IGNORED).sum()), targets.numel()
    loss = forward_backward(
        state.model,
        _micro_batches(job, world, tokens, targets, documents),
        num_targets=num_targets,
        num_tokens=num_tokens,
        zero=job.layout.zero,
        z_loss=job.optimizer.z_loss,
    )
    if step == 0:
        result.gradients = _boxes(state, lambda parameter: parameter.grad)
    norm = clip_gradients(state.model, job.optimizer.grad_clip, world)
    told = torch.cat([(loss * (world.place.tp == 0)).view(1), state.balance.take()])
    total, *loads = world.begin_sum(told).wait()
    state.optimizer.step(1.0)
    state.optimizer.zero_grad()
    state.balance.update(torch.tensor(loads, dtype=torch.float64), move=True)
    result.loads.append(loads)
    result.losses.append(total / num_targets)
    result.grad_norms.append(float(norm))


def _micro_batches(
    job: Job, world: World, tokens: torch.Tensor, targets: torch.Tensor, documents: torch.Tensor | None
) -> list[Any]:
    """This rank's rows, as the loader deals them out: all ranks have equally many, the last ones padding."""
    data, micro = world.data, job.layout.micro_batch
    share = -(-len(tokens) // data.size)
    rows = -(-share // micro) * micro

    def mine(x: torch.Tensor, fill: int) -> tuple[torch.Tensor, ...]:
        here = x[data.rank * share : (data.rank + 1) * share]
        return F.pad(here, (0, 0, 0, rows - len(here)), value=fill).split(micro)

    parts = [mine(tokens, 0), mine(targets, IGNORED)]
    packed = [None] * len(parts[0]) if documents is None else mine(documents, 0)
    return list(zip(*parts, packed, strict=True))


def _boxes(state: TrainState, of: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parameter in state.model.named_parameters():
        tensor = of(parameter)
        assert tensor is not None, f"{name} has no gradient"
        found[logical_name(name)] = (*box(tensor), local(tensor.detach()).clone())
    return found


@functools.lru_cache(maxsize=256)
def _one_rank(case: Case, micro_batch: int, routes: Routes | None = None) -> Result:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(replace(case, layout=(("micro_batch", micro_batch),)), routes)
    finally:
        torch.set_num_threads(threads)


def reference(case: Case) -> Result:
    """The same on one rank, computed once for all layouts."""
    return _one_rank(case.one_rank, case.batch)


def noise(case: Case) -> dict[str, float]:
    """What one rank deviates from itself by where it takes the batch in parts; by gradients from fp64, too:
    ranks of tp and cp round each their part of a sum."""
    routes = reference(case).routes
    found = [deviations(case, [_one_rank(case.one_rank, n, routes)]) for n in SPLITS if n < case.batch]
    exact = _one_rank(replace(case.one_rank, type="fp64"), case.batch, routes)
    by_type = deviations(case, [exact])
    found.append({name: by_type[name] for name in ("grad_norm", "gradients")})
    return {name: max(of_one.get(name, 0.0) for of_one in found) for name in found[0]}


def compare(
    pool: Pool, case: Case, by: Callable[[Case, Routes | None], Result] = train
) -> dict[str, tuple[float, float]]:
    """Trains in the ranks of a layout and on one: what deviates by how much, and by how much it may."""
    has_choices = case.type != "fp64" and case.arch.experts is not None
    routes = reference(case).routes if has_choices else None
    found = deviations(case, pool.run(case.job().layout.num_ranks, by, case, routes))
    if case.type == "bf16":
        own = noise(case)
        allowed = {"loss": min(3 * own["loss"], 2e-3)} | {n: 3 * own[n] for n in ("grad_norm", "gradients")}
    else:
        allowed = ALLOWED[case.type]
    return {name: (found[name], allowed[name]) for name in allowed if name in found}


def deviations(case: Case, results: list[Result]) -> dict[str, float]:
    """The largest relative deviation from one rank: of losses and norms, of gradients and weights by norm."""
    expected = reference(case)

    def relative(found: list[float], right: list[float]) -> float:
        return max(abs(a - b) / max(abs(b), TINY) for a, b in zip(found, right, strict=True))

    found = {
        "loss": max(relative(r.losses, expected.losses) for r in results),
        "grad_norm": max(relative(r.grad_norms, expected.grad_norms) for r in results),
        "gradients": _of_tensors([r.gradients for r in results], expected.gradients),
        "weights": _of_tensors([r.weights for r in results], expected.weights),
    }
    if expected.loads[0]:
        found["loads"] = max(
            relative(loads, right)
            for r in results
            for loads, right in zip(r.loads, expected.loads, strict=True)
        )
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
        print(f"largest deviation at {worst_name}: {worst:.1e}")
    return worst
