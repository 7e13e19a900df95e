"""What the forward pass keeps for the backward pass, and what is computed once more there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

from colossus.layout import Recompute
from colossus.models import Decoder

# How names of operators begin. What ranks sum or exchange is kept, but not what they gather: each has its
# part of that.
KEPT = ("mm", "addmm", "_scaled_dot_product", "grouped_product")
KEPT_MESSAGES = ("reduce_scatter", "all_reduce", "all_to_all")
COLLECTIVES = "_c10d_functional"  # the space of the latter


def recompute_layers(model: Decoder, recompute: Recompute = "full", num_layers: int | None = None) -> None:
    """full: keeps each layer's input alone. selective: also what products gave, or their sums over ranks, so
    that the rest, which is quick to compute or to gather, is made again. Of the first `num_layers` of
    `model`; None: of all."""
    if recompute == "none":
        return
    for name, layer in list(model.layers.named_children())[:num_layers]:
        contexts = partial(_contexts, layer)
        more: dict[str, Any] = {"context_fn": contexts} if recompute == "selective" else {}
        for module in layer.modules() if recompute == "selective" else ():
            module.keeps_partial_sum = False  # type: ignore[assignment]
        model.layers._modules[name] = checkpoint_wrapper(layer, **more)


def _contexts(layer: nn.Module) -> tuple[Any, Any]:
    """In which a layer is computed, and computed again: PyTorch counts operators, and the second time there
    must be no more of them. Experts that FSDP shards apart within a layer bring some of their own."""
    first, again = create_selective_checkpoint_contexts(_keeps_products)
    apart = [module for module in layer.modules() if isinstance(module, FSDPModule)]
    if not apart:
        return first, again
    marks = torch.ops.profiler  # one more in the backward pass, where the first to run stands for the root
    SAC_IGNORED_OPS.add(marks._record_function_enter_new.default)
    SAC_IGNORED_OPS.add(marks._record_function_exit._RecordFunction)
    return first, _Gathered(apart, again)


class _Gathered:
    """`context`, entered when the weights of `modules` are there already."""

    def __init__(self, modules: Sequence[FSDPModule], context: Any) -> None:
        self._modules, self._context = modules, context

    def __enter__(self) -> None:
        for module in self._modules:
            module.unshard()
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def _keeps_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Batched products are recomputed: of attention's scores there are tokens x tokens."""
    space, _, name = str(operator).partition(".")
    kept = name.startswith(KEPT_MESSAGES if space == COLLECTIVES else KEPT)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
