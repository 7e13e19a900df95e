"""A run that was killed and goes on takes the steps of one that never stopped, bit for bit.

`benchmarks/resume.py` tries every place with every setting; here each occurs at least once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from colossus.data.order import BatchSchedule
from colossus.data.sources import TrainingData
from colossus.job import Job
from colossus.measure.machine import this_machine
from tests.trainer.running import Kill, assert_bitwise_equal, follower_of, run_of, train_in_processes

BF16_IS_QUICK = this_machine().flops_per_second("bf16") > 0.5 * this_machine().flops_per_second("fp32")
FAST = "bf16" if BF16_IS_QUICK else "fp32"
SETTINGS = {
    "adamw": ["optimizer.name=adamw"],
    "muon": ["optimizer.name=muon"],
    "muon in the quick type": ["optimizer.name=muon", f"precision.type={FAST}"],
    "adamw on two ranks": ["optimizer.name=adamw", "layout.dp_shard=2"],
    "muon on two ranks": [
        "optimizer.name=muon",
        "layout.dp_shard=2",
        f"precision.type={FAST}",
        "run.validate_every=4",
    ],
    "adamw, tp": ["optimizer.name=adamw", "model.num_kv_heads=2", "layout.tp=2"],
    "muon, pp": ["optimizer.name=muon", "layout.pp=2", "run.validate_every=4"],
}
PLACES = {
    "adamw": [Kill("step", 0), Kill("save", 4), Kill("evaluation", 5), Kill("step", 9)],  # 6 to 12: the decay
    "muon": [Kill("before", 6)],
    "muon in the quick type": [Kill("save", 8), Kill("evaluation", 12)],
    "adamw on two ranks": [Kill("save", 8, rank=1)],
    "muon on two ranks": [Kill("evaluation", 8, rank=1)],
    "adamw, tp": [Kill("step", 9, rank=1)],
    "muon, pp": [Kill("save", 8, rank=1)],
}
Make = Callable[..., Job]


CASES = [(name, kill) for name, kills in PLACES.items() for kill in kills]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Job]:
    """By setting, once it was trained; its folder stays while these tests run."""
    return {}


@pytest.mark.parametrize(("setting", "kill"), CASES, ids=lambda v: v if isinstance(v, str) else v.where)
def test_killed_and_gone_on(
    setting: str,
    kill: Kill,
    small_job: Make,
    undisturbed: dict[str, Job],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if setting not in undisturbed:
        folder = tmp_path_factory.mktemp("undisturbed")
        undisturbed[setting] = small_job("", *SETTINGS[setting], f"run.folder={folder}")
        assert set(train_in_processes(undisturbed[setting])) == {0}
    job = small_job("killed", *SETTINGS[setting])
    assert -9 in train_in_processes(job, [kill])
    assert set(train_in_processes(job)) == {0}
    assert len({event["attempt"] for event in run_of(job).events("step")}) == (
        1 if kill.step in (0, 12) else 2
    )
    assert_bitwise_equal(job, undisturbed[setting])


@pytest.mark.parametrize("before", [0, 1])
def test_killed_where_an_epoch_ends(before: int, small_job: Make) -> None:
    """The epoch ends within a batch: killed just before that step, and just after it."""
    settings = ["run.global_batch=48", "run.validate_every=0"]
    job = small_job("killed", *settings)
    whole = small_job("whole", *settings)
    assert train_in_processes(whole) == [0]
    schedule = BatchSchedule(job.run.batch_schedule)
    order = TrainingData.open(job, schedule).order
    epochs = [order.locate(sample)[1] for sample in range(48 * 12)]
    last = epochs.index(1) // 48  # the step that takes the last sample of the first epoch
    assert epochs.index(1) % 48 and 4 < last < 10
    assert train_in_processes(job, [Kill("before", last + 1 - before)]) == [-9]
    assert train_in_processes(job) == [0]
    assert_bitwise_equal(job, whole)


TIMED = ["run.minutes=0.06", "checkpoint.steps=10", "run.validate_every=60"]


@pytest.mark.parametrize("steps_later", [None, 0, 7], ids=["before", "at", "in the decay"])
def test_a_decision_of_the_clock_is_replayed(
    steps_later: int | None, small_job: Make, tmp_path: Path
) -> None:
    """The end that was decided stays, and a run that follows the decisions takes the same steps unstopped."""
    kill = Kill("before", 13) if steps_later is None else Kill("decided", steps_later)
    job = small_job("killed", *TIMED)
    assert train_in_processes(job, [kill]) == [-9]
    decided = run_of(job).events("decision")
    assert any(d["name"] == "decay" for d in decided) == (steps_later is not None)
    killed_at = max(run_of(job).loss) + 1
    assert train_in_processes(job) == [0]
    events = run_of(job).events("decision")
    assert events[: len(decided)] == decided
    places = [(d["name"], d["first_step"]) for d in events]
    assert len(set(places)) == len(places)  # nothing was decided anew
    assert not [d for d in events[len(decided) :] if d["first_step"] < killed_at]
    resumed = run_of(job).events("resume")[0]["step"]
    assert killed_at - 20 <= resumed <= killed_at  # the same, where the kill came right after a save

    follower = follower_of(job, tmp_path / "follower")
    assert train_in_processes(follower, follow=Path(job.run.folder)) == [0]
    decays = [(d["value"], d["first_step"]) for d in events if d["name"] == "decay"]
    followed = [e for e in run_of(follower).events("decision") if e["name"] == "decay"]
    assert [(d["value"], d["first_step"]) for d in followed] == decays
    assert_bitwise_equal(job, follower)


def test_a_run_whose_end_was_never_decided_can_be_followed(small_job: Make, tmp_path: Path) -> None:
    """The clock of the follower decides what the followed run had left open."""
    job = small_job("killed", *TIMED)
    assert train_in_processes(job, [Kill("before", 13)]) == [-9]
    follower = follower_of(job, tmp_path / "follower")
    assert train_in_processes(follower, follow=Path(job.run.folder)) == [0]
    assert run_of(follower).outcome == "finished"


def test_one_compiled_run(small_job: Make) -> None:
    settings = ["layout.compile=true", "optimizer.name=muon", "run.steps=4", "checkpoint.steps=2"]
    whole, job = small_job("whole", *settings), small_job("killed", *settings)
    assert train_in_processes(whole) == [0]
    assert train_in_processes(job, [Kill("step", 3)]) == [-9]
    assert train_in_processes(job) == [0]
    assert_bitwise_equal(job, whole)
