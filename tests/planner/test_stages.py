"""The planner prices the stages that the trainer cuts; other programs' runs by their own rule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from colossus.job import Job
from colossus.layout import Layout
from colossus.parallel.mesh import Place
from colossus.parallel.pipeline import cut, own_stages
from colossus.perf.software import ALL, OURS, OURS_EAGER
from colossus.planner.formulas import layer_counts
from colossus.planner.stages import layers_of_stages, shape
from colossus.sections import Data
from tests.planner.problems import problem


@pytest.mark.parametrize(
    ("model", "pp", "per_rank", "schedule"),
    [
        ("llama3.1-8b", 1, 1, "1f1b"),
        ("llama3.1-8b", 4, 1, "1f1b"),
        ("llama3.1-8b", 5, 1, "gpipe"),
        ("llama3.1-8b", 3, 4, "interleaved_1f1b"),
        ("llama3.1-405b", 16, 1, "1f1b"),
        ("llama3.1-405b", 9, 14, "interleaved_1f1b"),
        ("gpt2-124m", 4, 2, "interleaved_zero_bubble"),
        ("gpt2-124m", 3, 2, "dualpipe_v"),
        ("deepseek-v3", 8, 1, "1f1b"),
        ("deepseek-v3", 4, 2, "zbv_zero_bubble"),
        ("gpt-oss-20b", 5, 2, "interleaved_1f1b"),
    ],
)
def test_the_planner_prices_the_stages_that_the_trainer_cuts(model, pp, per_rank, schedule):
    made = problem(model, seq_len=1024)
    planned = made.shape(schedule, pp, per_rank)
    layout = Layout(pp=pp, stages_per_rank=per_rank, schedule=schedule)
    job = Job(model=made.arch, layout=layout, data=Data(seq_len=1024))
    kind_of = {layer: kind for kind, layers in layer_counts(made.arch).items() for layer in layers}
    for rank in range(pp):
        world = SimpleNamespace(meshes=SimpleNamespace(place=Place(0, rank, 0, 0, 0)))
        with torch.device("meta"):
            parts = cut(job, world)
        owned = own_stages(layout, rank) if pp > 1 else [0]
        assert [stage for stage, owner in enumerate(planned.owner) if owner == rank] == sorted(owned)
        for stage, part in zip(owned, parts, strict=True):
            kinds = [kind_of[layer] for layer in part.part]
            assert planned.by_stage[stage].tolist() == [kinds.count(kind) for kind in planned.kinds]
        assert planned.first[rank] == any(part.is_first for part in parts)
        assert planned.last[rank] == any(part.is_last for part in parts)


def test_a_rule_belongs_to_a_program():
    assert [software.name for software in ALL if software.stages == "flops"] == [OURS.name, OURS_EAGER.name]
    arch = problem("llama3.1-405b").arch
    equal = shape(arch, "1f1b", 16, 1, 8192, "layers").by_stage.sum(axis=1).tolist()
    assert equal == layers_of_stages(126, 16) == [7, *[8] * 14, 7]
    ours = shape(arch, "1f1b", 12, 1, 8192, "flops").by_stage.sum(axis=1).tolist()
    assert ours != layers_of_stages(126, 12) and sum(ours) == 126
