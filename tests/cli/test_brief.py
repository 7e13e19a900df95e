"""What a run says of its job before it begins: each figure worked out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from colossus.architecture import num_active, num_parameters
from colossus.cli.brief import brief
from colossus.job import PREDICTED, Job, load_job

TINY = [
    "model.vocab_size=1000",
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "model.head_dim=16",
    "model.intermediate_size=128",
    "model.max_seq_len=32",
    "model.rope_theta=10000",
    "model.norm_eps=1e-5",
    "model.qk_norm=false",
    "model.initializer_range=0.02",
    "model.base_width=64",
]


def lines(job: Job) -> dict[str, str]:
    """By subject."""
    return dict(line.split(maxsplit=1) for line in brief(job).splitlines())


def tiny(*words: str, tied: bool = True) -> Job:
    return load_job(None, [*TINY, f"model.tie_embeddings={str(tied).lower()}", *words])


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_and_its_parameters(tied: bool) -> None:
    """1000 x 64 once or twice; a layer has 4 x 64 x 64 + 3 x 64 x 128 and two norms; one norm at the end."""
    count = 1000 * 64 * (1 if tied else 2) + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert num_parameters(tiny(tied=tied).model) == count
    said = f"{count / 1000:.0f}k parameters, 2 layers, width 64, vocabulary 1,000"
    assert lines(tiny(tied=tied))["model"] == said


def test_of_experts_the_visited_ones_are_told() -> None:
    """A layer has 8 experts of 3 x 64 x 32 and a router of 8 x 64; a token visits 2."""
    job = tiny("model.experts={num_experts=8, per_token=2, intermediate_size=32}")
    one = 3 * 64 * 32
    rest = 1000 * 64 + 2 * (4 * 64 * 64 + 8 * 64 + 2 * 64) + 64
    assert num_parameters(job.model) == rest + 2 * 8 * one
    assert num_active(job.model) == rest + 2 * 2 * one
    assert num_active(job.model, input_embedding=False) == num_active(job.model)  # tied: the head's product
    said = lines(job)["model"]
    assert said.startswith(
        f"{(rest + 16 * one) / 1000:.0f}k parameters, {(rest + 4 * one) / 1000:.0f}k of them"
    )
    assert "8 experts, 2 a token" in said


def test_steps_and_tokens() -> None:
    sizes = ("run.global_batch=8", "data.seq_len=32")
    job = tiny("run.steps=1000", *sizes).derive(**{"run.expected_steps": 1000})
    assert lines(job)["steps"] == "1,000 steps, 8 samples a step (256 tokens)"
    each = 1000 * 8 * 32 / num_active(job.model)
    assert lines(job)["tokens"].startswith(f"about 256k, {each:.3g} a parameter")
    assert "too few to learn much" not in lines(job)["tokens"]
    short = tiny("run.steps=5", *sizes).derive(**{"run.expected_steps": 5})
    assert lines(short)["tokens"].startswith("about 1,280, ") and "too few to learn" in lines(short)["tokens"]
    tuned = short.put({"model.init_from": "runs/x"}, "argument")  # its model has learned already
    assert lines(tuned)["tokens"] == "about 1,280"
    timed = tiny("run.minutes=90", "run.global_batch=8").derive(**{"run.expected_steps": 20_000})
    assert lines(timed)["steps"] == "1:30:00 of training, about 20k steps, 8 samples a step"


def test_the_rates_of_both_optimizers() -> None:
    rates = {"optimizer.name": "muon", "optimizer.lr": 3e-3, "optimizer.matrix_lr": 2e-2}
    assert lines(tiny().derive(**rates))["optimizer"] == "Muon and AdamW, matrices at 0.02, the rest at 0.003"
    job = tiny("model.base_width=16").derive(**(rates | {"optimizer.name": "adamw"}))
    assert lines(job)["optimizer"] == "AdamW, at 0.003, scaled from width 16"


def test_the_layout() -> None:
    job = tiny("layout.dp_shard=2", "layout.tp=3", "layout.pp=2", "layout.schedule=1f1b", "run.threads=1")
    assert lines(job)["machine"] == "12 ranks (dp_shard 2 x pp 2 x tp 3) by 1f1b, 1 thread"
    assert lines(tiny("layout.dp_shard=4"))["machine"] == "4 ranks"
    planned = dataclasses.replace(job, made=dict(zip(PREDICTED, ("90", "3e9"), strict=True)))
    assert lines(planned)["planned"] == "the layout, predicted 1 min 30 s a step, 3 GB on a rank"


def test_what_was_asked_for_by_words_or_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('model = "llama3.2-1b"\n[run]\nsteps = 7\n[data]\ncorpus = ["a", "b"]\n')
    job = load_job(path, ["optimizer.lr=0.5"]).derive(**{"run.seed": 3})
    assert lines(job)["asked"] == "model=llama3.2-1b, data.corpus=[a,b], optimizer.lr=0.5, run.steps=7"
