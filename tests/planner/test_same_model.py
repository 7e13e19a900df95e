"""The same words mean the same model to `plan` and to `train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from colossus import api
from colossus.architecture import num_parameters
from colossus.cli import data as cli_data
from colossus.derive import derive, to_plan
from colossus.hardware.machine import Gpu
from colossus.hardware.timings import Timing
from colossus.job import load_job, save_job
from colossus.planner.plan import make_plan
from tests.derive.machines import machine

HERE = machine()
H100 = replace(HERE, gpus=(Gpu("NVIDIA H100 80GB HBM3", 80 * 2**30, 700e12),))
ONE = [
    "layout.dp_shard=1",
    "layout.tp=1",
    "layout.pp=1",
    "layout.cp=1",
    "layout.ep=1",
    "layout.micro_batch=1",
]
THIN = ["model.hidden_size=96", "model.num_layers=2"]
WORDS = [
    "model.hidden_size=576 model.num_layers=30 model.num_heads=9 model.vocab_size=49152",
    "model.hidden_size=96",
    "model.hidden_size=160 model.num_heads=5 data.tokenizer=bytes",
    "model.hidden_size=128 model.head_dim=16 model.num_kv_heads=2",
    "model.hidden_size=128 model.position=learned data.seq_len=48",
    "model.hidden_size=128 model.position=learned data.seq_len=48 data.phases=[{from_step=2,seq_len=96}]",
    "model.hidden_size=192 model.experts.num_experts=8 model.experts.num_shared=1",
    "model.hidden_size=192 model.experts.num_experts=4 model.intermediate_size=300",
    "model.hidden_size=128 model.tie_embeddings=false model.qk_norm=false model.mlp=gelu",
    "model.hidden_size=640 optimizer.lr=0.001",
    "model.num_layers=4",
    "model.vocab_size=1000 model.num_kv_heads=2",
    "model=gpt2-124m model.num_layers=2",
    "model=qwen3-0.6b model.num_layers=3 model.vocab_size=5000",
]


@pytest.mark.parametrize("length", ["run.tokens=3000000", "run.steps=40"])
@pytest.mark.parametrize("words", WORDS)
def test_on_this_machine_and_on_another(words: str, length: str) -> None:
    """The machine of `train` has the accelerator that the fleet of `plan` names."""
    job = load_job(None, [*words.split(), length])
    assert to_plan.with_model(job, HERE).model == derive(job, HERE).model
    there = load_job(None, [*words.split(), length, "fleet.accelerator=h100-sxm", "fleet.count=1"])
    trained = derive(job, H100)
    planned = to_plan.with_model(there, None)
    assert planned.model == trained.model and planned.data.seq_len == trained.data.seq_len


@pytest.mark.parametrize("quickest", ["fp32", "bf16"])
@pytest.mark.parametrize("length", ["run.steps=40", "run.minutes=1"])
def test_in_the_same_type_on_this_machine(
    quickest: str, length: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By timed steps, whatever the rates of products say."""

    def timed(*_: object) -> tuple[Timing, ...]:
        return tuple(Timing(t, 2, 2e9 if t == quickest else 1e9) for t in ("fp32", "bf16"))

    monkeypatch.setattr("colossus.derive.machine.step_timings", timed)
    job = load_job(None, ["model.hidden_size=96", length])
    assert derive(job, HERE).precision.type == quickest
    assert make_plan(to_plan.with_model(job, HERE), HERE).precision == quickest
    other = load_job(None, ["model.hidden_size=96", length, "precision.type=fp32"])
    assert make_plan(to_plan.with_model(other, HERE), HERE).precision == "fp32"


def test_by_the_clock_of_this_machine() -> None:
    for words in ([], ["run.minutes=0.5"], [*THIN, "run.minutes=0.5"]):
        job = load_job(None, words)
        planned, trained = to_plan.with_model(job, HERE).model, derive(job, HERE).model
        differs = {"base_width"} if words[:1] == THIN[:1] else set()
        assert planned.model_dump(exclude=differs) == trained.model_dump(exclude=differs)


def test_the_plan_and_the_job_that_it_writes_have_it() -> None:
    """By hand: 30 layers of four squares of 576, three of 576 x 1,536 and 1,280 of norms; tied embeddings."""
    words = [*WORDS[0].split(), "run.tokens=1000000"]
    job = load_job(None, [*words, *ONE, "fleet.accelerator=h100-sxm", "fleet.count=1"])
    made = api.plan(job)
    count = 49152 * 576 + 30 * (4 * 576**2 + 3 * 576 * 1536 + 1280) + 576
    assert num_parameters(made.arch) == num_parameters(derive(load_job(None, words), H100).model) == count
    assert made.to_dict()["num_parameters"] == count
    written = to_plan.planned(job, made).model.model_dump(exclude={"base_width"})
    assert written == made.arch.model_dump(exclude={"base_width"})


def test_the_optimizer_the_type_and_the_batch_are_those_of_training(tmp_path: Path) -> None:
    """On this machine by default; of a plan for a fleet, because the job that it writes says so."""
    job = load_job(
        None, [*THIN, "run.tokens=3000000", *ONE[:-1], "layout.compile=false", "layout.recompute=none"]
    )
    known, trained = to_plan.with_model(job, HERE), derive(job, HERE)
    made = make_plan(known, HERE)
    assert (made.problem.optimizer, made.precision) == (trained.optimizer.name, trained.precision.type)
    assert made.global_batch == trained.run.global_batch and made.seq_len == trained.data.seq_len
    there = load_job(None, [*THIN, *ONE, "fleet.accelerator=h100-sxm", "fleet.count=1", "run.tokens=3000000"])
    made = api.plan(there)
    save_job(to_plan.planned(there, made), tmp_path / "job.toml")
    trained = derive(load_job(tmp_path / "job.toml"), H100)
    assert (made.problem.optimizer, made.precision) == (trained.optimizer.name, trained.precision.type)
    assert made.global_batch == trained.run.global_batch and made.seq_len == trained.data.seq_len
    assert trained.layout.micro_batch == made.best.row["micro_batch"]


def test_of_weights_to_begin_with(tmp_path: Path) -> None:
    run, corpus = tmp_path / "run", tmp_path / "texts"
    corpus.mkdir()
    for n in range(8):
        (corpus / f"{n}.txt").write_text(f"{n} little to learn from. " * 20)
    words = [
        f"data.corpus={corpus}",
        f"data.folder={tmp_path / 'shards'}",
        "data.tokenizer=bytes",
        "data.seq_len=32",
        "run.steps=1",
        "run.threads=1",
    ]
    api.train(load_job(None, [*words, "model.hidden_size=32", "model.num_layers=2", f"run.folder={run}"]))
    job = load_job(None, [f"model.init_from={run}", "run.steps=3", *ONE])
    planned, trained = to_plan.with_model(job, HERE), derive(job, HERE)
    assert planned.model == trained.model and planned.model.num_layers == 2
    assert planned.data.tokenizer == trained.data.tokenizer == "bytes"
    assert make_plan(planned, HERE).arch.hidden_size == 32
    built = cli_data._with_data(load_job(None, [f"model.init_from={run}"]))  # what `data build` builds for
    assert built.data.tokenizer == "bytes" and built.model.vocab_size == trained.model.vocab_size
