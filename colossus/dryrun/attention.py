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
from colossus.models import attend, sight
from colossus.models.block_mask import block_mask
from colossus.perf.parts import BY_BLOCKS as OF_GPU
from colossus.perf.parts import computed_keys

# By the names that recomputation knows kernels by (see `parallel.recompute`): PyTorch's own, and of blocks.
NAMES = ("_scaled_dot_product", "flex_attention")


def _define(name: str) -> Any:
    """The operator, and that of its gradients. met: keys that a query takes the time of."""

    @torch.library.custom_op(f"colossus_dryrun::{name}", mutates_args=())
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, met: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError("for tensors without numbers alone")

    @torch.library.custom_op(f"colossus_dryrun::{name}_backward", mutates_args=())
    def backward(
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        y: torch.Tensor,
        sums: torch.Tensor,
        met: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        raise NotImplementedError("for tensors without numbers alone")

    @forward.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, met: float) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, num, _ = q.shape
        y_BTHE = q.new_empty(batch, num, heads, v.shape[3])
        return y_BTHE.transpose(1, 2), q.new_empty(batch, heads, num, dtype=torch.float32)

    @backward.register_fake
    def _(grad: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in given[:3])

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        *tensors, ctx.met = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    def grads(ctx: Any, grad: torch.Tensor, _: None) -> Any:
        return *backward(grad, *ctx.saved_tensors, ctx.met), None

    forward.register_autograd(grads, setup_context=keep)
    return forward


FUSED, BY_BLOCKS = (_define(name) for name in NAMES)
FLOPS: dict[Any, Any] = {
    getattr(torch.ops.colossus_dryrun, name + half): flops
    for name in NAMES
    for half, flops in (("", attention_flops), ("_backward", attention_backward_flops))
}


def met_keys(q_BHTE: torch.Tensor, k_BKSE: torch.Tensor, causal: bool) -> float:
    """That a query takes the time of, of a kernel without blocks: all, or half by the causal rule, of queries
    that are the last ones."""
    return k_BKSE.shape[2] - q_BHTE.shape[2] / 2 * causal


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within this, attention takes a GPU's kernels."""
    plain = F.scaled_dot_product_attention

    def scaled_dot_product_attention(
        q_BHTE: torch.Tensor, k_BKSE: torch.Tensor, v_BKSE: torch.Tensor, **rest: Any
    ) -> torch.Tensor:
        if q_BHTE.shape[3] == v_BKSE.shape[3]:
            return plain(q_BHTE, k_BKSE, v_BKSE, **rest)
        met = met_keys(q_BHTE, k_BKSE, rest.get("is_causal", False))
        return FUSED(q_BHTE, k_BKSE, v_BKSE, met)[0]  # type: ignore[no-any-return]

    def noted(positions_T: torch.Tensor, num_keys: int, window: int | None = None, *rest: Any) -> Any:
        made = block_mask(positions_T, num_keys, window, *rest)
        setattr(made.mask_mod, "window", window)  # noqa: B010
        return made

    def attend_by_blocks(
        q_BHTE: torch.Tensor,
        k_BKSE: torch.Tensor,
        v_BKSE: torch.Tensor,
        mask: Any,
        scores: Any,
        temperature_T: torch.Tensor | None = None,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Ranks of cp have queries of both ends, which meet as many keys as those of a whole sequence do.
        met = computed_keys(k_BKSE.shape[2], mask.mask_mod.window, OF_GPU)
        y_BHTE, sums_BHT = BY_BLOCKS(q_BHTE, k_BKSE, v_BKSE, met)
        if sinks_H is None:
            return y_BHTE  # type: ignore[no-any-return]
        left_BHT = torch.sigmoid(sums_BHT - sinks_H.to(sums_BHT.dtype).unsqueeze(-1))
        return y_BHTE * left_BHT.unsqueeze(-1).to(y_BHTE.dtype)  # type: ignore[no-any-return]

    def _last_rows(*_: Any) -> None:
        """The causal rule of the last rows of a square is no mask to a GPU's kernel."""

    with ExitStack() as stack:
        stack.enter_context(patch.object(sight, "block_mask", noted))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", scaled_dot_product_attention))
        for function in (attend_by_blocks, _last_rows):
            stack.enter_context(patch.object(attend, function.__name__, function))
        yield
