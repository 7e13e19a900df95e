"""Where tokens stand and what they may look at: the same for all layers of a forward pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from colossus.architecture import Architecture
from colossus.models.cache import KVCache
from colossus.models.rope import rotations


class Sight(NamedTuple):
    """rotations_2TE: of the tokens' positions. mask, windowed_mask: [..., T, S], true where a token may look,
    in layers without and with a window; None: at all tokens up to itself. temperature_T: of its scores."""

    rotations_2TE: torch.Tensor | None
    mask: torch.Tensor | None
    windowed_mask: torch.Tensor | None
    temperature_T: torch.Tensor | None


def sight(
    arch: Architecture,
    tokens_BT: torch.Tensor,
    documents_BT: torch.Tensor | None,
    cache: KVCache | None,
    dtype: torch.dtype,
) -> Sight:
    """Of tokens that follow those of `cache`. documents_BT: see `Decoder.forward`. dtype: of rotations."""
    assert cache is None or documents_BT is None, "packed documents have no cache"
    num_cached, positions_T = 0 if cache is None else cache.length, positions(tokens_BT, cache)
    turned = rotations(arch, positions_T, dtype) if arch.position == "rope" else None
    mask = causal_mask(num_cached, tokens_BT)
    if documents_BT is not None:
        mask = document_mask(documents_BT)
    if arch.pad_token is not None:
        mask = _without_pads(tokens_BT != arch.pad_token, mask, cache)
    temperature_T = None
    if arch.attention_temperature_len is not None:
        temperature_T = temperatures(positions_T, arch.attention_temperature_len)
    return Sight(turned, mask, _windowed(arch, num_cached, positions_T, mask), temperature_T)


def positions(tokens_BT: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
    """Of tokens that follow those of `cache`, [T]."""
    first = 0 if cache is None else cache.length
    return torch.arange(first, first + tokens_BT.shape[1], device=tokens_BT.device)


def document_mask(documents_BT: torch.Tensor) -> torch.Tensor:
    """True where a token may look: at itself and earlier tokens of its own document. [B, 1, T, T]."""
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same_BTT.tril().unsqueeze(1)


def causal_mask(num_cached: int, tokens_BT: torch.Tensor) -> torch.Tensor | None:
    """What tokens after `num_cached` others may look at, [T, num_cached + T].

    None where the plain causal rule, or no rule (a single token), says the same.
    """
    num_new = tokens_BT.shape[1]
    if num_cached == 0 or num_new == 1:
        return None
    every = torch.ones(num_new, num_cached + num_new, dtype=torch.bool, device=tokens_BT.device)
    return every.tril(diagonal=num_cached)


def temperatures(positions_T: torch.Tensor, length: int) -> torch.Tensor:
    """log2(position) / log2(length) beyond `length`, else 1 (Grok-2, as SGLang computes it)."""
    growth_T = positions_T.clamp_min(1).double().log2() / math.log2(length)
    return torch.where(positions_T > length, growth_T, 1.0)


def _without_pads(visible_BT: torch.Tensor, mask: torch.Tensor | None, cache: KVCache | None) -> torch.Tensor:
    """`mask`, and at no pad; a pad itself looks at itself too, so that its scores stay finite."""
    visible_BS = visible_BT if cache is None else cache.append_visible(visible_BT)
    num_new, num_keys = visible_BT.shape[1], visible_BS.shape[1]
    every = torch.ones(num_new, num_keys, dtype=torch.bool, device=visible_BT.device)
    diagonal = every.tril(num_keys - num_new) & every.triu(num_keys - num_new)
    mask = every.tril(num_keys - num_new) if mask is None else mask
    return mask & (visible_BS[:, None, None, :] | diagonal)


def _windowed(
    arch: Architecture, num_cached: int, positions_T: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    num_new = len(positions_T)
    if arch.window is None or num_cached + num_new <= arch.window:
        return mask
    keys_S = torch.arange(num_cached + num_new, device=positions_T.device)
    distance_TS = positions_T[:, None] - keys_S[None, :]
    near_TS = (distance_TS >= 0) & (distance_TS < arch.window)
    return near_TS if mask is None else mask & near_TS
