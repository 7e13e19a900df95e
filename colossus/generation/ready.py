"""Makes a model ready to generate: its matrices in the type and the layout that are quickest here."""

from __future__ import annotations

import torch

from colossus.measure.machine import free_memory_bytes
from colossus.measure.vectors import quickest_vector_product
from colossus.models import Decoder
from colossus.models.attention import Attention
from colossus.models.experts import Experts
from colossus.models.linear import Embedding, Linear, pack_together
from colossus.models.mlp import MLP
from colossus.models.packed import pack


def generation_type(device: torch.device) -> torch.dtype:
    """The type that is quickest to generate in: bf16 on a GPU; on a processor as measured once a process."""
    return quickest_vector_product().dtype if device.type == "cpu" else torch.bfloat16


def make_ready(model: Decoder, dtype: torch.dtype) -> None:
    """Products are computed in `dtype`, and the matrices kept in it. Norms, routers and biases stay.

    On a processor where it is quicker, and where memory allows, each matrix is copied in the layout of
    `models.packed` as well. The copies serve for as long as the weights are not changed.
    """
    model.compute_dtype = dtype
    owners: list[Linear | Embedding] = [module for module in model.modules() if isinstance(module, Linear)]
    if model.head is None:
        assert model.embedding is not None
        owners.append(model.embedding)
    for owner in owners:
        owner.weight.data = owner.weight.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Experts):
            for tensor in module.parameters():
                tensor.data = tensor.data.to(dtype)
    if _packs(owners, dtype):
        _pack(model, owners, dtype)


def _pack(model: Decoder, owners: list[Linear | Embedding], dtype: torch.dtype) -> None:
    """Matrices that take the same input together, the others by themselves."""
    together: list[tuple[Linear, ...]] = []
    for module in model.modules():
        if isinstance(module, Attention):
            together.append((module.wq, module.wk, module.wv))
        elif isinstance(module, MLP) and module.w_gate is not None:
            together.append((module.w_gate, module.w_up))
    for group in together:
        pack_together(group, dtype)
    grouped = {id(linear) for group in together for linear in group}
    for owner in owners:
        if id(owner) not in grouped:
            owner.packed = pack([owner.weight], [getattr(owner, "bias", None)], dtype)


def _packs(owners: list[Linear | Embedding], dtype: torch.dtype) -> bool:
    if owners[0].weight.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    size = sum(owner.weight.nbytes for owner in owners)
    return 2 * size < free_memory_bytes() and quickest_vector_product(dtype).packed
