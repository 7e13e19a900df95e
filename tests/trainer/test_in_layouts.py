"""Whole runs in every kind of layout: their losses and their bits per byte are one rank's, in float64."""

from __future__ import annotations

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


def assert_same(run: Run, expected: Run) -> None:
    """Losses, validations and evaluations, as they follow from the same decisions."""
    assert run.loss.keys() == expected.loss.keys()
    for step, loss in expected.loss.items():
        assert run.loss[step] == pytest.approx(loss, rel=1e-9)
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
