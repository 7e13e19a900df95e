"""A whole model in the memory of one device."""

from __future__ import annotations

import torch

from colossus.architecture import Architecture
from colossus.models.decoder import Decoder
from colossus.models.init import initialise


def build(
    arch: Architecture,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Decoder:
    """A decoder with initial values. dtype: of its weights and of what it computes.

    To train in bf16 with fp32 weights, build in fp32 and call `precision.apply_precision`.
    """
    with torch.device("meta"):
        model = Decoder(arch)
    model.to_empty(device=device)
    for tensor in model.parameters():
        tensor.data = tensor.data.to(dtype)
    model.compute_dtype = dtype
    initialise(model, arch, seed)
    return model
