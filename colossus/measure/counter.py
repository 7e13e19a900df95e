"""PyTorch's counter of FLOPs, with what it misses: grouped products, a processor's attention, `addmm_`."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import colossus.models.grouped  # noqa: F401 (makes the operators)
from colossus.perf.parts import product_flops

Shape = tuple[int, ...]


def flop_counter(more: Mapping[Any, Any] | None = None) -> FlopCounterMode:
    """Counts the matrix products of what runs inside it, on any device. See `executed_flops_per_token`.

    more: formulas of more operators, which take the shapes of their arguments.
    """
    aten = torch.ops.aten
    formulas: dict[Any, Any] = {
        aten.addmm_: _product_added,
        torch.ops.colossus.grouped_product: _grouped_product,
        torch.ops.colossus.grouped_outer_product: _grouped_outer_product,
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }
    return FlopCounterMode(display=False, custom_mapping={**formulas, **(more or {})})


def _product_added(total: Shape, left: Shape, right: Shape, **_: Any) -> int:
    return product_flops(left[0], left[1], right[1])


def _grouped_product(x_MI: Shape, w_XOI: Shape, ends_X: Shape, *_: Any, **__: Any) -> int:
    return product_flops(x_MI[0], x_MI[1], w_XOI[1])


def _grouped_outer_product(g_MO: Shape, x_MI: Shape, ends_X: Shape, *_: Any, **__: Any) -> int:
    return product_flops(g_MO[1], x_MI[0], x_MI[1])


def attention_flops(q_BHTE: Shape, k_BKSE: Shape, v_BKSE: Shape, *_: Any, **__: Any) -> int:
    """Scores and weighted values of the whole square, as PyTorch counts its kernels for GPUs."""
    batch_heads, num_new, num_keys = prod(q_BHTE[:2]), q_BHTE[2], k_BKSE[2]
    widths = q_BHTE[3] + v_BKSE[3]
    return batch_heads * product_flops(num_new, widths, num_keys)


def attention_backward_flops(
    g: Shape, q_BHTE: Shape, k_BKSE: Shape, v_BKSE: Shape, *_: Any, **__: Any
) -> int:
    """Twice that, and the scores once more."""
    scores = prod(q_BHTE[:2]) * product_flops(q_BHTE[2], q_BHTE[3], k_BKSE[2])
    return 2 * attention_flops(q_BHTE, k_BKSE, v_BKSE) + scores
