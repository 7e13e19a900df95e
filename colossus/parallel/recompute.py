"""What the forward pass keeps for the backward pass, and what is computed once more there."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from colossus.layout import Recompute
from colossus.models import Decoder

KEPT = ("mm", "addmm", "_scaled_dot_product", "grouped_product", "_c10d_functional")  # outputs of operators


def recompute_layers(model: Decoder, recompute: Recompute = "full", num_layers: int | None = None) -> None:
    """full: keeps each layer's input alone. selective: also what products and collectives gave, so that the
    rest, which is quick to compute, is computed again. Of the first `num_layers` of `model`; None: of all."""
    if recompute == "none":
        return
    contexts = partial(create_selective_checkpoint_contexts, _keeps_products)
    more: dict[str, Any] = {"context_fn": contexts} if recompute == "selective" else {}
    for name, layer in list(model.layers.named_children())[:num_layers]:
        model.layers._modules[name] = checkpoint_wrapper(layer, **more)


def _keeps_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Batched products are recomputed: of attention's scores there are tokens x tokens."""
    space, _, name = str(operator).partition(".")
    kept = space in KEPT or name.split(".")[0].startswith(tuple(k for k in KEPT if k != "_c10d_functional"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
