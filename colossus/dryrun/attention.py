"""Attention as a GPU's fused kernels have it, for tensors on a processor that hold no numbers.

A processor's kernel knows neither values of another width than keys, nor masks by blocks, nor caps of scores:
there PyTorch would write all scores, of which a GPU writes none. Its kernels keep what they are given, what
they give, and one number for each query.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from colossus.measure.counter import attention_backward_flops, attention_flops
from colossus.models import attend

# By the names that recomputation knows kernels by (see `parallel.recompute`): PyTorch's own, and of blocks.
NAMES = ("_scaled_dot_product", "flex_attention")


def _define(name: str) -> Any:
    """The operator, and that of its gradients."""

    @torch.library.custom_op(f"colossus_dryrun::{name}", mutates_args=())
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("for tensors without numbers alone")

    @torch.library.custom_op(f"colossus_dryrun::{name}_backward", mutates_args=())
    def backward(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        y: torch.Tensor,
        sums: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise NotImplementedError("for tensors without numbers alone")

    @forward.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, num, _ = q.shape
        y_BTHE = q.new_empty(batch, num, heads, v.shape[3])
        return y_BTHE.transpose(1, 2), q.new_empty(batch, heads, num, dtype=torch.float32)

    @backward.register_fake
    def _(grad: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in given[:3])

    def keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.set_materialize_grads(False)

    def grads(ctx: Any, grad: torch.Tensor, _: None) -> Any:
        return backward(grad, *ctx.saved_tensors)

    forward.register_autograd(grads, setup_context=keep)
    return forward


FUSED, BY_BLOCKS = (_define(name) for name in NAMES)
FLOPS: dict[Any, Any] = {
    getattr(torch.ops.colossus_dryrun, name + half): flops
    for name in NAMES
    for half, flops in (("", attention_flops), ("_backward", attention_backward_flops))
}


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within this, attention takes a GPU's kernels."""
    plain = F.scaled_dot_product_attention

    def scaled_dot_product_attention(
        q_BHTE: torch.Tensor, k_BKSE: torch.Tensor, v_BKSE: torch.Tensor, **rest: Any
    ) -> torch.Tensor:
        if q_BHTE.shape[3] == v_BKSE.shape[3]:
            return plain(q_BHTE, k_BKSE, v_BKSE, **rest)
        return FUSED(q_BHTE, k_BKSE, v_BKSE)[0]  # type: ignore[no-any-return]

    def attend_by_blocks(
        q_BHTE: torch.Tensor,
        k_BKSE: torch.Tensor,
        v_BKSE: torch.Tensor,
        mask: Any,
        scores: Any,
        temperature_T: torch.Tensor | None = None,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        y_BHTE, sums_BHT = BY_BLOCKS(q_BHTE, k_BKSE, v_BKSE)
        if sinks_H is None:
            return y_BHTE  # type: ignore[no-any-return]
        left_BHT = torch.sigmoid(sums_BHT - sinks_H.to(sums_BHT.dtype).unsqueeze(-1))
        return y_BHTE * left_BHT.unsqueeze(-1).to(y_BHTE.dtype)  # type: ignore[no-any-return]

    def _last_rows(*_: Any) -> None:
        """The causal rule of the last rows of a square is no mask to a GPU's kernel."""

    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", scaled_dot_product_attention))
        for function in (attend_by_blocks, _last_rows):
            stack.enter_context(patch.object(attend, function.__name__, function))
        yield
