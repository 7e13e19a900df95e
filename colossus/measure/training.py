"""What training a model reaches on this machine: small models fall far short of the best matrix rate."""

from __future__ import annotations

import time

import torch

from colossus.architecture import Architecture
from colossus.models import build
from colossus.perf.flops import model_flops_per_token
from colossus.precision import apply_precision

PROBE_TOKENS = 4096
PROBE_SECONDS = 0.5


def training_flops_per_second(
    arch: Architecture, seq_len: int, type: str, threads: int, device: str
) -> float:
    """Model FLOP/s of forward and backward passes of `arch`, not compiled, the optimizer left out.

    Of the quickest of the passes that fit into half a second, after one that warms up: what else runs on
    the machine only makes a pass slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = apply_precision(build(arch, seed=0, device=device), type)
        rows = max(1, PROBE_TOKENS // seq_len)
        tokens_BT = torch.randint(arch.vocab_size, (rows, seq_len), device=device)
        seconds: list[float] = []
        end = float("inf")
        while not seconds or time.perf_counter() < end:
            began = time.perf_counter()
            loss, _ = model(tokens_BT, tokens_BT)
            loss.backward()
            model.zero_grad(set_to_none=True)
            if device == "cuda":
                torch.cuda.synchronize()
            if end == float("inf"):
                end = time.perf_counter() + PROBE_SECONDS
            else:
                seconds.append(time.perf_counter() - began)
        return rows * seq_len * model_flops_per_token(arch, seq_len) / min(seconds)
    finally:
        torch.set_num_threads(before)
