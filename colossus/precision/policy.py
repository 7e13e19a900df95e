"""fp32, bf16 over fp32 weights, or fp64 to compare layouts.

Under bf16 the weights stay in fp32 (they are the master weights, and what a checkpoint holds); each product
takes them cast to bf16, and their gradients are fp32. Norms, rotations' angles, softmax and losses are
computed in fp32. The scores that a softmax is taken of stay in fp32 in the fused kernels; the plain products
that take their place on a CPU, up to 1,024 tokens where they are the quicker (`models/attend.py`), round them
to bf16.
"""

from __future__ import annotations

import torch
from torch import nn

from colossus.errors import UserError

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # that a machine may be quick in
EXACT = {"fp64": torch.float64}


def torch_type(name: str) -> torch.dtype:
    """The type of matrix products that `precision.type` names.

    Raises:
        UserError: it is none of "fp32", "bf16" and "fp64".
    """
    if name not in TYPES | EXACT:
        raise UserError.field("precision.type", name, f"must be one of {', '.join(TYPES)}", TYPES)
    return (TYPES | EXACT)[name]


def apply_precision(model: nn.Module, name: str) -> nn.Module:
    """Makes `model` (a Decoder, or a stage of one) compute in the type that `name` says; weights stay as they
    are, but those of fp64 are as wide.

    Raises:
        UserError: `name` is no type.
    """
    model.compute_dtype = torch_type(name)  # type: ignore[assignment]  # nn.Module knows tensors and modules
    return model.double() if name == "fp64" else model
