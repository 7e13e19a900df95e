"""A layer that is like another is computed once: what the tracer saw of it stands for the others.

The first time that a kind of layer is called it runs on its own, forwards and backwards, beside the program.
From then on each such layer is one operation that leaves the same memory and gives the same shapes. So a step
of a model of many layers and micro batches is traced in the time of a few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.pipelining import stage as pipelining
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from colossus.dryrun.apart import AFTER_GRADS, Apart
from colossus.dryrun.owners import EVERY_LAYER
from colossus.dryrun.tracer import Section, Tracer, Use, settled
from colossus.models import Decoder
from colossus.perf.parts import layer_kinds

Half = Literal["inputs", "weights"]
# The functions of PyTorch's pipelines that take them.
TAKE_HALVES: dict[str, Half] = {"stage_backward_input": "inputs", "stage_backward_weight": "weights"}


@dataclass(frozen=True)
class Like:
    """A tensor of which there may be more. placements: of a DTensor over `mesh`; shape: of what is here."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool
    mesh: Any = None
    placements: Any = None

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> Like | None:
        if tensor is None:
            return None
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        mesh, placements = (
            (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else (None, None)
        )
        return cls(tuple(here.shape), tensor.dtype, tensor.requires_grad, mesh, placements)

    def make(self) -> torch.Tensor:
        return self._placed(torch.empty(self.shape, dtype=self.dtype))

    def outline(self) -> torch.Tensor:
        """Its shape alone, of one number's memory."""
        return self._placed(torch.empty((), dtype=self.dtype).expand(self.shape))

    def _placed(self, here: torch.Tensor) -> torch.Tensor:
        if self.mesh is None:
            return here
        return DTensor.from_local(here, self.mesh, self.placements, run_check=False)


@dataclass(frozen=True)
class Halves:
    """A backward pass that computes the gradients of what a layer was given first, and its weights' later.

    weights: where these have no gradient yet, and where what is computed is added to one. left: bytes that
    wait in between, by use.
    """

    inputs: Section
    weights: tuple[Section, Section]
    left: dict[Use, int]


@dataclass(frozen=True)
class Seen:
    """What one kind of layer did. backward: where its parameters have no gradient yet, and where what it
    gives is added to one. gradients, of_apart: those that it gives, the latter of weights that are sharded
    apart. left: bytes that wait for the backward pass, by use; keeps: of what it was given, which waits
    too."""

    forward: Section
    backward: tuple[Section, Section]
    outputs: tuple[Like | None, ...]
    gradients: tuple[Like | None, ...]  # of x and of each parameter
    of_apart: tuple[Like | None, ...]
    left: dict[Use, int]
    keeps: tuple[bool, ...]
    halves: Halves | None = None


class Replay:
    """What was seen of a program's kinds of layers. in_halves: it takes some backward passes in two."""

    def __init__(self, tracer: Tracer, *, in_halves: bool) -> None:
        self.tracer, self.in_halves = tracer, in_halves
        self.half: Half | None = None
        self._known: dict[Any, Seen] = {}

    def of(self, model: Decoder) -> None:
        """Lets the layers of `model` stand for each other."""
        kinds = {layer: kind for kind, layers in layer_kinds(model.arch).items() for layer in layers}
        for name, layer in model.layers.named_children():
            kind, apart = (kinds[int(name)], type(layer).__name__), Apart(layer, self.tracer)
            layer.forward = partial(self._stand_in, layer, layer.forward, kind, apart)  # type: ignore[method-assign]

    @contextmanager
    def told(self) -> Iterator[None]:
        """Within this, PyTorch's pipelines say which half of a backward pass they take."""
        with ExitStack() as stack:
            for name, half in TAKE_HALVES.items():
                function = partial(self._within, half, getattr(pipelining, name))
                stack.enter_context(patch.object(pipelining, name, function))
            yield

    def _within(self, half: Half, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.half = half
        try:
            return function(*args, **kwargs)
        finally:
            self.half = None

    def _stand_in(
        self,
        layer: nn.Module,
        forward: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
        kind: Any,
        apart: Apart,
        x_BTD: torch.Tensor,
        *args: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return forward(x_BTD, *args)
        others = {id(weight) for weight in apart.all()}
        parameters = [p for p in layer.parameters() if id(p) not in others]
        key = (kind, tuple(x_BTD.shape), x_BTD.dtype, tuple(tuple(p.shape) for p in parameters))
        if key not in self._known:
            self._known[key] = self._watch(forward, parameters, apart, x_BTD, args)
        return _Ghost.apply(self._known[key], self, apart, args, x_BTD, *parameters)

    def _watch(
        self,
        forward: Callable[..., Any],
        parameters: list[nn.Parameter],
        apart: Apart,
        x_BTD: torch.Tensor,
        args: Any,
    ) -> Seen:
        """Of a layer that is called on its own: once where its parameters have no gradient, and once more."""
        before = [parameter.grad for parameter in parameters]
        alone = _Alone(self.tracer, forward, parameters, apart, x_BTD, args)
        with self.tracer.aside(), self.tracer.owned(EVERY_LAYER), apart.watched():
            alone.drop_gradients()
            seen, again = alone.whole(), alone.whole()
            seen = replace(seen, backward=(seen.backward[0], again.backward[0]))
            if self.in_halves:
                alone.drop_gradients()
                halves, again_halves = alone.halves(), alone.halves()
                weights = halves.weights[0], again_halves.weights[0]
                seen = replace(seen, halves=replace(halves, weights=weights))
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.grad = grad
        return seen


class _Alone:
    """A layer that is called on its own."""

    def __init__(
        self,
        tracer: Tracer,
        forward: Callable[..., Any],
        parameters: list[nn.Parameter],
        apart: Apart,
        x_BTD: torch.Tensor,
        args: Any,
    ) -> None:
        self._tracer, self._function, self._parameters = tracer, forward, parameters
        self._apart, self._x_BTD, self._args = apart, x_BTD, args

    def drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def whole(self) -> Seen:
        """A forward pass, and the backward pass of inputs and weights at once."""
        leaf, outputs, forwards, left, keeps = self._forwards()
        backwards: list[Section] = []
        with ExitStack() as stack:
            outputs[0].register_hook(lambda _: backwards.append(stack.enter_context(self._tracer.section())))
            beyond = outputs[0] * 1  # so that the gradient is PyTorch's own: ours would be held by Python
            beyond.backward(torch.empty_like(beyond))
        self._apart.without_sums(backwards[0].spans)
        seen = Seen(
            forwards,
            (backwards[0], backwards[0]),
            tuple(Like.of(tensor) for tensor in outputs),
            tuple(Like.of(tensor.grad) for tensor in (leaf, *self._parameters)),
            tuple(Like.of(weight.grad) for weight in self._apart.weights()),
            left,
            keeps,
        )
        self._apart.forget_gradients()
        return seen

    def halves(self) -> Halves:
        """A backward pass as PyTorch's pipelines take it in two."""
        leaf, outputs, _, left, _ = self._forwards()
        parameters: list[Any] = [*self._parameters, *self._apart.weights()]
        grad = torch.empty_like(outputs[0])
        given, num_bytes = self._tracer.key(grad), grad.untyped_storage().nbytes()
        with self._tracer.section() as inputs:
            _, groups = stage_backward_input([outputs[0]], [grad], [leaf], iter(parameters))
            del grad
        waiting = Counter(left)
        waiting.update(inputs.after)
        assert leaf.grad is not None
        waiting.subtract(self._tracer.use_of(leaf.grad))
        if not self._tracer.lives(given):  # who stands in for the layer keeps it: PyTorch has one edge to it
            waiting.subtract({Use("backward", EVERY_LAYER): num_bytes})
        del outputs
        with self._tracer.section() as weights:
            stage_backward_weight(iter(parameters), groups)
        self._apart.forget_gradients()
        return Halves(inputs, (weights, weights), settled(waiting))

    def _forwards(self) -> tuple[torch.Tensor, Any, Section, dict[Use, int], tuple[bool, ...]]:
        """Its leaf, what it gives and did, what waits, and what of its arguments does."""
        leaf = self._x_BTD.detach().requires_grad_()
        # Copies that nothing but the layer's graph may hold: what is gone once we let go, it does not keep.
        given, shape = tree_flatten((leaf * 1, *self._args))
        given = [given[0], *(t.clone() if isinstance(t, torch.Tensor) else t for t in given[1:])]
        keys = [self._tracer.key(t) if isinstance(t, torch.Tensor) else None for t in given]
        with self._tracer.section() as forwards:
            outputs = self._function(*tree_unflatten(given, shape))
        left = Counter(forwards.after)
        for tensor in outputs:
            if tensor is not None:
                left.subtract(self._tracer.use_of(tensor))
        given.clear()
        keeps = tuple(key is None or self._tracer.lives(key) for key in keys)
        return leaf, outputs, forwards, settled(left), keeps


class _Ghost(torch.autograd.Function):
    """Stands in for a layer: its memory, and the shapes of what it gives."""

    @staticmethod
    def forward(
        ctx: Any,
        seen: Seen,
        replay: Replay,
        apart: Apart,
        args: Any,
        x: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> Any:
        tracer = replay.tracer
        tracer.again(seen.forward, apart.act)
        ctx.seen, ctx.replay, ctx.apart, ctx.parameters = seen, replay, apart, parameters
        ctx.left = [t for t, keeps in zip(tree_leaves((x, *args)), seen.keeps, strict=True) if keeps]
        ctx.waiting = _held(tracer, seen.left)
        with tracer.unseen():
            outputs = tuple(None if like is None else like.make() for like in seen.outputs)
        pairs = zip(outputs, seen.outputs, strict=True)
        ctx.mark_non_differentiable(*[t for t, like in pairs if like is not None and not like.has_gradient])
        return outputs

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with ctx.replay.tracer.owned(EVERY_LAYER):
            return _backward(ctx)


def _backward(ctx: Any) -> tuple[torch.Tensor | None, ...]:
    seen, tracer, half = ctx.seen, ctx.replay.tracer, ctx.replay.half
    of_x, *of_parameters = seen.gradients
    is_added = any(parameter.grad is not None for parameter in ctx.parameters)

    def act(mark: Any) -> None:
        if half is None and mark[0] == AFTER_GRADS:
            ctx.apart.give(seen.of_apart)
        ctx.apart.act(mark)

    if half == "inputs":
        tracer.again(seen.halves.inputs, act)
        ctx.waiting = _held(tracer, seen.halves.left)
        with tracer.unseen():
            return None, None, None, None, of_x.make(), *(None for _ in of_parameters)
    tracer.again(seen.halves.weights[is_added] if half == "weights" else seen.backward[is_added], act)
    ctx.left, ctx.waiting = [], []
    with tracer.unseen():  # PyTorch still holds the gradient of what the layer gave
        if half is None:
            gradients = (None if like is None else like.make() for like in seen.gradients)
            return None, None, None, None, *gradients
        ctx.apart.give(seen.of_apart)
        for parameter, like in zip(ctx.parameters, of_parameters, strict=True):
            if parameter.grad is None and like is not None:
                parameter.grad = like.make()
        outlines = (None if like is None else like.outline() for like in of_parameters)
        return None, None, None, None, None, *outlines


def _held(tracer: Tracer, num_bytes: dict[Use, int]) -> list[torch.Tensor]:
    """Memory for each use."""
    found = []
    with tracer.unseen():
        for use, size in num_bytes.items():
            with tracer.of(use.what), tracer.owned(use.owner):
                found.append(torch.empty(size, dtype=torch.uint8))
    return found
