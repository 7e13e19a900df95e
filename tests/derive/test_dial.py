"""The dial: more compute never gives a smaller model, and tokens stay near the law."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.architecture import Experts, check, num_parameters
from colossus.derive import derive, derive_data, dial
from colossus.derive.dial import (
    CHECKED_WIDTH,
    VOCABULARY,
    WIDTH_STEP,
    base_width_for,
    batch_tokens_for,
    best_compute_for,
    beta2_for,
    complete,
    longest_sample,
    lr_for,
    tokens_for,
)
from colossus.job import load_job
from colossus.measure.machine import this_machine
from colossus.perf.flops import model_flops_per_token

JOB = derive_data(load_job())
EXPERTS = "model.experts.num_experts=8"


def chosen(compute: float, *words: str):
    return dial(derive_data(load_job(None, words)), lambda arch: compute)


@settings(max_examples=15, deadline=None)
@given(st.floats(11, 17), st.floats(0.0, 2.0))
def test_more_compute_never_gives_a_smaller_model(power: float, more: float) -> None:
    small, large = chosen(10**power), chosen(10 ** (power + more))
    assert num_parameters(small.arch) <= num_parameters(large.arch)


@pytest.mark.parametrize("compute", [1e13, 1e14, 1e15, 1e17])
def test_neither_neighbour_is_nearer_to_the_best_number_of_tokens(compute: float) -> None:
    plan = chosen(compute)

    def distance(width: int) -> float:
        flops = model_flops_per_token(complete(JOB, width, VOCABULARY), JOB.data.seq_len)
        return abs(math.log(compute / flops / tokens_for(compute)))

    width = plan.arch.hidden_size
    assert plan.tokens * model_flops_per_token(plan.arch, JOB.data.seq_len) == pytest.approx(compute)
    assert distance(width) <= min(distance(w) for w in (width - WIDTH_STEP, width + WIDTH_STEP) if w > 0)


def test_the_longest_samples_may_be_of_a_late_phase() -> None:
    phases = [{"from_step": 10, "seq_len": 96}, {"from_step": 20, "seq_len": 512}, {"from_step": 30}]
    job = JOB.put({"data.seq_len": 128}, "argument")
    assert longest_sample(job) == 128
    assert longest_sample(job.put({"data.phases": phases}, "argument")) == 512


def test_the_laws_are_those_of_their_source() -> None:
    """DeepSeek LLM (arXiv 2401.02954), equations 1 and 4: exponents; the rate with its constant."""
    assert lr_for(1e17) == pytest.approx(0.3118 * 1e17**-0.125)
    assert math.log(batch_tokens_for(1e18) / batch_tokens_for(1e17), 10) == pytest.approx(0.3271)
    assert math.log(tokens_for(1e18) / tokens_for(1e17), 10) == pytest.approx(0.4757)


@pytest.mark.parametrize("flops", [1e5, 1e8, 1e12])
def test_the_compute_of_a_size_is_that_of_which_it_makes_the_best(flops: float) -> None:
    assert best_compute_for(flops) == pytest.approx(flops * tokens_for(best_compute_for(flops)))


def test_narrow_models_have_several_heads() -> None:
    heads = {width: complete(JOB, width, VOCABULARY).num_heads for width in (32, 64, 96, 128, 256)}
    assert heads == {32: 1, 64: 2, 96: 3, 128: 2, 256: 4}


@pytest.mark.parametrize(
    ("words", "beta2"), [(["run.global_batch=8"], 0.99), (["run.global_batch=128"], 0.95)]
)
def test_small_steps_remember_squares_for_longer(words: list[str], beta2: float) -> None:
    """128 samples of 256 tokens are 2^15."""
    job = derive(load_job(None, ["data.seq_len=256", "run.steps=100", *words]), this_machine())
    assert job.optimizer.beta2 == beta2 == beta2_for(job.run.global_batch * 256)


def test_what_was_asked_of_the_model_is_kept() -> None:
    plan = chosen(
        1e13, "model.hidden_size=96", "model.num_layers=7", "model.num_heads=6", "model.rope_theta=500"
    )
    arch = plan.arch
    assert (arch.hidden_size, arch.num_layers, arch.num_heads, arch.head_dim) == (96, 7, 6, 16)
    assert arch.rope_theta == 500
    check(arch)


def test_experts_cost_a_token_what_an_mlp_would() -> None:
    """Two visits of experts half as wide; the dial counts what a token visits, and the router is little."""
    dense, sparse = (chosen(1e13, "model.hidden_size=192", *words) for words in ([], [EXPERTS]))
    assert dense.arch.intermediate_size == 512 and sparse.arch.expert_size == 256
    assert 1 <= dense.tokens / sparse.tokens < 1.01
    assert num_parameters(sparse.arch) > 2 * num_parameters(dense.arch)
    shared = chosen(1e13, "model.hidden_size=192", EXPERTS, "model.experts.num_shared=2").arch
    assert shared.expert_size == 128
    given = chosen(1e13, "model.hidden_size=192", EXPERTS, "model.experts.intermediate_size=99").arch
    assert given.expert_size == 99
    wide = chosen(1e13, "model.hidden_size=192", EXPERTS, "model.intermediate_size=300").arch
    assert wide.experts is not None and wide.experts.intermediate_size is None and wide.expert_size == 300


def test_a_resolved_job_has_the_width_of_its_experts() -> None:
    words = ["model.hidden_size=96", EXPERTS, "model.experts.balance_loss=0.5", "run.steps=10"]
    job = derive(load_job(None, words), this_machine())
    assert job.model.experts == Experts(num_experts=8, balance_loss=0.5, intermediate_size=128)
    assert job.origins["model.experts"] == "argument"


@given(st.integers(1, 64))
@settings(max_examples=20, deadline=None)
def test_every_default_shape_is_legal(step: int) -> None:
    arch = complete(JOB, WIDTH_STEP * step, VOCABULARY)
    check(arch)
    assert arch.num_heads * arch.head_dim == arch.hidden_size


def test_a_model_that_does_not_fit_is_not_chosen() -> None:
    largest = dial(JOB, lambda arch: 1e22, lambda arch: arch.hidden_size <= 512).arch
    assert largest.hidden_size == 512


@pytest.mark.parametrize("compute", [1e12, 1e14, 1e16, 1e18])
def test_a_wider_model_takes_its_rates_from_the_width_that_the_dial_would_choose(compute: float) -> None:
    best = max(CHECKED_WIDTH, chosen(compute).arch.hidden_size)
    asked = derive_data(load_job(None, ["model.hidden_size=8192"]))
    base = base_width_for(asked, complete(asked, 8192, VOCABULARY), compute)
    assert best <= base <= best + WIDTH_STEP


@pytest.mark.parametrize(
    ("words", "base"),
    [
        ([], None),
        (["model.hidden_size=160"], 160),
        (["model.hidden_size=512"], 160),
        (["model.hidden_size=512", "optimizer.lr=0.001"], 512),
        (["model.hidden_size=512", "model.base_width=256"], 256),
    ],
)
def test_only_a_derived_rate_of_a_wide_model_that_was_asked_for_is_scaled(
    words: list[str], base: int | None
) -> None:
    job = derive(load_job(None, ["run.tokens=100000", *words]), this_machine())
    assert job.model.base_width == (base or job.model.hidden_size)
