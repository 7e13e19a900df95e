"""The rate of training is measured on a part of a model that is like the whole."""

from __future__ import annotations

import torch

from colossus.measure.training import _part, training_flops_per_second
from tests.perf.tiny import tiny


def test_a_part_of_a_mixture_has_experts() -> None:
    """DeepSeek-V3's first three layers have none: of one layer that is measured, that one has."""
    arch = tiny("deepseek-v3", num_layers=40, hidden_size=2048)
    part = _part(arch)
    assert part.num_layers == 1 and part.has_experts(0)
    part = _part(tiny("deepseek-v3"))
    assert [part.has_experts(layer) for layer in range(part.num_layers)] == [False, False, True, True]


def test_a_mixture_of_experts_is_measured() -> None:
    before = torch.get_num_threads()
    assert training_flops_per_second(tiny("deepseek-v3"), 64, "fp32", 1, "cpu") > 1e6
    assert torch.get_num_threads() == before
