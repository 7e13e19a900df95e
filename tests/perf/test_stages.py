"""Stages of a pipeline against all cuts that there are."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from colossus.architecture import Architecture
from colossus.job import load_job
from colossus.perf.flops import executed_forward_flops
from colossus.perf.stages import layer_costs, stages
from tests.perf.tiny import tiny

MODELS = {
    "all alike": tiny("llama3.1-8b"),
    "two dense layers first": tiny("deepseek-v3", num_layers=7),
    "windows": tiny("gpt-oss-20b", num_layers=6),
    "a large head": tiny("llama3.1-8b", num_layers=6, vocab_size=2000),
}


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5])
def test_no_cut_has_a_cheaper_dearest_stage(arch: Architecture, num_stages: int) -> None:
    costs, head = layer_costs(arch, 64)

    def dearest(cut: tuple[range, ...]) -> float:
        return max(sum(costs[i] for i in part) + (head if part is cut[-1] else 0) for part in cut)

    found = stages(arch, num_stages, 64)
    assert [layer for part in found for layer in part] == list(range(arch.num_layers))
    assert len(found) == num_stages and all(found)
    cuts = combinations(range(1, arch.num_layers), num_stages - 1)
    bounds = ((0, *inner, arch.num_layers) for inner in cuts)
    best = min(dearest(tuple(range(a, b) for a, b in pairwise(e))) for e in bounds)
    assert dearest(found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS.keys())
def test_layers_and_head_are_all_that_a_forward_pass_costs(arch: Architecture) -> None:
    costs, head = layer_costs(arch, 64)
    assert sum(costs) + head == pytest.approx(executed_forward_flops(arch, 64), rel=1e-12)


def test_the_first_stage_where_most_waits_has_fewest_layers() -> None:
    """Llama 3.1 405B: 126 layers in 16 stages, and the head costs about half of a layer."""
    arch = load_job(None, ["model=llama3.1-405b"]).model
    lengths = [len(part) for part in stages(arch, 16, 8192)]
    assert sum(lengths) == 126 and max(lengths) == 8 and lengths[-1] == 7 and lengths[0] == 7
