"""softmax(Q K^T / sqrt(E)) V under the causal rule or a mask: by one fused kernel, or by plain products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from colossus.models.block_mask import attend_by_blocks
from colossus.perf.parts import MAX_BLOCKED, ROWS

if TYPE_CHECKING:
    from colossus.models.block_mask import Mask


@dataclass(frozen=True)
class Scores:
    """How scores come of q k^T: times `scale`, then soft_cap x tanh(score / soft_cap), in fp32 or better."""

    scale: float
    soft_cap: float | None = None


def attend(
    q_BHTE: torch.Tensor,
    k_BKSE: torch.Tensor,
    v_BKSE: torch.Tensor,
    mask: Mask | None = None,
    scores: Scores | None = None,
    temperature: torch.Tensor | None = None,
    sinks_H: torch.Tensor | None = None,
    *,
    fused: bool = False,
) -> torch.Tensor:
    """Each of T queries looks at S keys: [B, H, T, E of v].

    mask: [..., T, S], true where a query may look, and never beyond the causal rule. None: that rule, where
        the queries are those of the last T of the keys.
    scores: None: 1/sqrt(E), no cap. temperature: [T] or [B, T], multiplies the scores of each query, after
        the cap.
    sinks_H: the score of one more key, whose value is 0, for each head (openai/gpt-oss).
    fused: on a processor, by PyTorch's kernel also where plain products are usually quicker.
    """
    num_new, num_keys = q_BHTE.shape[2], k_BKSE.shape[2]
    scores = scores if scores is not None else Scores(1 / math.sqrt(q_BHTE.shape[3]))
    if mask is not None and not isinstance(mask, torch.Tensor):
        k_BKSE, v_BKSE = k_BKSE.to(q_BHTE.dtype), v_BKSE.to(q_BHTE.dtype)
        return attend_by_blocks(q_BHTE, k_BKSE, v_BKSE, mask, scores, temperature, sinks_H)
    special = scores.soft_cap is not None or temperature is not None or sinks_H is not None
    if num_new == 1 and q_BHTE.device.type == "cpu":
        return attend_once(q_BHTE, k_BKSE, v_BKSE, mask, scores, temperature, sinks_H)
    k_BKSE, v_BKSE = k_BKSE.to(q_BHTE.dtype), v_BKSE.to(q_BHTE.dtype)
    plain = q_BHTE.device.type == "cpu" and 1 < num_new <= num_keys <= MAX_BLOCKED and not fused
    if special or plain:
        return attend_by_products(q_BHTE, k_BKSE, v_BKSE, mask, scores, temperature, sinks_H)
    if (
        mask is None and 1 < num_new < num_keys
    ):  # what is called causal there lets the first query see one key
        mask = _last_rows(num_new, num_keys, q_BHTE.device)
    return F.scaled_dot_product_attention(
        q_BHTE,
        k_BKSE,
        v_BKSE,
        attn_mask=mask,
        is_causal=mask is None and num_new > 1,
        scale=scores.scale,
        enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
    )


def _last_rows(num_new: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """The causal rule of the last rows of a square: a tensor, or what GPUs' kernels take in its place."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(num_new, num_keys)
    return torch.ones(num_new, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_new)


def attend_by_products(
    q_BHTE: torch.Tensor,
    k_BKSE: torch.Tensor,
    v_BKSE: torch.Tensor,
    mask: torch.Tensor | None = None,
    scores: Scores | None = None,
    temperature: torch.Tensor | None = None,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in batched products, block by block of queries, which look at no later keys.

    A processor's fused kernel does its products in small tiles. At B=8, H=6, T=512, E=64, forward and
    backward took, in ms: with AVX-512 bf16 54 in bf16, where this took 19; in fp32 63, where this took 50.
    """
    batch, heads, num_new, width = q_BHTE.shape
    num_keys, group = k_BKSE.shape[2], heads // k_BKSE.shape[1]
    scores = scores if scores is not None else Scores(1 / math.sqrt(width))
    if group > 1:
        k_BKSE, v_BKSE = (x.repeat_interleave(group, dim=1) for x in (k_BKSE, v_BKSE))
    q_NTE, k_NSE, v_NSE = (x.flatten(0, 1) for x in (q_BHTE, k_BKSE, v_BKSE))
    special = scores.soft_cap is not None or temperature is not None or sinks_H is not None
    blocks = []
    for start in range(0, num_new, ROWS):
        end = min(start + ROWS, num_new)
        keys = num_keys - num_new + end  # none looks beyond itself
        hidden = _hidden(mask, start, end, keys, q_BHTE)
        if special:
            scores_NRS = torch.bmm(q_NTE[:, start:end], k_NSE[:, :keys].mT)
            heat = None
            if temperature is not None:
                heat = temperature[..., start:end].unsqueeze(-1)
                heat = heat if heat.ndim == 2 else heat.repeat_interleave(heads, dim=0)
            sinks = None if sinks_H is None else sinks_H.repeat(batch)[:, None, None]
            shares_NRS = _shares(scores_NRS, hidden, scores, heat, sinks)
        else:
            scores_NRS = torch.baddbmm(hidden, q_NTE[:, start:end], k_NSE[:, :keys].mT, alpha=scores.scale)
            shares_NRS = scores_NRS.softmax(-1)
        blocks.append(torch.bmm(shares_NRS, v_NSE[:, :keys]))
    return torch.cat(blocks, dim=1).unflatten(0, (batch, heads))


def attend_once(
    q_BHTE: torch.Tensor,
    k_BKSE: torch.Tensor,
    v_BKSE: torch.Tensor,
    mask: torch.Tensor | None,
    scores: Scores,
    temperature: torch.Tensor | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """The same for one query a head, T = 1, in the type of the keys: the heads that share keys are the rows
    of one product. Keys that lie head by head in memory ([B, K, S, E]) are not copied."""
    kv_heads = k_BKSE.shape[1]
    q_BKGE = q_BHTE.squeeze(2).unflatten(1, (kv_heads, -1)).to(k_BKSE.dtype)
    hidden = None if mask is None else q_BKGE.new_zeros(()).where(mask, -math.inf)
    heat = None if temperature is None else temperature.reshape(-1, 1, 1, 1)
    sinks = None if sinks_H is None else sinks_H.unflatten(0, (kv_heads, -1)).unsqueeze(-1)
    products_BKGS = (k_BKSE @ q_BKGE.mT).mT  # with 8 rows 0.4 to 0.7 of the time of q k^T
    shares_BKGS = _shares(products_BKGS, hidden, scores, heat, sinks)
    return (shares_BKGS @ v_BKSE).flatten(1, 2).unsqueeze(2).to(q_BHTE.dtype)


def _shares(
    products: torch.Tensor,
    hidden: torch.Tensor | None,
    scores: Scores,
    heat: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """What each query takes of each value, of the shape and type of `products`, [..., queries, keys]. heat:
    temperatures, sinks: scores of the keys without a value; both [..., 1] that fit to the queries."""
    exact = torch.promote_types(products.dtype, torch.float32)
    scored = products.to(exact) * scores.scale
    if scores.soft_cap is not None:
        scored = scores.soft_cap * torch.tanh(scored / scores.soft_cap)
    if heat is not None:
        scored = scored * heat.to(exact)
    if hidden is not None:
        scored = scored + hidden
    if sinks is None:
        return scored.softmax(-1).to(products.dtype)
    with_sinks = torch.cat((scored, sinks.to(exact).expand(*scored.shape[:-1], 1)), dim=-1)
    return with_sinks.softmax(-1)[..., :-1].to(products.dtype)


def _hidden(mask: torch.Tensor | None, start: int, end: int, keys: int, q_BHTE: torch.Tensor) -> torch.Tensor:
    """What is added to the scores of queries start to end: 0 where they may look, else minus infinity."""
    if mask is None:
        first = keys - (end - start)
        return q_BHTE.new_full((end - start, keys), -math.inf).triu(first + 1)
    hidden = q_BHTE.new_zeros(()).where(mask[..., start:end, :keys], -math.inf)
    return hidden.expand(*q_BHTE.shape[:2], -1, -1).flatten(0, 1)
