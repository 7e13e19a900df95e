"""`layout=auto`: the planner chooses what is open, for what starts here; what was asked for stays."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from colossus.cli.brief import brief
from colossus.derive import derive, to_plan
from colossus.errors import UserError
from colossus.hardware.machine import Gpu, Machine
from colossus.job import PREDICTED, Job, load_job, save_job
from colossus.planner.plan import FIELDS, Plan, make_plan
from colossus.planner.search import NothingFits
from tests.derive.machines import machine

HERE = machine()
GPUS = dataclasses.replace(HERE, gpus=4 * (Gpu("NVIDIA H100 80GB HBM3", 80 * 10**9, 7e14),))
TINY = ["model.hidden_size=64", "model.num_layers=4", "model.num_heads=4", "model.num_kv_heads=2",
        "run.steps=9", "run.global_batch=8"]  # fmt: skip


def auto(*words: str, on: Machine = HERE) -> Job:
    return derive(load_job(None, ["layout=auto", *words]), on)


@pytest.mark.parametrize("words", [TINY, ["run.tokens=300000"]], ids=["a model given", "a model of the dial"])
def test_every_open_field_is_planned_and_says_so(words: list[str]) -> None:
    job = auto(*words, "fleet.count=2")
    assert not set(job.missing()) - {"data.folder", "run.folder"}
    assert job.layout.num_ranks == 2 and job.run.threads == 1
    assert {job.origins[f"layout.{name}"] for name in FIELDS} == {"planned"}
    assert job.origins["layout.preset"] == "preset" and not job.asked_for("layout.tp")
    seconds, size = (float(job.made[name]) for name in PREDICTED)
    assert 0 < seconds < 60 and 0 < size < HERE.memory_bytes
    (line,) = (line for line in brief(job).splitlines() if line.startswith("planned"))
    assert "s a step" in line and "B on a rank" in line
    assert "layout=auto" in brief(job)


def test_without_auto_nothing_is_planned() -> None:
    job = derive(load_job(None, TINY), HERE)
    assert "planned" not in job.origins.values() and not job.made
    assert not any(line.startswith("planned") for line in brief(job).splitlines())


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ([], 1),
        (["layout.tp=2"], 2),
        (["layout.pp=2", "layout.schedule=gpipe"], 2),
        (["layout.tp=2", "fleet.count=4"], 4),
        (["fleet.count=4", "layout.cp_method=ulysses", "layout.micro_batch=1"], 4),
        (["layout.schedule=interleaved_1f1b"], 1),
        (["layout.compile=false", "layout.recompute=full", "layout.zero=3", "fleet.count=2"], 2),
    ],
)
def test_what_was_asked_for_stays(words: list[str], ranks: int) -> None:
    job = auto(*TINY, *words)
    asked = load_job(None, words)
    names = [name for name in asked.origins if name.startswith("layout.")]
    assert [job.get(name) for name in names] == [asked.get(name) for name in names]
    assert {job.origins[name] for name in names} <= {"argument"}
    assert job.layout.num_ranks == ranks


def test_gpus_are_counted_and_may_rest_as_ranks_of_a_processor_may_not() -> None:
    large = ["model=llama3.2-1b", "run.steps=9", "run.global_batch=64"]
    assert auto(*large, on=GPUS).layout.num_ranks == 4
    assert auto(*large, "fleet.count=2", on=GPUS).layout.num_ranks == 2
    assert auto(*large, "fleet.accelerator=h100-sxm", "fleet.count=4", on=GPUS).layout.num_ranks == 4
    assert auto(*TINY, "run.global_batch=1", on=GPUS).layout.num_ranks <= 4
    assert auto(*TINY, "run.global_batch=1", "fleet.count=2").layout.num_ranks == 2


def test_a_launcher_s_processes_are_all_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert auto(*TINY).layout.num_ranks == 2
    assert auto(*TINY, on=GPUS).layout.num_ranks == 2


@pytest.mark.parametrize(
    ("words", "on", "said"),
    [
        (["layout.tp=3"], HERE, "layout.tp=3: must divide the 4 attention heads; 2"),
        (
            ["layout.tp=4", "fleet.count=2"],
            HERE,
            "layout.tp=4: must divide the 2 heads of keys and values; 2",
        ),
        (["fleet.count=5"], GPUS, "fleet.count=5: this machine has 4 of NVIDIA H100"),
        (["fleet=dgx-h100-1"], HERE, "fleet.device=cuda: this machine has no GPU"),
        (["fleet=dgx-h100-1"], GPUS, "fleet: 8 of h100-sxm; layout=auto plans for what starts here, 4 GPUs"),
        (["fleet.accelerator=h100-sxm"], HERE, "plans for what starts here, a processor"),
    ],
)
def test_what_cannot_be_is_told(words: list[str], on: Machine, said: str) -> None:
    with pytest.raises(UserError) as error:
        auto(*TINY, *words, on=on)
    assert said in str(error.value)


def test_a_model_that_does_not_fit_is_an_error_of_the_user() -> None:
    gpus = 2 * (Gpu("NVIDIA H100 80GB HBM3", 66 * 10**9, 7e14),)  # the state alone fits
    words = ["model=llama3.1-8b", "optimizer.name=adamw", "run.steps=2", "run.global_batch=1"]
    with pytest.raises(NothingFits, match=r"fits no layout in .* memory binds"):
        auto(*words, on=dataclasses.replace(GPUS, gpus=gpus))
    assert issubclass(NothingFits, UserError)


def test_a_plan_that_was_kept_is_not_made_again(tmp_path: Path) -> None:
    """The job that `plan --job` writes, and a resolved one."""
    job = load_job(None, ["layout=auto", *TINY, "fleet.count=2", "layout.tp=2", "model.vocab_size=258",
                          "data.tokenizer=bytes"])  # fmt: skip
    kept = to_plan.planned(job, make_plan(to_plan.with_model(job, HERE), HERE))
    save_job(kept, tmp_path / "job.toml")
    again = load_job(tmp_path / "job.toml")
    assert again.origins["layout.pp"] == "planned" and again.origins["layout.tp"] == "file"
    resolved = derive(again, HERE)
    assert not [
        line for line in resolved.differing(kept) if line.startswith("layout.") and "None" not in line
    ]
    assert derive(resolved, GPUS) == resolved
    assert resolved.asked().layout.pp is None and resolved.asked().layout.tp == 2


SHAPES = [
    # four ranks share 8 sequences, not 3 of them
    (["fleet.count=4", "run.batch_schedule=[[0,8],[4,3]]"], "later a smaller batch"),
    (["fleet.count=4", "run.batch_schedule=[[0,3],[4,8]]"], "first a smaller batch"),
    # micro batches go round in pairs: of 8 sequences they do, of 9 they do not
    (["layout.pp=2", "layout.stages_per_rank=2", "layout.schedule=interleaved_1f1b", "layout.tp=1",
      "run.batch_schedule=[[0,8],[4,10]]"], "rounds of a pipeline"),
    # of one sequence a step, two ranks have heads and tokens to share; of an odd number only its layers
    (["fleet.count=2", "run.global_batch=1", "layout.compile=true", "data.seq_len=64",
      "data.phases=[{from_step=4,seq_len=63}]"], "shorter samples"),
    (["fleet.count=2", "run.global_batch=1", "layout.compile=true", "data.seq_len=63",
      "data.phases=[{from_step=4,seq_len=64}]"], "longer samples"),
]  # fmt: skip
OPEN = [word for word in TINY if "batch" not in word]


@pytest.mark.parametrize("words", [words for words, _ in SHAPES], ids=[name for _, name in SHAPES])
def test_what_is_planned_is_legal_at_every_shape_of_the_run(words: list[str]) -> None:
    """`derive` refuses a layout that is not."""
    job = auto(*OPEN, *words)
    assert {job.origins[f"layout.{name}"] for name in FIELDS} >= {"planned"}
    written = to_plan.planned(load_job(None, [*OPEN, *words]), planned_by_verb(*OPEN, *words))
    assert derive(written, HERE).layout.pp == written.layout.pp


def planned_by_verb(*words: str) -> Plan:
    job = load_job(None, list(words))
    return make_plan(to_plan.with_model(job, HERE), HERE)
