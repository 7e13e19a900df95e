"""Tensor parallelism with sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198) over a vocabulary
that is shared too.

Between the products a rank has its part of each sequence's tokens. Attention and MLP gather the tokens,
compute this rank's heads or columns, and sum what ranks add to each token where it belongs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colossus.architecture import parameter_table
from colossus.models import Decoder
from colossus.models.attention import Attention
from colossus.models.latent import LatentAttention
from colossus.models.linear import Embedding
from colossus.models.mlp import MLP
from colossus.models.norm import RMSNorm
from colossus.parallel.collectives import Group, gather, scatter_sum, sum_over
from colossus.parallel.placements import place

SHARED_AXES = ("vocab", "heads", "kv", "ffn")  # of the parameter table, which ranks of tp share
SEQUENCE = 1  # the dimension of tokens


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh, group: Group) -> None:
    """Cuts what `SHARED_AXES` name; experts have their own ranks (`parallel.expert`)."""
    table = {p.name: p for p in parameter_table(model.arch)}
    for prefix, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            row = table.get(f"{prefix}.{name}")
            if parameter is None or row is None or ".experts." in row.name:
                continue
            dim = next((i for i, axis in enumerate(row.axes) if axis in SHARED_AXES), None)
            weight = table.get(f"{prefix}.weight")
            summed = name == "bias" and weight is not None and weight.axes[-1] in SHARED_AXES
            place(module, name, mesh, [dim], divisor=group.size if summed else 1)
    for module in model.modules():
        if isinstance(module, (Attention, LatentAttention, MLP)):
            module.register_forward_pre_hook(partial(_gather_tokens, group))
            module.register_forward_hook(partial(_sum_at_tokens, group))
        if isinstance(module, Attention) and module.norm_whole:
            for norm in (module.q_norm, module.k_norm):
                if isinstance(norm, RMSNorm):
                    norm.mean_over_ranks = partial(_mean, group)
    if model.is_first:
        assert model.embedding is not None
        model.embedding.forward = partial(_look_up, model.embedding, group)  # type: ignore[method-assign]
        if model.position_embedding is not None:
            model.position_embedding.register_forward_pre_hook(partial(_own_positions, group))
    if model.norm is not None:
        model.norm.register_forward_hook(partial(_gather_output, group))


def overlap_products(group: Group) -> None:
    """Lets the compiler cut the collectives of tp into parts that overlap with the products beside them, on
    GPUs that reach each other's memory (PyTorch's asynchronous tensor parallelism)."""
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    enable_symm_mem_for_group(group.name)  # type: ignore[arg-type]


def _gather_tokens(group: Group, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (gather(args[0], group, SEQUENCE), *args[1:])


def _sum_at_tokens(group: Group, module: nn.Module, args: Any, y_BTD: torch.Tensor) -> torch.Tensor:
    if getattr(module, "keeps_partial_sum", True) or torch.compiler.is_compiling():
        return scatter_sum(y_BTD, group, SEQUENCE)
    # Recomputation keeps what products gave, and this one of all tokens; nothing asks for it but the sum,
    # which is kept too. The second time there is room again for a moment; what lies there does not matter.
    memory = y_BTD.untyped_storage()
    if not memory.nbytes():
        memory.resize_(y_BTD.numel() * y_BTD.element_size())
    sum_BTD = scatter_sum(y_BTD, group, SEQUENCE)
    memory.resize_(0)
    return sum_BTD


def _gather_output(group: Group, module: nn.Module, args: Any, y_BTD: torch.Tensor) -> torch.Tensor:
    return gather(y_BTD, group, SEQUENCE)


def _own_positions(group: Group, module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].chunk(group.size, dim=-1)[group.rank],)


def _mean(group: Group, mean: torch.Tensor) -> torch.Tensor:
    return sum_over(mean, group) / group.size


def _look_up(module: Embedding, group: Group, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Vectors of this rank's vocabulary, zeros for others', summed where the tokens belong."""
    weight_VD = module.weight
    place_BT = tokens_BT - len(weight_VD) * group.rank
    here_BT = (place_BT >= 0) & (place_BT < len(weight_VD))
    x_BTD = F.embedding(place_BT.where(here_BT, 0), weight_VD) * here_BT.unsqueeze(-1)
    return scatter_sum(x_BTD, group, SEQUENCE)
