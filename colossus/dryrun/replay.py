"""A layer that is like another is computed once: what the tracer saw of it stands for the others.

The first time that a kind of layer is called it runs on its own, forwards and backwards, beside the program.
From then on each such layer is one operation that leaves the same memory and gives the same shapes. So a step
of a model of many layers and micro batches is traced in the time of a few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from colossus.dryrun.tracer import Section, Tracer
from colossus.models import Decoder
from colossus.perf.parts import layer_kinds


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
        here = torch.empty(self.shape, dtype=self.dtype)
        return (
            here
            if self.mesh is None
            else DTensor.from_local(here, self.mesh, self.placements, run_check=False)
        )


@dataclass(frozen=True)
class Seen:
    """What one kind of layer did. backward: where its parameters have no gradient yet, and where what it
    gives is added to one. left: bytes that wait for the backward pass, by use; keeps: of what it was given,
    which waits too."""

    forward: Section
    backward: tuple[Section, Section]
    outputs: tuple[Like | None, ...]
    gradients: tuple[Like | None, ...]  # of x and of each parameter
    left: dict[str, int]
    keeps: tuple[bool, ...]


def replay_layers(model: Decoder, tracer: Tracer, known: dict[Any, Seen]) -> None:
    """Lets the layers of `model` stand for each other, but for those that hold weights sharded apart."""
    kinds = {layer: kind for kind, layers in layer_kinds(model.arch).items() for layer in layers}
    for name, layer in model.layers.named_children():
        apart = any(isinstance(m, FSDPModule) for m in layer.modules() if m is not layer)
        if not apart:
            key = (kinds[int(name)], type(layer).__name__)
            layer.forward = partial(_stand_in, layer, layer.forward, key, tracer, known)  # type: ignore[method-assign]


def _stand_in(
    layer: nn.Module,
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    kind: Any,
    tracer: Tracer,
    known: dict[Any, Seen],
    x_BTD: torch.Tensor,
    *args: Any,
) -> tuple[torch.Tensor | None, ...]:
    if not torch.is_grad_enabled():
        return forward(x_BTD, *args)
    parameters = list(layer.parameters())
    key = (kind, tuple(x_BTD.shape), x_BTD.dtype, tuple(tuple(p.shape) for p in parameters))
    if key not in known:
        known[key] = _watch(forward, parameters, tracer, x_BTD, args)
    return _Ghost.apply(known[key], tracer, args, x_BTD, *parameters)


def _watch(
    forward: Callable[..., Any],
    parameters: list[nn.Parameter],
    tracer: Tracer,
    x_BTD: torch.Tensor,
    args: Any,
) -> Seen:
    before = [parameter.grad for parameter in parameters]
    with tracer.aside():
        for parameter in parameters:
            parameter.grad = None
        first = _watch_once(forward, parameters, tracer, x_BTD, args)
        again = _watch_once(forward, parameters, tracer, x_BTD, args)
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = grad
    return replace(first, backward=(first.backward[0], again.backward[0]))


def _watch_once(
    forward: Callable[..., Any],
    parameters: list[nn.Parameter],
    tracer: Tracer,
    x_BTD: torch.Tensor,
    args: Any,
) -> Seen:
    leaf = x_BTD.detach().requires_grad_()
    # Copies that nothing but the layer's graph may hold: what is gone once we let go, it does not keep.
    given, shape = tree_flatten((leaf * 1, *args))
    given = [given[0], *(t.clone() if isinstance(t, torch.Tensor) else t for t in given[1:])]
    keys = [tracer.key(t) if isinstance(t, torch.Tensor) else None for t in given]
    with tracer.section() as forwards:
        outputs = forward(*tree_unflatten(given, shape))
    left = Counter(forwards.after)
    for tensor in outputs:
        if tensor is not None:
            left.subtract(tracer.use_of(tensor))
    given.clear()
    keeps = tuple(key is None or tracer.lives(key) for key in keys)
    backwards: list[Section] = []
    with ExitStack() as stack:
        outputs[0].register_hook(lambda _: backwards.append(stack.enter_context(tracer.section())))
        beyond = outputs[0] * 1  # so that the gradient is PyTorch's own: ours would be held by Python
        beyond.backward(torch.empty_like(beyond))
    return Seen(
        forwards,
        (backwards[0], backwards[0]),
        tuple(Like.of(tensor) for tensor in outputs),
        tuple(Like.of(tensor.grad) for tensor in (leaf, *parameters)),
        dict(+left),
        keeps,
    )


class _Ghost(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, seen: Seen, tracer: Tracer, args: Any, x: torch.Tensor, *parameters: torch.Tensor
    ) -> Any:
        tracer.again(seen.forward)
        ctx.seen, ctx.tracer, ctx.parameters = seen, tracer, parameters
        ctx.left = [t for t, keeps in zip(tree_leaves((x, *args)), seen.keeps, strict=True) if keeps]
        with tracer.unseen():
            for use, num_bytes in seen.left.items():
                with tracer.of(use):
                    ctx.left.append(torch.empty(num_bytes, dtype=torch.uint8))
            outputs = tuple(None if like is None else like.make() for like in seen.outputs)
        pairs = zip(outputs, seen.outputs, strict=True)
        ctx.mark_non_differentiable(*[t for t, like in pairs if like is not None and not like.has_gradient])
        return outputs

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        is_added = any(parameter.grad is not None for parameter in ctx.parameters)
        ctx.tracer.again(ctx.seen.backward[is_added])
        ctx.left.clear()
        with ctx.tracer.unseen():  # PyTorch still holds the gradient of what the layer gave
            return None, None, None, *(None if like is None else like.make() for like in ctx.seen.gradients)
