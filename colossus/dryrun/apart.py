"""Weights within a layer that FSDP shards apart from it: experts, over ranks of their own.

Where one layer stands for others, what it computes is said once more, but these weights are gathered and let
go of, and their gradients summed, by FSDP itself: it knows what is gathered already, what comes next, and
what is due after which micro batch. So the tracer marks where FSDP would act, and then it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from colossus.dryrun.tracer import Span, Tracer

# What FSDP does for one of these modules, as marks.
UNSHARD, BEFORE, AFTER, BEFORE_GRADS, AFTER_GRADS = (
    "unshard", "pre_forward", "post_forward", "pre_backward", "post_backward"
)  # fmt: skip


class Apart:
    """Those of one layer."""

    def __init__(self, layer: nn.Module, tracer: Tracer) -> None:
        self._tracer = tracer
        self._modules = [m for m in layer.modules() if m is not layer and isinstance(m, FSDPModule)]
        self._states = [module._get_fsdp_state() for module in self._modules]
        self._groups: list[Any] = [state._fsdp_param_group for state in self._states]

    def weights(self) -> list[torch.Tensor]:
        """As layers compute with them; there, from when they were gathered first."""
        return [p._unsharded_param for group in self._groups for p in group.fsdp_params]

    def all(self) -> list[torch.Tensor]:
        """Gathered and not."""
        return [weight for module in self._modules for weight in module.parameters()]

    def give(self, gradients: Iterable[Any]) -> None:
        """Gradients like these, for who has none yet."""
        for weight, like in zip(self.weights(), gradients, strict=True):
            if weight.grad is None and like is not None:
                weight.grad = like.make()

    def forget_gradients(self) -> None:
        for weight in self.weights():
            weight.grad = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within this they are there, and FSDP leaves them alone: the tracer marks when it would not."""
        with ExitStack() as stack:
            for number, (module, state) in enumerate(zip(self._modules, self._states, strict=True)):
                if not self._groups[number].is_unsharded:
                    module.unshard()
                    stack.callback(module.reshard)
                before, after = state._pre_forward_hook_handle.id, state._post_forward_hook_handle.id
                stack.enter_context(_put(module._forward_pre_hooks, before, partial(self._before, number)))
                stack.enter_context(_put(module._forward_hooks, after, partial(self._after, number)))
                mark = partial(self._tracer.mark, (UNSHARD, number))
                stack.enter_context(_put(module.__dict__, "unshard", mark))
            yield

    def act(self, mark: tuple[str, int]) -> None:
        """FSDP does what it would do at a mark."""
        what, number = mark
        module, state = self._modules[number], self._states[number]
        if what == UNSHARD:
            module.unshard()
        elif what == BEFORE:
            state._pre_forward(module, (), {})
        elif what == AFTER:
            state._post_forward(module, (), None)
        elif what == BEFORE_GRADS:
            state._pre_backward(torch.empty(0))
        else:
            self._groups[number].post_backward()

    def without_sums(self, spans: list[Span]) -> None:
        """Of a backward pass: what FSDP sums and lets go of at a mark no longer lives behind it."""
        gone = [p.grad for p in self.weights() if p.grad is not None]
        summed = False
        for span in spans:
            if summed:
                for grad in gone:
                    for use, num_bytes in self._tracer.use_of(grad).items():
                        span.high -= num_bytes
                        span.high_by_use[use] -= num_bytes
            summed = summed or (span.mark is not None and span.mark[0] == AFTER_GRADS)

    def _before(self, number: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._tracer.mark((BEFORE, number))
        marked = iter(_Marked.apply(partial(self._tracer.mark, (AFTER_GRADS, number)), *args))
        return tuple(next(marked) for _ in args), kwargs

    def _after(self, number: int, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._tracer.mark((AFTER, number))
        output.register_hook(lambda _: self._tracer.mark((BEFORE_GRADS, number)))


class _Marked(torch.autograd.Function):
    """Gives what it is given; says when all gradients of that are there."""

    @staticmethod
    def forward(ctx: Any, say: Callable[[], None], *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.say = say
        ctx.set_materialize_grads(False)
        outputs = tuple(tensor.view_as(tensor) for tensor in given)
        ctx.mark_non_differentiable(*[t for t in outputs if not t.dtype.is_floating_point])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.say()
        return None, *grads


@contextmanager
def _put(table: Any, key: Any, value: Any) -> Iterator[None]:
    """Within this `table` has another value."""
    had, before = key in table, table.get(key)
    table[key] = value
    try:
        yield
    finally:
        if had:
            table[key] = before
        else:
            del table[key]
