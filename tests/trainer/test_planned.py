"""A run with `layout=auto`: it trains in the layout that was planned, keeps the prediction, and goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from colossus import api
from colossus.job import PREDICTED, Job
from colossus.monitor import summary
from colossus.planner.plan import FIELDS
from colossus.trainer import folder as folders
from tests.trainer.running import StopAt

Make = Callable[..., Job]


def test_a_planned_run_keeps_what_was_predicted_and_goes_on(small_job: Make, tmp_path: Path) -> None:
    job = small_job("run", "layout=auto", "fleet.count=2", "layout.micro_batch=1")
    run = api.train(job, hooks=[StopAt(6)])
    assert run.outcome == "asked" and run.events("start")[0]["num_ranks"] == 2
    (plan,) = run.events("plan")
    layout = job.layout.model_dump(exclude_none=True)
    assert plan["layout"] == layout and layout["micro_batch"] == 1
    assert [plan[name] for name in PREDICTED] == [float(job.made[name]) for name in PREDICTED]
    origins = run.events("start")[0]["origins"]
    assert {origins[f"layout.{name}"] for name in FIELDS} == {"planned", "argument"}

    alone = api.train(api.load_job(tmp_path / "run", ["fleet.count=1"]))
    assert alone.outcome == "finished" and sorted(run.loss) == list(range(12))
    assert run.events("resume")[0]["num_ranks"] == 1
    assert [event["layout"]["dp_shard"] for event in run.events("plan")] == [layout["dp_shard"], 1]
    assert "the plan predicted" in summary(run.folder)
    assert "was predicted" in (run.folder / "report.html").read_text()
    assert "the layout was planned: predicted" in (run.folder / "log.txt").read_text()


def begun(job: Job, place: Path) -> Job:
    """The job, the folder of whose run is there."""
    (place / "tokenizer").mkdir()
    folders.make(place / "run", job, place / "tokenizer")
    return job


def test_another_layout_is_planned_around_what_is_asked_for_then(small_job: Make, tmp_path: Path) -> None:
    job = begun(small_job("run", "layout=auto"), tmp_path)
    assert job.layout.num_ranks == 1

    def resumed(*words: str) -> Job:
        return api.resolve(api.load_job(tmp_path / "run", words))

    assert resumed().layout == job.layout and resumed().made == job.made
    two = resumed("layout.pp=2")
    assert two.layout.num_ranks == two.layout.pp == 2 and two.origins["layout.pp"] == "argument"
    assert two.made[PREDICTED[0]] != job.made[PREDICTED[0]]
    others = [name for name in FIELDS if name not in ("micro_batch", "zero")]
    every = [f"layout.{name}={getattr(job.layout, name)}".lower() for name in others]
    fixed = resumed(*every, "layout.micro_batch=2")
    assert fixed.layout.micro_batch == 2 and PREDICTED[0] in fixed.made


def test_a_run_that_was_not_planned_may_be_from_now_on(small_job: Make, tmp_path: Path) -> None:
    job = begun(small_job("run"), tmp_path)
    planned = api.resolve(api.load_job(tmp_path / "run", ["layout=auto", "fleet.count=2"]))
    assert planned.layout.num_ranks == 2 and planned.origins["layout.dp_shard"] == "planned"
    assert PREDICTED[0] in planned.made and planned.made.items() > job.made.items()
    counted = api.resolve(api.load_job(tmp_path / "run", ["fleet.count=2"]))
    assert counted.layout.dp_shard == 2 and counted.origins["layout.dp_shard"] == "derived"
