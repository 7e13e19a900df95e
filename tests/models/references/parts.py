"""Pieces that the references share, in float64 numpy, and the bfloat16 numbers that checkpoints hold.

Written from the publishers' own code and from what engines for it do, never from Colossus's models.
Shapes by suffix: B sequences, T tokens, S keys, D model width, H query heads, K key/value heads,
E head width, X experts.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Array = np.ndarray
Gelu = Literal["tanh", "erf"]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """scale ⊙ x / sqrt(mean(x²) + eps) over the last axis; `scale` multiplies as it is, no 1 + scale."""
    return scale * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def soft_cap(x: Array, cap: float) -> Array:
    """cap · tanh(x / cap); an infinite cap leaves x as it is."""
    return x if math.isinf(cap) else cap * np.tanh(x / cap)


def softmax(x: Array) -> Array:
    """Over the last axis."""
    weights = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return weights / np.sum(weights, axis=-1, keepdims=True)


def gelu(x: Array, form: Gelu) -> Array:
    """Hendrycks and Gimpel, arXiv 1606.08415: x·Φ(x), or its approximation by tanh."""
    if form == "erf":
        return 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def rotate(x_BTHE: Array, base: float, first: int = 0) -> Array:
    """Rotary positions `first`, `first + 1`, ... over all E dimensions.

    Halves convention: dimension i turns with i + E/2, by position · base^(-2i/E) radians.
    """
    x = np.asarray(x_BTHE, dtype=np.float64)
    num_tokens, width = x.shape[1], x.shape[3]
    half = width // 2
    out = np.empty_like(x)
    for token in range(num_tokens):
        for i in range(half):
            angle = (first + token) * base ** (-2.0 * i / width)
            a, b = x[:, token, :, i], x[:, token, :, i + half]
            out[:, token, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, token, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attend(
    q_BTHE: Array, k_BSKE: Array, v_BSKE: Array, scale: float, cap: float, heat_T: Array, allowed_BTS: Array
) -> Array:
    """Grouped attention, heads side by side: [B, T, H·E]. Query head (H/K)·g + j reads key/value head g.

    In this order: q·k · scale, soft cap, · heat of the query's position, −1e30 where not allowed, softmax.
    A query that may see nothing therefore weighs all S keys alike, those after it too.
    """
    num_sequences, num_tokens, num_heads, width = q_BTHE.shape
    group = num_heads // k_BSKE.shape[2]
    out = np.empty((num_sequences, num_tokens, num_heads * width))
    for b in range(num_sequences):
        for head in range(num_heads):
            scores_TS = q_BTHE[b, :, head] @ k_BSKE[b, :, head // group].T * scale
            scores_TS = soft_cap(scores_TS, cap) * heat_T[:, None]
            scores_TS = np.where(allowed_BTS[b], scores_TS, -1e30)
            out[b, :, head * width : (head + 1) * width] = softmax(scores_TS) @ v_BSKE[b, :, head // group]
    return out


def expert_weights(logits_BTX: Array, num_chosen: int) -> Array:
    """[B, T, X]: softmax over all X experts, zero but for the largest; what stays is not renormalised.

    Of equal probabilities the lower expert is taken, as `jax.lax.top_k` does.
    """
    probabilities = softmax(logits_BTX)
    chosen = np.argsort(-probabilities, axis=-1, kind="stable")[..., :num_chosen]
    weights = np.zeros_like(probabilities)
    np.put_along_axis(weights, chosen, np.take_along_axis(probabilities, chosen, axis=-1), axis=-1)
    return weights


def causal(num_tokens: int) -> Array:
    """[T, T]: may query t see key s?"""
    return np.tril(np.ones((num_tokens, num_tokens), dtype=bool))


def bfloat16_bits(x: Array) -> Array:
    """uint16 patterns of the nearest bfloat16 numbers, ties to even. `x` must be finite."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_values(bits: Array) -> Array:
    """The float64 numbers that uint16 patterns of bfloat16 stand for."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
