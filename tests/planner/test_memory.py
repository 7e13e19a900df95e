"""Memory: states by hand, and against published peaks that nothing was fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.plan_rows import load
from colossus.architecture import num_parameters
from colossus.perf.price import Pricer, fitted
from colossus.planner.columns import Layouts
from colossus.planner.estimate import Problem, rank_weights
from colossus.planner.memory import memory
from colossus.planner.stages import layers_of_stages
from tests.planner.problems import problem


def test_states_are_sixteen_bytes_a_weight_over_the_shards():
    made = problem("llama3.2-1b")
    needs = memory(made, Layouts.of([{"dp_shard": 8}, {"dp_shard": 4, "dp_replicate": 2}]))
    weights = num_parameters(made.arch)
    for i, shards in enumerate((8, 4)):
        states = sum(float(needs.parts[name][i]) for name in ("weights", "gradients", "optimizer"))
        assert states == pytest.approx(16 * weights / shards, rel=1e-9)


@pytest.mark.parametrize("model", ["llama3.1-8b", "mixtral-8x7b", "deepseek-v3", "gpt2-124m"])
def test_ranks_hold_every_weight_once(model):
    arch = problem(model).arch
    for schedule, pp, chunks in (
        ("1f1b", 1, 1),
        ("1f1b", 3, 1),
        ("interleaved_1f1b", 2, 3),
        ("dualpipe_v", 3, 2),
    ):
        made = problem(model).shape(schedule, pp, chunks)
        one = Layouts.of([{}])
        total = sum(float(a[0] + b[0]) for a, b in (rank_weights(arch, one, made, r) for r in range(pp)))
        tied = arch.vocab_size * arch.hidden_size if arch.tie_embeddings and pp > 1 else 0
        buffers = sum(p.numel for p in _buffers(arch))
        assert total == pytest.approx(num_parameters(arch) - buffers + tied, rel=1e-9)


def _buffers(arch):
    from colossus.architecture import parameter_table

    return [p for p in parameter_table(arch) if not p.trainable and "selection" in p.name]


def test_published_peaks():
    """SimuMax's runs on 8 B200 (allocated, GiB), and no scalar of memory anywhere: the mean within 6%."""
    errors = []
    for run in load():
        if run.source.startswith("SimuMax") and run.peak_bytes and run.seq_len == 4096:
            made = Problem(run.arch, run.seq_len, run.global_batch, run.precision,
                           Pricer(run.hardware, run.software, fitted()))  # fmt: skip
            needs = memory(made, Layouts.of(run.variants))
            errors.append(float(needs.allocated[0]) / run.peak_bytes - 1)
    assert len(errors) >= 20
    assert np.mean(np.abs(errors)) < 0.06


def test_layers_are_dealt_out_evenly_and_the_ends_have_less():
    assert layers_of_stages(32, 8) == [4] * 8
    assert layers_of_stages(126, 16) == [7, *[8] * 14, 7]
    assert layers_of_stages(126, 128) == [0, *[1] * 126, 0]
    for layers, stages in ((61, 16), (80, 12), (13, 4)):
        made = layers_of_stages(layers, stages)
        assert sum(made) == layers and max(made) - min(made) <= 1 and made[0] == min(made)
