"""Whole runs in every kind of layout: their losses and their bits per byte are one rank's, in float64."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from colossus import api
from colossus.checkpoints.load import newest_whole
from colossus.events import number
from colossus.job import Job
from colossus.trainer.hooks import Hook
from colossus.trainer.hooks.evaluate import EvaluateHook
from colossus.trainer.run import Run
from tests.ranks.pool import Pool
from tests.trainer.running import StopAt, kept_machine, run_of
from tests.trainer.test_reshard import assert_near

Make = Callable[..., Job]
EXACT = [
    "precision.type=fp64",
    "run.steps=6",
    "run.validate_every=2",
    "checkpoint.steps=3",
    "optimizer.z_loss=0.01",
    "model.num_layers=4",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=8",
]
EXPERTS = ["model.experts.num_experts=4", "model.experts.selection_bias=true", "model.num_layers=2"]
LAYOUTS = {
    "tp": ["tp=2"],
    "pp": ["pp=2"],
    "pp, V": ["pp=2", "schedule=zbv_zero_bubble"],
    "pp, loop": ["pp=2", "schedule=interleaved_1f1b"],
    "cp": ["cp=2"],
    "cp by heads": ["cp=2", "cp_method=ulysses"],
    "three ranks": ["dp_shard=3"],
    "dp, tp": ["dp_shard=2", "tp=2"],
    "pp, dp": ["pp=2", "dp_replicate=2"],
}
OF_EXPERTS = {"ep": ["dp_shard=2", "ep=2"], "tp, pp, ep": ["tp=2", "pp=2", "ep=2"]}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def alone() -> dict[str, Job]:
    """The job of a run on one rank, by what is trained."""
    return {}


def spread(pool: Pool, job: Job, hooks: Sequence[Hook] = (), follow: Path | None = None) -> Run:
    """The run of a job whose ranks are processes of the pool."""
    return pool.run(job.layout.num_ranks, _rank, job, hooks, follow, kept_machine())[0]


def _rank(job: Job, hooks: Sequence[Hook], follow: Path | None, cache: str) -> Run:
    os.environ["COLOSSUS_CACHE"] = cache
    return api.train(job, hooks, follow=follow)


@pytest.mark.parametrize("name", [*LAYOUTS, *OF_EXPERTS])
def test_a_run_in_a_layout(
    name: str,
    small_job: Make,
    pool: Pool,
    alone: dict[str, Job],
    tmp_path_factory: pytest.TempPathFactory,
    corpus: Path,
) -> None:
    layout = (LAYOUTS | OF_EXPERTS)[name]
    model = EXPERTS if name in OF_EXPERTS else []
    hook = EvaluateHook(4, corpus=str(corpus), documents=3)
    kind = "experts" if model else "dense"
    if kind not in alone:
        folder = tmp_path_factory.mktemp(kind)
        alone[kind] = small_job("", *EXACT, *model, f"run.folder={folder}")
        spread(pool, alone[kind], [hook])
    settings = [f"layout.{setting}" for setting in layout]
    job = small_job("run", *EXACT, *model, *settings)
    run = spread(pool, job, [hook], follow=Path(alone[kind].run.folder))
    assert_same(run, run_of(alone[kind]))
    (sample,) = run.events("sample")
    assert sample["text"] and not run.events("note")
    assert Path(run.folder / "report.html").is_file()


def test_what_is_validated_and_told_is_the_cross_entropy(small_job: Make, pool: Pool) -> None:
    """z-loss is told apart, and no validation has it: at a rate of nothing all are alike."""
    loss, total = {}, {}
    for z_loss in (0, 0.5):
        for layout in ([], ["layout.pp=2"]):
            settings = [*EXACT, f"optimizer.z_loss={z_loss}", "optimizer.lr=1e-12", "run.steps=2", *layout]
            job = small_job(f"z {z_loss} {len(layout)}", *settings, "run.validate_every=1")
            run = spread(pool, job)
            step, validation = run.events("step")[0], run.events("validation")[0]
            key = (z_loss, len(layout))
            loss[key] = (step["loss"], number(validation["loss"]))
            total[key] = step.get("z_loss")
    for key, found in loss.items():
        assert found == pytest.approx(loss[0, 0], rel=1e-7), key
    assert total[0, 0] is total[0, 1] is None
    assert total[0.5, 0] == pytest.approx(total[0.5, 1], rel=1e-9) and total[0.5, 0] > 1


SHAPES = ["run.batch_schedule=[[0,4],[2,8]]", "run.global_batch=4", "data.phases=[{from_step=3,seq_len=16}]"]


@pytest.mark.parametrize(
    "layout", [["pp=2", "schedule=interleaved_1f1b"], ["cp=2", "ep=2"]], ids=["pipeline", "context"]
)
def test_steps_of_several_shapes(layout: list[str], small_job: Make, pool: Pool) -> None:
    """What routers count is what there is of tokens, at every step."""
    settings = [*EXACT, *EXPERTS, *SHAPES, "model.num_layers=4"]
    alone = spread(pool, small_job("alone", *settings, "model.experts.balance_loss=0.1"))
    asked = [f"layout.{setting}" for setting in layout]
    run = spread(pool, small_job("run", *settings, "model.experts.balance_loss=0.1", *asked))
    assert [e["tokens"] for e in run.events("step")] == [128, 128, 256, 128, 128, 128]
    for one, other in zip(run.events("step"), alone.events("step"), strict=True):
        for name in ("loss", "grad_norm", "balance_loss", "z_loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-9), (one["step"], name)
        for name in ("targets", "expert_load", "expert_load_mean", "router_entropy"):
            assert one[name] == other[name], (one["step"], name)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats whose questions are long: many samples have no token of an answer."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with path.open("w") as file:
        for number in range(30):
            question = " ".join(str(number * n) for n in range(30))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.mark.parametrize("model", [[], EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("layout", [["dp_shard=2"], ["pp=2"]], ids=["data", "pipeline"])
def test_steps_without_any_target(
    model: list[str], layout: list[str], small_job: Make, pool: Pool, questions: Path, tmp_path: Path
) -> None:
    """They are counted and said, on one rank and on several; no rank fails, whatever it has of a step."""
    settings = [*EXACT, *model, f"data.corpus={questions}", f"data.folder={questions.parent / 'shards'}"]
    settings += ["run.global_batch=2", "run.steps=12", "optimizer.weight_decay=0.1", "layout.micro_batch=1"]
    alone = spread(pool, small_job("alone", *settings))
    run = spread(pool, small_job("run", *settings, *(f"layout.{setting}" for setting in layout)))
    steps = run.events("step")
    without = [e["step"] for e in steps if e["targets"] == 0]
    assert 2 <= len(without) < 12 and 0 < max(without) < 11
    for one, other in zip(steps, alone.events("step"), strict=True):
        assert one["targets"] == other["targets"]
        if one["step"] in without:
            assert one["loss"] is other["loss"] is one["z_loss"] is None
            assert one["grad_norm"] == other["grad_norm"] == 0
            assert "expert_load" not in one and "skipped" not in one
        else:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
            assert ("expert_load" in one) == bool(model)
    assert run.loss.keys() == set(range(12)) - set(without)
    notes = [(e["step"], e["text"]) for e in run.events("note")]
    share = f"{len(without)} of 12 steps ({round(100 * len(without) / 12)}%) had no targets"
    assert [step for step, _ in notes] == [without[0] + 1, 12] and notes[1][1] == share
    assert run.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-9)


def assert_same(run: Run, expected: Run) -> None:
    """Losses, validations and evaluations, as they follow from the same decisions."""
    assert run.loss.keys() == expected.loss.keys()
    for one, other in zip(run.events("step"), expected.events("step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert one["z_loss"] == pytest.approx(other["z_loss"], rel=1e-9)
    for kind in ("validation", "eval"):
        found, right = run.events(kind), expected.events(kind)
        assert len(found) == len(right) > 1
        for one, other in zip(found, right, strict=True):
            assert (one["step"], one["num_documents"]) == (other["step"], other["num_documents"])
            assert number(one["bits_per_byte"]) == pytest.approx(number(other["bits_per_byte"]), rel=1e-9)


GROWING = [
    (2, ["dp_shard=2"]),
    (4, ["dp_shard=4"]),
    (6, ["dp_shard=3"]),
    (8, ["dp_shard=1", "tp=2", "pp=2"]),
    (10, ["tp=1", "cp=2", "schedule=zbv_zero_bubble"]),
    (12, ["pp=1", "cp=1", "schedule=1f1b"]),
]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_grows_and_shrinks(optimizer: str, small_job: Make, pool: Pool) -> None:
    """8 sequences a step, which 3 ranks cannot share equally: the same samples in the same order."""
    settings = [*EXACT, "run.global_batch=8", "run.steps=12", f"optimizer.name={optimizer}"]
    alone = spread(pool, small_job("alone", *settings))
    job = small_job("run", *settings, "layout.dp_shard=2")
    sizes = []
    for step, layout in GROWING:
        asked = [f"run.folder={job.run.folder}", *(f"layout.{setting}" for setting in layout)]
        changed = job if step == 2 else api.resolve(api.load_job(None, asked))
        run = spread(pool, changed, [StopAt(step)] if step < 12 else [])
        assert run.outcome == ("finished" if step == 12 else "asked")
        sizes.append(changed.layout.num_ranks)
    assert sizes == [2, 4, 3, 4, 4, 1]
    assert [event["num_ranks"] for event in run.events() if event["kind"] in ("start", "resume")] == sizes
    assert [event["step"] for event in run.events("resume")] == [2, 4, 6, 8, 10]
    assert run.loss == pytest.approx(alone.loss, rel=1e-9)
    last, right = newest_whole(run.folder), newest_whole(alone.folder)
    assert last is not None and right is not None and last.meta["sample"] == right.meta["sample"] == 96
    assert_near(last, right, "grown")
