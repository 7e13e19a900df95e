"""Where tokens stand and what they may look at: the same for all layers of a forward pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from colossus.architecture import Architecture
from colossus.models.attend import Scores, attend
from colossus.models.block_mask import block_mask
from colossus.models.cache import KVCache, places
from colossus.models.rope import rotations
from colossus.perf.parts import attends_by_blocks, has_special_scores

if TYPE_CHECKING:
    from colossus.models.block_mask import Mask


class Context(Protocol):
    """Where ranks share the tokens of a sequence: how a layer meets the others' (see `parallel.context`)."""

    def gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """What is needed of all tokens, of dimension `dim`, in their order, before `attend` takes it."""
        ...

    def attend(
        self,
        q_BHTE: torch.Tensor,
        k_BKSE: torch.Tensor,
        v_BKSE: torch.Tensor,
        mask: Mask | None,
        scores: Scores,
        temperature: torch.Tensor | None,
        sinks_H: torch.Tensor | None = None,
        *,
        fused: bool = False,
    ) -> torch.Tensor:
        """As `models.attend.attend`, for this rank's tokens."""
        ...


class Sight(NamedTuple):
    """positions: of the tokens, [T] or, where rows stand at different ones, [B, T]; rotations: of those,
    [2, T, E] or [2, B, T, E]. mask, windowed_mask: [..., T, S], true where a token may look, in layers
    without and with a window, or the same by blocks; None: at all tokens up to itself. temperature: of its
    scores, [T] or [B, T]. context: None where this rank has all tokens. fused: see `models.attend.attend`."""

    positions: torch.Tensor
    rotations: torch.Tensor | None
    mask: Mask | None
    windowed_mask: Mask | None
    temperature: torch.Tensor | None
    context: Context | None = None
    fused: bool = False

    def attend(
        self,
        q_BHTE: torch.Tensor,
        k_BKSE: torch.Tensor,
        v_BKSE: torch.Tensor,
        windowed: bool,
        scores: Scores,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the tokens' queries see of keys and values: [B, H, T, E of v]. See `models.attend.attend`."""
        mask = self.windowed_mask if windowed else self.mask
        how = attend if self.context is None else self.context.attend
        return how(q_BHTE, k_BKSE, v_BKSE, mask, scores, self.temperature, sinks_H, fused=self.fused)


def sight(
    arch: Architecture,
    tokens_BT: torch.Tensor,
    documents_BT: torch.Tensor | None,
    cache: KVCache | None,
    dtype: torch.dtype,
    of: torch.Tensor | None = None,
    hardware: str | None = None,
) -> Sight:
    """Of tokens that follow those of `cache`. documents_BT: see `Decoder.forward`. dtype: of rotations.

    of: the positions of those tokens alone whose sight it is, [T]; None: of all. hardware: see `Decoder`.
    """
    assert cache is None or documents_BT is None, "packed documents have no cache"
    stand = positions(tokens_BT, cache) if of is None else of
    num_keys = tokens_BT.shape[1] if cache is None else cache.num_keys(tokens_BT.shape[1])
    turned = rotations(arch, stand, dtype) if arch.position == "rope" else None
    temperature = None
    if arch.attention_temperature_len is not None:
        temperature = temperatures(stand, arch.attention_temperature_len)
    if _takes_blocks(arch, num_keys, hardware or stand.device.type, cache, dtype):
        visible_BT = None if arch.pad_token is None else tokens_BT != arch.pad_token
        return Sight(
            stand, turned, *_masks_by_blocks(arch, visible_BT, documents_BT, stand, num_keys), temperature
        )
    mask = None if cache is None else causal_mask(stand, num_keys, cache)
    if documents_BT is not None:
        mask = document_mask(documents_BT, stand)
    if arch.pad_token is not None:
        mask = _without_pads(tokens_BT != arch.pad_token, mask, stand, cache)
    return Sight(stand, turned, mask, _windowed(arch, stand, num_keys, mask), temperature)


def _takes_blocks(
    arch: Architecture, num_keys: int, device: str, cache: KVCache | None, dtype: torch.dtype
) -> bool:
    """Not behind a cache, where each prompt has a length of its own; nor in float64, which no kernel has."""
    return attends_by_blocks(arch, num_keys, device) and cache is None and dtype != torch.float64


def _masks_by_blocks(
    arch: Architecture,
    visible_BT: torch.Tensor | None,
    documents_BT: torch.Tensor | None,
    stand: torch.Tensor,
    num_keys: int,
) -> tuple[Mask | None, Mask | None]:
    """Of layers without and with a window. The kernel of the plain causal rule is the quicker where it will
    do."""
    mask = None
    if documents_BT is not None or visible_BT is not None or has_special_scores(arch):
        mask = block_mask(stand, num_keys, None, documents_BT, visible_BT)
    if arch.window is None or num_keys <= arch.window:
        return mask, mask
    return mask, block_mask(stand, num_keys, arch.window, documents_BT, visible_BT)


def positions(tokens_BT: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
    """Of tokens that follow those of `cache`: [T], or [B, T] where its rows differ in length."""
    lengths = [0] if cache is None else cache.lengths
    return places(lengths, tokens_BT.shape[1], tokens_BT.device)


def document_mask(documents_BS: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """True where the tokens at these positions may look: at themselves and earlier tokens of their own
    document. [B, 1, T, S]."""
    same_BTS = documents_BS[:, positions_T, None] == documents_BS[:, None, :]
    return (same_BTS & _reached(positions_T, documents_BS.shape[1])).unsqueeze(1)


def causal_mask(positions: torch.Tensor, num_keys: int, cache: KVCache) -> torch.Tensor | None:
    """Which of so many keys new tokens at these positions may look at: [T, S] or [B, 1, T, S].

    None where the plain causal rule, or no rule (a single token), says the same.
    """
    num_new = positions.shape[-1]
    is_last = cache.is_even and cache.length + num_new == num_keys
    if is_last and num_new in (1, num_keys):
        return None
    return _by_head(_reached(positions, num_keys))


def temperatures(positions: torch.Tensor, length: int) -> torch.Tensor:
    """log2(position) / log2(length) beyond `length`, else 1 (Grok-2, as SGLang computes it)."""
    growth = positions.clamp_min(1).double().log2() / math.log2(length)
    return torch.where(positions > length, growth, 1.0)


def _reached(positions: torch.Tensor, num_keys: int, window: int | None = None) -> torch.Tensor:
    """Which keys lie at each position or before it, of these the last `window`: [..., T, S]. Nothing wider
    than a truth value exists of all pairs."""
    keys = torch.arange(num_keys, device=positions.device)
    reached = keys <= positions[..., None]
    return reached if window is None else reached & (keys > positions[..., None] - window)


def _by_head(mask: torch.Tensor) -> torch.Tensor:
    """[T, S] as it is, [B, T, S] as [B, 1, T, S]."""
    return mask if mask.ndim == 2 else mask.unsqueeze(1)


def _without_pads(
    visible_BT: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: KVCache | None
) -> torch.Tensor:
    """`mask`, and at no pad; a pad itself looks at itself too, so that its scores stay finite."""
    visible_BS = visible_BT if cache is None else cache.append_visible(visible_BT)
    num_keys = visible_BS.shape[1]
    mask = _by_head(_reached(positions, num_keys)) if mask is None else mask
    return mask & (visible_BS[:, None, None, :] | _by_head(_reached(positions, num_keys, 1)))


def _windowed(
    arch: Architecture, positions: torch.Tensor, num_keys: int, mask: torch.Tensor | None
) -> torch.Tensor | None:
    if arch.window is None or num_keys <= arch.window:
        return mask
    near = _by_head(_reached(positions, num_keys, arch.window))
    return near if mask is None else mask & near
