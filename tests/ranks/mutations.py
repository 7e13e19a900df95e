"""What comparing with one rank must notice: each switches off one reduction, or brings back one trap.

A mutation is put into the functions that ranks really call, within their processes, for one training.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Replicate

import colossus.models.loss
from colossus.architecture import IGNORED
from colossus.models import init
from colossus.models.router import Router
from colossus.optim import muon
from colossus.parallel import (
    collectives,
    context,
    data,
    expert,
    grad_norm,
    pipeline,
    placements,
    program,
    tensor,
    whole,
)
from colossus.parallel.collectives import Group
from colossus.parallel.pipeline import Pipeline
from colossus.trainer.balance import Balance
from tests.ranks import cases
from tests.ranks.cases import Case, Result, compare
from tests.ranks.matrix import BY_SEQUENCE, EXPERTS, OF_MANY
from tests.ranks.pool import Pool
from tests.ranks.routes import Routes

Patches = Iterator[Any]
ZERO_BUBBLE: dict[str, Any] = {"pp": 2, "stages_per_rank": 2, "schedule": "zbv_zero_bubble"}


STALE = (
    r"(?m)^(E\s+)?(AttributeError|ImportError|NameError|TypeError): "  # how an error of Python's words begins
)


@dataclass(frozen=True)
class Mutation:
    """name: what is wrong. patches: puts it in. case: whose comparison notices it. compiled: it is slow."""

    name: str
    patches: Callable[[], Patches]
    case: Case
    compiled: bool = False

    def deviation(self, pool: Pool) -> float:
        """The largest, in units of what is allowed; infinite where training fails or gives no number.

        Raises AssertionError where the mutation itself fails: it says words that the program no longer has.
        """
        try:
            found = compare(pool, self.case, partial(train_mutated, self.name))
        except AssertionError as error:
            assert not re.search(STALE, str(error)), f"{self.name}: {error}"
            print(error)
            return math.inf
        return max(math.inf if math.isnan(value) else value / allowed for value, allowed in found.values())


MUTATIONS: dict[str, Mutation] = {}


def mutation(name: str, case: Case, compiled: bool = False) -> Callable[[Callable[[], Patches]], Any]:
    """Enters what is decorated, which yields patches, in the table."""

    def enter(patches: Callable[[], Patches]) -> Callable[[], Patches]:
        assert name not in MUTATIONS
        MUTATIONS[name] = Mutation(name, patches, case, compiled)
        return patches

    return enter


def train_mutated(name: str, case: Case, routes: Routes | None) -> Result:
    """As `cases.train`, with a mutation."""
    with contextlib.ExitStack() as stack:
        for patch in MUTATIONS[name].patches():
            stack.enter_context(patch)
        return cases.train(case, routes)


def replaced(owner: Any, name: str, by: Any) -> Any:
    return mock.patch.object(owner, name, by)


def inner(owner: Any, name: str) -> Any:
    """What a module imported for itself."""
    return getattr(owner, name)


def own_part(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    return x.chunk(group.size, dim=dim)[group.rank] if group.size > 1 else x


# Tensor and sequence parallelism.


@mutation("gradients of weights that ranks of tp read as replicas are not summed", Case.of(tp=2))
def _() -> Patches:
    yield replaced(placements, "Partial", Replicate)


@mutation("what ranks of tp add to a token is not summed", Case.of(tp=2))
def _() -> Patches:
    yield replaced(tensor, "scatter_sum", own_part)


@mutation("the gradient of gathered tokens is cut, not summed", Case.of(tp=2))
def _() -> Patches:
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return own_part(grad, ctx.group, ctx.dim), None, None

    yield replaced(collectives._Gather, "backward", staticmethod(backward))


@mutation("each rank of tp adds a whole bias to the sum", Case.of(tp=2, preset="gpt2-124m"))
def _() -> Patches:
    place = placements.place
    yield replaced(tensor, "place", lambda m, name, mesh, dims, divisor=1: place(m, name, mesh, dims))


@mutation("a norm over all heads takes the mean of this rank's alone", Case.of(tp=2, preset="olmo2-7b"))
def _() -> Patches:
    yield replaced(tensor, "_mean", lambda group, mean: mean)


@mutation("the loss of shared vocabulary takes the sum of this rank's exponentials", Case.of(tp=2))
def _() -> Patches:
    yield replaced(whole.VocabShare, "sum", lambda share, x: x)


@mutation("the cross entropy of shared vocabulary is computed in bf16", Case.of(tp=2, type="fp32"))
def _() -> Patches:
    compute = colossus.models.loss._loss_and_gradient

    def rounded(logits: torch.Tensor, targets: torch.Tensor, *more: Any) -> tuple[torch.Tensor, ...]:
        return tuple(found.float() for found in compute(logits.bfloat16(), targets, *more))

    yield replaced(colossus.models.loss, "_loss_and_gradient", rounded)


@mutation("an asynchronous tensor enters compiled layers", Case.of(tp=2, dp_shard=2, compile=True), True)
def _() -> Patches:
    from torch.distributed import _functional_collectives as asynchronous

    reduce: Any = getattr(asynchronous, "reduce_scatter_single_autograd", None)
    reduce = reduce or asynchronous.reduce_scatter_tensor_autograd  # its name before PyTorch 2.13

    def unawaited(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return collectives.scatter_sum(x, group, dim)
        return reduce(x, "sum", dim, group.name)

    yield replaced(tensor, "scatter_sum", unawaited)


# Data parallelism.


@mutation("gradients are averaged over ranks", Case.of(dp_shard=2))
def _() -> Patches:
    yield replaced(FSDPModule, "set_gradient_divide_factor", lambda module, factor: None)
    yield replaced(FSDPModule, "set_force_sum_reduction_for_comms", lambda module, force: None)


@mutation("gradients do not cross replicas", Case.of(dp_replicate=2))
def _() -> Patches:
    yield replaced(data, "_mesh", lambda mesh, axis: mesh[axis])


@mutation("the loss is divided by this rank's targets", Case.of(dp_shard=2))
def _() -> Patches:
    compute = program.forward_backward

    def divided(model: Any, parts: Any, *, num_targets: int, **more: Any) -> torch.Tensor:
        own = sum(int((targets != IGNORED).sum()) for _, targets, _ in parts)
        return compute(model, parts, num_targets=2 * own, **more) * num_targets / (2 * own)

    yield replaced(cases, "forward_backward", divided)


@mutation("each micro batch is divided by its own targets", Case.of(dp_shard=2, micro_batch=2))
def _() -> Patches:
    def divided(
        model: Any, parts: Any, *, num_targets: int, num_tokens: int, zero: int, z_loss: float
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for index, (tokens, targets, documents) in enumerate(parts):
            data.prepare_backward(model, zero, last=index == len(parts) - 1)
            loss, own = model(tokens, targets, documents, z_loss=z_loss)
            (loss / (own * 2 * len(parts))).backward()
            total += loss.detach()
        return total

    yield replaced(cases, "forward_backward", divided)


@mutation("rows of padding are scored", Case.of(dp_shard=3))
def _() -> Patches:
    pad = functional.pad
    yield replaced(functional, "pad", lambda x, by, value=0: pad(x, by, value=max(value, 0)))


# Pipelines.


@mutation(
    "gradients of tied embeddings on two stages are not summed", Case.of({"tie_embeddings": True}, pp=2)
)
def _() -> Patches:
    yield replaced(Pipeline, "_sum_tied_gradients", lambda self: None)


@mutation(
    "gradients of tied embeddings on two stages of one rank are not summed",
    Case.of({"tie_embeddings": True}, **ZERO_BUBBLE),
)
def _() -> Patches:
    yield replaced(Pipeline, "_sum_tied_gradients", lambda self: None)


@mutation("the norm counts tied embeddings twice", Case.of({"tie_embeddings": True}, pp=2))
def _() -> Patches:
    yield replaced(Pipeline, "copies", [])


@mutation("the norm is of this stage's gradients", Case.of(pp=2))
def _() -> Patches:
    clip = grad_norm.clip
    yield replaced(program, "clip", lambda parameters, most, *more: clip(parameters, most))


@mutation("gradients are divided by the number of micro batches", Case.of(pp=2))
def _() -> Patches:
    kind_of: Any = inner(pipeline, "get_schedule_class")

    def scaling(name: str) -> Any:
        kind = kind_of(name)

        def init(self: Any, *values: Any, scale_grads: bool, **more: Any) -> None:
            kind.__init__(self, *values, scale_grads=True, **more)

        return type(kind.__name__, (kind,), {"__init__": init})

    yield replaced(pipeline, "get_schedule_class", scaling)


@mutation("later stages do not know documents", Case.of(pp=2, packed=True))
def _() -> Patches:
    takes = pipeline._as_decoder_takes

    def forgetful(of: Any, part: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        known = kwargs if part.is_first else {k: v for k, v in kwargs.items() if k != "documents_BT"}
        return takes(of, part, args, known)

    yield replaced(pipeline, "_as_decoder_takes", forgetful)


@mutation("zero bubble lets go of gathered weights", Case.of(**ZERO_BUBBLE, dp_shard=2, zero=3))
def _() -> Patches:
    yield from ()


@mutation(
    "schedules that split the backward pass run compiled layers",
    Case.of(pp=2, dp_shard=2, ep=2, stages_per_rank=2, schedule="dualpipe_v", compile=True, **EXPERTS),
    compiled=True,
)
def _() -> Patches:
    yield from ()


@mutation(
    "selective recomputation under a split backward pass", Case.of(**ZERO_BUBBLE, recompute="selective")
)
def _() -> Patches:
    yield from ()


# Context parallelism.


@mutation("gathered blocks stay in the order of ranks", Case.of(cp=2))
def _() -> Patches:
    yield replaced(context.Gathered, "whole", lambda self, x, dim: collectives.gather(x, self.group, dim))


@mutation("tokens' positions are counted on each rank", Case.of(cp=2))
def _() -> Patches:
    own = context.Gathered.own

    def counted(self: Any, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        return own(self, x, dim) if dim else torch.arange(len(x) // self.group.size)

    yield replaced(context.Gathered, "own", counted)


@mutation("documents are not kept apart", Case.of(cp=2, packed=True))
def _() -> Patches:
    see = whole.RankShare.sight
    yield replaced(whole.RankShare, "sight", lambda self, a, t, d, type: see(self, a, t, None, type))


@mutation(
    "heads that change ranks leave their sinks behind",
    Case.of({"attention_sinks": True}, cp=2, cp_method="ulysses"),
)
def _() -> Patches:
    attend = inner(context, "attend")

    def without(q: Any, k: Any, v: Any, mask: Any, scores: Any, heat: Any, sinks: Any, **how: Any) -> Any:
        return attend(q, k, v, mask, scores, heat, sinks * 0, **how)

    yield replaced(context, "attend", without)


# Experts.


@mutation("rows come back in the order of experts", Case.of(dp_shard=2, ep=2, **EXPERTS))
def _() -> Patches:
    def bring_back(self: Any, y_RD: torch.Tensor) -> torch.Tensor:
        return collectives.exchange(y_RD, self.group, self.sent, self.received)

    yield replaced(expert.RowExchange, "bring_back", bring_back)


@mutation("gradients of rows do not go back", Case.of(dp_shard=2, ep=2, **EXPERTS))
def _() -> Patches:
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return collectives.all_to_all(grad, ctx.group, ctx.sent, ctx.received) * 0, None, None, None

    yield replaced(collectives._Exchange, "backward", staticmethod(backward))


@mutation("gradients of an expert's shards are averaged", Case.of(dp_shard=4, ep=2, **EXPERTS))
def _() -> Patches:
    divide = FSDPModule.set_gradient_divide_factor

    def twice(module: Any, factor: float) -> None:
        divide(module, 2.0 if "Experts" in type(module).__name__ else factor)

    yield replaced(FSDPModule, "set_gradient_divide_factor", twice)


@mutation("visits of a sequence are counted on each rank", Case.of(BY_SEQUENCE, cp=2, **EXPERTS))
def _() -> Patches:
    yield replaced(expert, "all_reduce", lambda x, group: x)


@mutation(
    "visits are counted once more where layers are recomputed",
    Case.of(recompute="full", dp_shard=2, **EXPERTS),
)
def _() -> Patches:
    route, take = Router.forward, Balance.take
    seen: dict[int, list[torch.Tensor]] = {}

    def counting(self: Router, x_BTD: torch.Tensor, token_share: torch.Tensor | None) -> Any:
        routes = route(self, x_BTD, token_share)
        assert routes.load is not None
        seen.setdefault(id(self), []).append(routes.load)
        return routes

    def taken(self: Balance) -> torch.Tensor:
        take(self)
        loads = [torch.stack(seen.pop(id(router))).double().sum(0) for router in self._routers.values()]
        return torch.stack(loads).flatten()

    yield replaced(Router, "forward", counting)
    yield replaced(Balance, "take", taken)


@mutation("balance counts this rank's visits alone", Case.of(dp_shard=2, **EXPERTS))
def _() -> Patches:
    update, take = Balance.update, Balance.take

    def remembered(self: Balance) -> torch.Tensor:
        self.own = take(self)  # type: ignore[attr-defined]
        return self.own  # type: ignore[attr-defined]

    yield replaced(Balance, "take", remembered)
    yield replaced(Balance, "update", lambda self, loads, *, move: update(self, self.own, move=move))


@mutation(
    "gradients of a layer that is recomputed drop its routers' terms",
    Case.of(recompute="full", dp_shard=2, **OF_MANY),
)
def _() -> Patches:
    from colossus.models import experts

    yield replaced(experts, "with_objective", lambda x, objective: x)


@mutation("each rank of etp adds a whole bias to the sum", Case.of(tp=2, etp=2, preset="gpt-oss-20b"))
def _() -> Patches:
    place = placements.place
    yield replaced(expert, "place", lambda m, name, mesh, dims, divisor=1: place(m, name, mesh, dims))


# What all ranks hold together.


@mutation("the norm is of this rank's shards", Case.of(dp_shard=2))
def _() -> Patches:
    reduce = dist.all_reduce

    def only_figures(tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        return reduce(tensor, group=group, async_op=True) if async_op else None

    yield replaced(dist, "all_reduce", only_figures)


@mutation("initial values are drawn for a shard as for a whole", Case.of(dp_shard=2))
def _() -> Patches:
    begins = inner(init, "box")
    yield replaced(init, "box", lambda tensor: ((0,) * tensor.ndim, begins(tensor)[1]))


@mutation("matrices are made orthogonal shard by shard", Case.of(dp_shard=2, optimizer="muon"))
def _() -> Patches:
    def each_its_own(families: Any, read: Any, work: Any) -> Iterator[dict[int, torch.Tensor]]:
        buckets = (bucket for family in families for bucket in family)
        return ({index: work(read(index).unsqueeze(0))[0] for index in bucket.matrices} for bucket in buckets)

    yield replaced(muon, "at_owners", each_its_own)
