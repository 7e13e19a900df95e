"""What training a model reaches on this machine: small models fall far short of the best matrix rate."""

from __future__ import annotations

import time

import torch

from colossus.architecture import Architecture
from colossus.models import build
from colossus.perf.flops import model_flops_per_token
from colossus.precision import apply_precision

PROBE_LAYERS = 4  # layers are alike
PROBE_VOCABULARY = 8192
PROBE_SEQ_LEN = 512
PROBE_TOKENS = 2048
PROBE_SECONDS = 0.5


def training_flops_per_second(
    arch: Architecture, seq_len: int, type: str, threads: int, device: str
) -> float:
    """Model FLOP/s of forward and backward passes of `arch`, not compiled, the optimizer left out.

    A large model is measured by a part of it: few layers, short samples. Of the quickest of the passes that
    fit into half a second, after one that warms up: what else runs on the machine only makes a pass slower.
    """
    seq_len = min(seq_len, PROBE_SEQ_LEN)
    arch = _part(arch)
    rows = max(1, PROBE_TOKENS // seq_len) if arch.hidden_size <= 1024 else 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = apply_precision(build(arch, seed=0, device=device), type)
        tokens_BT = torch.randint(arch.vocab_size, (rows, seq_len), device=device)

        def seconds_of_a_pass() -> float:
            began = time.perf_counter()
            loss, _ = model(tokens_BT, tokens_BT)
            loss.backward()
            model.zero_grad(set_to_none=True)
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began

        seconds_of_a_pass()
        end = time.perf_counter() + PROBE_SECONDS
        quickest = seconds_of_a_pass()
        while time.perf_counter() < end:
            quickest = min(quickest, seconds_of_a_pass())
    finally:
        torch.set_num_threads(before)
    return rows * seq_len * model_flops_per_token(arch, seq_len) / quickest


def _part(arch: Architecture) -> Architecture:
    """A model of few layers, of which as large a share has experts, and at least one has if any has."""
    layers = min(arch.num_layers, PROBE_LAYERS if arch.hidden_size <= 1024 else 1)
    update: dict[str, object] = {"num_layers": layers, "vocab_size": min(arch.vocab_size, PROBE_VOCABULARY)}
    if arch.experts is not None:
        dense = min(layers - 1, round(arch.experts.dense_layers * layers / arch.num_layers))
        update["experts"] = arch.experts.model_copy(update={"dense_layers": dense})
    return arch.model_copy(update=update)
