"""Whether products of experts are quicker here as one batched product of equal groups."""

from __future__ import annotations

import time

import torch

from colossus.architecture import Architecture
from colossus.measure.ways import is_quicker
from colossus.models.grouped import grouped_product
from colossus.precision.policy import TYPES

PROBE_TOKENS = 2048
ROUNDS = 4
PLAIN = 0.7  # of the time of groups as they are: filling up costs more where loads are less alike


def equal_is_quicker(arch: Architecture, kind: str, threads: int, device: str) -> bool:
    """For the experts of a model."""
    if device != "cpu" or arch.experts is None or kind not in TYPES:
        return False
    experts = arch.experts
    rows = max(1, PROBE_TOKENS * experts.per_token // experts.num_experts)
    shape = f"{experts.num_experts}-{rows}-{arch.hidden_size}-{arch.expert_size}"

    def seconds() -> dict[bool, float]:
        sizes = experts.num_experts, rows, arch.hidden_size, arch.expert_size
        return grouped_seconds(*sizes, TYPES[kind], threads)

    return is_quicker(f"grouped/{shape}-{kind}-{threads}", "equal", "grouped", seconds, PLAIN, threads)


def grouped_seconds(
    num_experts: int, rows: int, num_in: int, num_out: int, dtype: torch.dtype, threads: int
) -> dict[bool, float]:
    """Equal groups or not -> the quickest of some products of `rows` rows an expert, in turns."""
    had = torch.get_num_threads()
    x = torch.randn(num_experts * rows, num_in).to(dtype)
    w = torch.randn(num_experts, num_out, num_in).to(dtype)
    ends = torch.arange(1, num_experts + 1, dtype=torch.int32) * rows
    seconds = {True: float("inf"), False: float("inf")}
    torch.set_num_threads(threads)
    try:
        for turn in range(ROUNDS + 1):
            for equal in (False, True):
                began = time.perf_counter()
                grouped_product(x, w, ends, equal)
                if turn:  # the first warms up
                    seconds[equal] = min(seconds[equal], time.perf_counter() - began)
    finally:
        torch.set_num_threads(had)
    return seconds
