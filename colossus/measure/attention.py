"""Which way attention is quicker on this processor: PyTorch's fused kernel, or plain products."""

from __future__ import annotations

import time

import torch

from colossus.architecture import Architecture
from colossus.measure.ways import is_quicker
from colossus.models.attend import attend
from colossus.perf.parts import MAX_BLOCKED
from colossus.precision.policy import TYPES

FUSED = "fused"  # in a run's decision
PROBE_TOKENS = 1024
ROUNDS = 4
LIMIT_SECONDS = 0.5
PLAIN = 0.9  # of the products' time: with more the kernel's gain is not plain, and bits stay what they were


def fused_is_quicker(arch: Architecture, seq_len: int, kind: str, threads: int, device: str) -> bool:
    """For training samples of `seq_len` tokens, where there is a choice."""
    special = arch.attention_soft_cap or arch.attention_temperature_len or arch.attention_sinks or arch.latent
    if device != "cpu" or special or kind not in TYPES or not 1 < seq_len <= MAX_BLOCKED:
        return False
    heads = f"{arch.num_heads}-{arch.num_kv_heads}-{arch.head_dim}"
    name = f"attention/{heads}-{seq_len}-{kind}-{threads}"

    def seconds() -> dict[bool, float]:
        return attention_seconds(arch, seq_len, TYPES[kind], threads)

    return is_quicker(name, FUSED, "products", seconds, PLAIN, threads)


def attention_seconds(
    arch: Architecture, seq_len: int, dtype: torch.dtype, threads: int
) -> dict[bool, float]:
    """Fused or not -> the quickest of some forward and backward passes, in turns."""
    rows, had = max(1, PROBE_TOKENS // seq_len), torch.get_num_threads()

    def tokens(heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, seq_len, arch.head_dim).to(dtype).requires_grad_()

    q, k, v = tokens(arch.num_heads), tokens(arch.num_kv_heads), tokens(arch.num_kv_heads)
    grad = torch.ones_like(q)
    seconds = {True: float("inf"), False: float("inf")}
    torch.set_num_threads(threads)
    try:
        end = time.perf_counter() + LIMIT_SECONDS
        for turn in range(ROUNDS + 1):
            for fused in (False, True):
                began = time.perf_counter()
                attend(q, k, v, fused=fused).backward(grad)
                if turn:  # the first warms up
                    seconds[fused] = min(seconds[fused], time.perf_counter() - began)
            if turn and time.perf_counter() > end:
                break
    finally:
        torch.set_num_threads(had)
    return seconds
