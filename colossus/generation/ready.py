"""Makes a model ready to generate: its matrices in the type and the layout that are quickest here."""

from __future__ import annotations

import torch

from colossus.measure.machine import free_memory_bytes
from colossus.measure.vectors import quickest_vector_product
from colossus.models import Decoder
from colossus.models.copies import Copies, owners_of
from colossus.models.experts import Experts


def generation_type(device: torch.device) -> torch.dtype:
    """The type that is quickest to generate in: bf16 on a GPU; on a processor as measured once a process."""
    return quickest_vector_product().dtype if device.type == "cpu" else torch.bfloat16


def make_ready(model: Decoder, dtype: torch.dtype) -> None:
    """Products are computed in `dtype`, and the matrices kept in it. Norms, routers and biases stay.

    On a processor where it is quicker, and where memory allows, generation works on copies of the matrices
    in the layout of `models.packed`.
    """
    model.compute_dtype = dtype
    for owners in owners_of(model):
        for owner in owners:
            owner.weight.data = owner.weight.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Experts):
            for tensor in module.parameters():
                tensor.data = tensor.data.to(dtype)
    model.copies = Copies(dtype) if _packs(model, dtype) else None
    if model.copies is not None:
        model.copies.refresh(model)


def _packs(model: Decoder, dtype: torch.dtype) -> bool:
    weights = [owner.weight for owners in owners_of(model) for owner in owners]
    if weights[0].device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    size = sum(weight.nbytes for weight in weights)
    return 2 * size < free_memory_bytes() and quickest_vector_product(dtype).packed
