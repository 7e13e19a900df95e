"""Layers are recomputed until activations fit, and no more than that."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.derive.recompute import check_recompute, derive_recompute, layer_bytes, layers_to_recompute
from colossus.errors import UserError
from colossus.job import Job
from colossus.layout import Layout
from colossus.models import build
from colossus.parallel.recompute import recompute_layers
from colossus.sections import Data, Fleet, Precision, RunSection
from tests.models.reference import random_tokens
from tests.perf.test_parts import kept_bytes
from tests.perf.tiny import tiny

SEQ_LEN = 64


def job_of(**layout: object) -> Job:
    values = {"micro_batch": 2, "activation_gib": 1.0} | layout
    return Job(
        model=tiny("llama3.1-8b"),
        data=Data(seq_len=SEQ_LEN),
        layout=Layout(**values),
        precision=Precision(type="fp32"),
        run=RunSection(global_batch=16),
        fleet=Fleet(device="cpu"),
    )


@settings(max_examples=100, deadline=None)
@given(st.floats(1e3, 1e7), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_one_layer_less_would_not_fit(budget: float, micro_batch: int, pp: int, cp: int) -> None:
    job = job_of(micro_batch=micro_batch, pp=pp, cp=cp)
    saved, kept = layer_bytes(job.model, SEQ_LEN, 4, "cpu")
    layers, least = layers_to_recompute(job, SEQ_LEN, budget)
    tokens, of_stage = micro_batch * SEQ_LEN / cp, {1: 5, 2: 3}[pp]

    def bytes_at(recomputed: int) -> float:
        return pp * tokens * (saved * (of_stage - recomputed) + kept * recomputed)

    assert least == pytest.approx(bytes_at(of_stage))
    if layers is None:
        assert bytes_at(of_stage) > budget
    else:
        assert bytes_at(layers) <= budget and (not layers or bytes_at(layers - 1) > budget)


@pytest.mark.parametrize(
    ("schedule", "global_batch", "under_way"),
    [("1f1b", 16, 4), ("1f1b", 6, 3), ("gpipe", 16, 8), ("gpipe", 6, 3)],
)
def test_no_more_micro_batches_are_under_way_than_there_are(
    schedule: str, global_batch: int, under_way: int
) -> None:
    """In a pipeline of four stages, of micro batches of 2."""
    job = job_of(pp=4, schedule=schedule)
    job = job.put({"run.global_batch": global_batch}, "argument")
    _, kept = layer_bytes(job.model, SEQ_LEN, 4, "cpu")
    _, least = layers_to_recompute(job, SEQ_LEN, 1.0)
    assert least == pytest.approx(under_way * 2 * SEQ_LEN * 2 * kept)  # of five layers, two in a stage


@pytest.mark.parametrize("recomputed", [1, 3, 5])
def test_what_is_kept_is_what_autograd_keeps(recomputed: int) -> None:
    """Counted on a real pass, of which embeddings and the last norm keep a little more."""
    arch = tiny("llama3.1-8b")
    saved, kept = layer_bytes(arch, SEQ_LEN, 4, "cpu")
    model, tokens_BT = build(arch, seed=0), random_tokens(arch, 2, SEQ_LEN)
    recompute_layers(model, "full", recomputed)
    expected = tokens_BT.numel() * (saved * (5 - recomputed) + kept * recomputed)
    assert kept_bytes(model, tokens_BT) == pytest.approx(
        expected, rel=0.1, abs=4 * 32 * 4 * tokens_BT.numel()
    )


def test_too_little_is_refused_with_what_would_do() -> None:
    with pytest.raises(UserError, match=r"layout.activation_gib=1e-09: with every layer .* at least"):
        derive_recompute(job_of(activation_gib=1e-9), SEQ_LEN)
    job = derive_recompute(job_of(activation_gib=1e-3), SEQ_LEN)
    assert job.layout.recompute == "full" and 0 < job.layout.recompute_layers <= 5
    assert derive_recompute(job_of(activation_gib=1.0), SEQ_LEN).layout.recompute == "none"


def asked(**layout: object) -> Job:
    job = job_of(activation_gib=None).put({f"layout.{n}": v for n, v in layout.items()}, "argument")
    return derive_recompute(job, SEQ_LEN)


def test_layers_to_recompute_are_recomputed() -> None:
    """How many are never takes effect without how, nor beside a bound from which it follows."""
    assert asked(recompute_layers=2).layout.recompute == "full"
    assert asked(recompute_layers=2, recompute="selective").layout.recompute == "selective"
    assert asked(recompute_layers=0).layout.recompute is None
    with pytest.raises(UserError, match=r"recompute_layers=2: layout.activation_gib says how many"):
        asked(recompute_layers=2, activation_gib=1.0)
    with pytest.raises(
        UserError, match=r"recompute_layers=2: under layout.recompute=none no .*; full or sel"
    ):
        check_recompute(asked(recompute_layers=2, recompute="none"))
    check_recompute(asked(recompute_layers=0, recompute="none"))
