"""A run that is made longer, changed on its way, or branched, beside runs that had it all from the start.

What is compared bit for bit: every loss that counts, and all that the last checkpoint holds.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from colossus import api
from colossus.checkpoints.format import DamagedCheckpoint
from colossus.errors import UserError
from colossus.job import Job, load_job, load_run_job
from colossus.trainer.branch import check_beginning
from colossus.trainer.decisions import CHANGE
from colossus.trainer.hooks import Hook
from colossus.trainer.run import Run
from colossus.trainer.training import Training
from tests.trainer.running import (
    Kill,
    StopAt,
    assert_bitwise_equal,
    follower_of,
    run_of,
    state_of,
    train_in_processes,
)

Make = Callable[..., Job]
COMMON = ["optimizer.name=muon", "run.validate_every=0", "checkpoint.steps=0"]


def going_on(job: Job, *words: str) -> Job:
    """The job of `colossus train FOLDER WORDS`."""
    return api.resolve(api.load_job(job.run.folder, list(words)))


def train(job: Job, *hooks: Hook) -> Run:
    return api.train(job, hooks)


def changes(job: Job) -> list[dict[str, Any]]:
    return [e for e in run_of(job).events("decision") if e["name"] == "change"]


def factors(job: Job) -> dict[int, float]:
    """Step -> share of the rate, of the steps that count."""
    return {e["step"]: e["lr_factor"] for e in run_of(job)._kept("step")}


@pytest.mark.parametrize("words", ["run.steps=20", f"run.tokens={20 * 4 * 32}"])
def test_made_longer_it_is_as_if_it_had_been_so_long_from_the_start(words: str, small_job: Make) -> None:
    """From where its rate began to fall (step 6 of 12): steps 6 to 11 are taken again, and it is a run of 20
    steps, to the last bit."""
    job, whole = small_job("run", *COMMON), small_job("whole", *COMMON, "run.steps=20")
    train(whole)
    assert train(job).outcome == "finished"
    assert sorted(p.name for p in (Path(job.run.folder) / "checkpoints").iterdir())[0] == "step-00000006"
    longer = going_on(job, words)
    assert train(longer).outcome == "finished"
    assert_bitwise_equal(job, whole)
    assert factors(job) == factors(whole)
    (change,) = changes(job)
    assert (change["first_step"], change["value"]["rewarm"]) == (6, False)
    assert run_of(job).events("resume")[0]["step"] == 6


def test_made_longer_before_its_rate_fell_nothing_is_taken_again(small_job: Make) -> None:
    job, whole = small_job("run", *COMMON), small_job("whole", *COMMON, "run.steps=20")
    train(whole)
    assert train(job, StopAt(5)).outcome == "asked"
    train(going_on(job, "run.steps=20"))
    assert_bitwise_equal(job, whole)
    assert [e["step"] for e in run_of(job).events("step")] == list(range(20))


@pytest.mark.parametrize("kill", [Kill("before", 8), Kill("before", 15), Kill("save", 13)], ids=str)
def test_killed_after_it_was_made_longer(kill: Kill, small_job: Make, tmp_path: Path) -> None:
    """Before anything new was saved, after the new decay began, and within a save; and who follows it takes
    the steps of the whole."""
    job, whole = small_job("run", *COMMON), small_job("whole", *COMMON, "run.steps=20")
    train(whole)
    train(job)
    assert -9 in train_in_processes(going_on(job, "run.steps=20", "checkpoint.steps=13"), [kill])
    assert train_in_processes(going_on(job)) == [0]
    assert_bitwise_equal(job, whole)
    assert len(changes(job)) == 1
    follower = follower_of(job, tmp_path / "follower")
    assert train_in_processes(follower, follow=Path(job.run.folder)) == [0]
    assert_bitwise_equal(follower, whole)


def test_twice_longer(small_job: Make) -> None:
    job, whole = small_job("run", *COMMON), small_job("whole", *COMMON, "run.steps=30")
    train(whole)
    for words in ([], ["run.steps=20"], ["run.steps=30"]):
        train(going_on(job, *words) if words else job)
    assert_bitwise_equal(job, whole)
    assert [c["first_step"] for c in changes(job)] == [6, 10]


def test_a_kill_between_the_decision_and_the_job_file(small_job: Make) -> None:
    """What the log has holds, whatever the file says."""
    job, whole = small_job("run", *COMMON), small_job("whole", *COMMON, "run.steps=20")
    train(whole)
    train(job)
    file = Path(job.run.folder) / "job.toml"
    before = file.read_text()
    assert -9 in train_in_processes(going_on(job, "run.steps=20"), [Kill("before", 6)])
    file.write_text(before)
    train(going_on(job))
    assert_bitwise_equal(job, whole)
    assert "steps = 20" in file.read_text()


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_without_a_checkpoint_from_before_the_rate_rises_anew(schedule: str, small_job: Make) -> None:
    """From the end, by the formula: from what was left of the rate to all of it over the warm-up's 2 steps,
    and then a schedule of its own over the 12 steps that were added."""
    words = [f"optimizer.schedule={schedule}", "optimizer.final_lr_fraction=0.1"]
    job = small_job("run", *COMMON, *words)
    train(job)
    shutil.rmtree(Path(job.run.folder) / "checkpoints" / "step-00000006", ignore_errors=True)
    train(going_on(job, "run.steps=24"))
    (change,) = changes(job)
    assert (change["first_step"], change["value"]["rewarm"]) == (12, True)
    found = factors(job)
    assert sorted(found) == list(range(24))
    assert [found[12], found[13]] == pytest.approx([0.1 + 0.9 / 3, 0.1 + 0.9 * 2 / 3])
    if schedule == "wsd":
        assert [found[s] for s in range(14, 19)] == [1.0] * 5
        assert [found[s] for s in range(18, 24)] == pytest.approx([1 - 0.9 * n / 6 for n in range(6)])
    else:
        assert found[14] == pytest.approx(1.0) and found[19] == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-6)
    first = [e["loss"] for e in run_of(job).events("step") if e["step"] == 11]
    assert len(first) == 1  # nothing was taken again


def test_minutes_made_longer(small_job: Make) -> None:
    """The clock decides a new end; what was taken in the decay before is taken again."""
    job = small_job("run", "run.minutes=0.05", "run.validate_every=0")
    train(job)
    fell = min(e["value"]["begin_step"] for e in run_of(job).events("decision") if e["name"] == "decay")
    steps = max(run_of(job).loss)
    assert train(going_on(job, "run.minutes=0.15")).outcome == "finished"
    run = run_of(job)
    (change,) = changes(job)
    assert change["first_step"] == fell and max(run.loss) > steps
    assert sorted(run.loss) == list(range(max(run.loss) + 1))
    decided = run.events("decision")
    since = decided[[e["name"] for e in decided].index(CHANGE) :]
    # the first of them: where the machine turns slower, a later one cuts the decay short
    falls_anew = next(e["value"]["begin_step"] for e in since if e["name"] == "decay")
    assert falls_anew > fell
    level = range(2, min(steps, falls_anew))  # no decay is left of the first end
    assert all(factors(job)[s] == 1.0 for s in level)
    assert factors(job)[max(run.loss)] < 0.1
    assert 6.0 < run.events()[-1]["run_seconds"] < 18.0  # of 9, on cores that others share


class SetRate(Hook):
    """Sets the optimizers' own rates at a step, as somebody would without us."""

    def __init__(self, step: int, ratio: float) -> None:
        self.step, self.ratio = step, ratio

    def before_step(self, training: Training) -> None:
        if training.step == self.step:
            optimizer = training.state.optimizer
            assert optimizer._muon is not None
            optimizer._muon._lr *= self.ratio
            for _, adamw in optimizer._adamw:
                adamw._lr *= self.ratio


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_another_rate_from_a_step_on(how: str, small_job: Make, tmp_path: Path) -> None:
    job, whole = small_job("run", *COMMON), small_job("whole", *COMMON)
    train(whole, SetRate(8, 0.5))
    train(job, StopAt(8))
    changed = going_on(job, "optimizer.lr=0.0015")
    assert changed.optimizer.matrix_lr == 0.0015  # which was derived from it
    if how == "killed":
        assert -9 in train_in_processes(changed, [Kill("before", 10)])
        changed = going_on(job)
    train(changed)
    assert run_of(job).loss == run_of(whole).loss
    assert [e["lr"] / e["lr_factor"] for e in run_of(job)._kept("step")][7:9] == pytest.approx(
        [0.003, 0.0015]
    )
    (change,) = changes(job)
    assert change["first_step"] == 8
    assert change["value"]["after"] == {"optimizer.lr": 0.0015, "optimizer.matrix_lr": 0.0015}
    follower = follower_of(job, tmp_path / "follower")
    assert train_in_processes(follower, follow=Path(job.run.folder)) == [0]
    assert run_of(follower).loss == run_of(whole).loss
    rates = {e["step"]: e["lr"] / e["lr_factor"] for e in run_of(follower)._kept("step")}
    assert [rates[7], rates[8]] == pytest.approx([0.003, 0.0015])


def test_the_same_words_do_the_same_each_time(small_job: Make) -> None:
    """The matrices' rate follows the other one as often as that is changed, and no more once it is given."""
    job = small_job("run", *COMMON)
    train(job, StopAt(3))
    for step, lr in ((5, 0.002), (7, 0.001)):
        job = going_on(job, f"optimizer.lr={lr}")
        train(job, StopAt(step))
        kept = load_run_job(Path(job.run.folder)).optimizer
        assert (kept.lr, kept.matrix_lr) == (lr, lr)
        assert changes(job)[-1]["value"]["after"] == {"optimizer.lr": lr, "optimizer.matrix_lr": lr}
    train(going_on(job, "optimizer.matrix_lr=0.004"), StopAt(9))
    job = going_on(job, "optimizer.lr=0.002")
    assert (job.optimizer.lr, job.optimizer.matrix_lr) == (0.002, 0.004)


FROM_THE_START = {
    "batch": ("run.global_batch=8", "run.batch_schedule=[[0,4],[5,8]]"),
    "length of samples": ("data.seq_len=16", "data.phases=[{from_step=5,seq_len=16}]"),
    "skips": ("data.skip=[[30,50]]", "data.skip=[[30,50]]"),
    "phases": ("data.phases=[{from_step=7,seq_len=16}]", "data.phases=[{from_step=7,seq_len=16}]"),
}


def test_who_follows_takes_each_step_in_as_many_passes(small_job: Make, tmp_path: Path) -> None:
    """A smaller batch has a smaller micro-batch from then on; the steps before it keep theirs."""
    job = small_job("run", *COMMON, "run.global_batch=8")
    assert job.layout.micro_batch == 8
    train(job, StopAt(5))
    train(going_on(job, "run.global_batch=3"), StopAt(8))
    train(going_on(job, "run.global_batch=2"))
    cuts = [change["value"]["after"]["layout.micro_batch"] for change in changes(job)]
    assert len(cuts) == 2 and cuts[1] < cuts[0] < 8
    follower = api.load_job(
        Path(job.run.folder) / "job.toml", [f"run.folder={tmp_path / 'follower'}"], exact=True
    )
    follower = api.resolve(follower, exact=True)
    passes = Passes()
    api.train(follower, [passes], follow=job.run.folder)
    assert_bitwise_equal(follower, job)
    assert [*dict.fromkeys(passes.seen)] == [(8, 8), (cuts[0],) * 2, (cuts[1],) * 2]
    assert load_run_job(Path(job.run.folder)).origins["layout.micro_batch"] == "derived"


class Passes(Hook):
    """What each step takes at once, and the rows that it has."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def before_step(self, training: Training) -> None:
        assert training.batch is not None
        self.seen.append((training.job.layout.micro_batch, len(training.batch.tokens_BT)))


@pytest.mark.parametrize("what", FROM_THE_START)
def test_what_changes_from_a_step_on_is_as_if_it_had_been_planned(what: str, small_job: Make) -> None:
    words, planned = FROM_THE_START[what]
    job = small_job("run", *COMMON)
    whole = small_job("whole", *COMMON, planned, *(["run.global_batch=4"] if what == "batch" else []))
    train(whole)
    train(job, StopAt(5))
    changed = going_on(job, words)
    assert -9 in train_in_processes(changed, [Kill("before", 9)])
    train(going_on(job))
    assert_bitwise_equal(job, whole)
    (change,) = changes(job)
    assert change["first_step"] == 5
    again = going_on(job, words)  # the same words change nothing more
    assert not again.differing(going_on(job)) and train(again).outcome == "finished"
    assert len(changes(job)) == 1


def test_the_words_of_the_start_change_nothing_and_words_beside_the_folder_hold_from_now_on(
    small_job: Make,
) -> None:
    """A scheduler sends the same command again; a person says what should come."""
    words = [*COMMON, "run.global_batch=4", "run.batch_schedule=[[0,4],[3,8]]"]
    job = small_job("run", *words)
    train(job, StopAt(6))
    assert not small_job("run", *words).differing(job)
    assert going_on(job).run.batch_schedule == [(0, 4), (3, 8)]
    assert going_on(job, "run.global_batch=4").run.batch_schedule == [(0, 4), (3, 8), (6, 4)]
    assert going_on(job, "run.global_batch=8").run.batch_schedule == [(0, 4), (3, 8)]
    train(going_on(job, "run.global_batch=4"))
    assert [e["tokens"] // 32 for e in run_of(job).events("step")] == [4] * 3 + [8] * 3 + [4] * 6
    train(small_job("run", *words))
    assert len(changes(job)) == 1
    train(going_on(job, "run.steps=15", "optimizer.lr=0.001"))
    assert small_job("run", *words).run.steps == 15 and small_job("run", *words).optimizer.lr == 0.001


def test_a_fall_back_behind_a_change_takes_the_steps_before_it_as_they_were(small_job: Make) -> None:
    """The newest checkpoint is damaged once the change is decided."""
    words = [*COMMON, "checkpoint.steps=3", "checkpoint.keep=3"]
    job, whole = small_job("run", *words), small_job("whole", *words)
    train(whole, SetRate(6, 0.5))
    train(job, StopAt(6))
    changed = going_on(job, "optimizer.lr=0.0015")
    assert -9 in train_in_processes(changed, [Kill("before", 7)])
    pieces = Path(job.run.folder) / "checkpoints" / "step-00000006" / "pieces-00000.safetensors"
    data = bytearray(pieces.read_bytes())
    data[-5] ^= 1
    pieces.write_bytes(data)
    train(going_on(job))
    assert run_of(job).events("resume")[-1]["step"] == 3
    assert run_of(job).loss == run_of(whole).loss


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in files
    }


def branch_of(job: Job, folder: Path, *words: str, at: int | None = None) -> Job:
    said = job.run.folder if at is None else f"{job.run.folder}@{at}"
    return api.resolve(load_job(None, [f"run.branch_from={said}", f"run.folder={folder}", *words]))


def test_a_branch_takes_the_steps_of_its_source_and_needs_it_no_more(small_job: Make, tmp_path: Path) -> None:
    source = small_job("source", *COMMON, "checkpoint.steps=4", "checkpoint.keep=9")
    train(source)
    before = tree(Path(source.run.folder))
    job = branch_of(source, tmp_path / "branch", at=4)
    assert job.run.branch_from == f"{source.run.folder}@4"
    assert -9 in train_in_processes(job, [Kill("before", 7)])
    assert tree(Path(source.run.folder)) == before
    losses, (step, expected) = run_of(source).loss, state_of(source)
    shutil.rmtree(source.run.folder)
    train(going_on(job))
    assert run_of(job).loss == {s: loss for s, loss in losses.items() if s >= 4}
    found_step, found = state_of(job)
    assert found_step == step and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    page = (tmp_path / "branch" / "report.html").read_text()
    assert "branched from" in page and f"{source.run.folder} at step 4" in page


def test_who_follows_a_branch_needs_its_source_no_more(small_job: Make, tmp_path: Path) -> None:
    source = small_job("source", *COMMON, "checkpoint.steps=4", "checkpoint.keep=9")
    train(source)
    often = ["checkpoint.steps=1", "checkpoint.keep=1"]  # which leave nothing of the beginning but on purpose
    job = branch_of(source, tmp_path / "branch", "optimizer.lr=0.001", *often, at=4)
    train(job)
    shutil.rmtree(source.run.folder)
    follower = follower_of(job, tmp_path / "follower")
    api.train(follower, follow=job.run.folder)
    assert_bitwise_equal(follower, job)
    again = follower_of(follower, tmp_path / "again")  # who follows it keeps the beginning, too
    api.train(again, follow=follower.run.folder)
    assert_bitwise_equal(again, job)
    shutil.rmtree(Path(job.run.folder) / "checkpoints" / "step-00000004")
    late = follower_of(job, tmp_path / "late")
    with pytest.raises(UserError, match=r"began from .*source@4, and neither has its checkpoint of step 4"):
        api.train(late, follow=job.run.folder)


def test_a_branch_of_the_end_is_longer_and_another_one_has_other_data(
    small_job: Make, tmp_path: Path, corpus: Path
) -> None:
    source = small_job("source", *COMMON)
    train(source)
    with pytest.raises(
        UserError, match=r"@12: nothing is left to learn there; give the branch run.steps above 12"
    ):
        branch_of(source, tmp_path / "none")
    longer = branch_of(source, tmp_path / "longer", "run.steps=20", "optimizer.lr=0.001")
    run = train(longer)
    assert sorted(run.loss) == list(range(12, 20)) and factors(longer)[12] == pytest.approx(1 / 3)
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts)
    (texts / "more.txt").write_text("other words come here " * 40)
    other = branch_of(source, tmp_path / "other", f"data.corpus={texts}", at=6)
    run = train(other)
    assert sorted(run.loss) == list(range(6, 12)) and other.data.folder != source.data.folder
    assert run.loss != {s: v for s, v in run_of(source).loss.items() if s >= 6}
    follower = api.resolve(
        api.load_job(tmp_path / "longer" / "job.toml", [f"run.folder={tmp_path / 'again'}"], exact=True),
        exact=True,
    )
    train_in_processes(follower, follow=tmp_path / "longer")
    assert run_of(follower).loss == run_of(longer).loss


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["run.branch_from={}@5"],
            r"@5: there is no checkpoint of step 5; there are 6, 12; did you mean '.*@6'\?",
        ),
        (["run.branch_from={}/nothing"], "the folder of a run, or FOLDER@STEP; there is none"),
        (["run.branch_from={}@6x"], "'6x' is no step of .*; there are 6, 12"),
        (["run.branch_from={}r"], "there is none; did you mean '.*'"),
        (["run.branch_from={}r@6"], "there is none; did you mean '.*@6'"),
        (["run.branch_from={}/checkpoints/step-00000006"], "a checkpoint; FOLDER@STEP; did you mean '.*@6'"),
        (["run.folder={}", "run.branch_from={}@6"], "a branch is a run of its own: another run.folder, or"),
        (["run.branch_from={}@6", "model.hidden_size=64"], "hidden_size: 32, 64; that takes a new run"),
        (
            ["run.branch_from={}@6", "optimizer.name=adamw"],
            "optimizer.name: 'muon', 'adamw'; that takes a new",
        ),
        (["run.branch_from={}@6", "run.steps=5"], "run.steps=5: the run has taken 6 steps already"),
        (
            ["run.folder={}", "run.seed=1"],
            r"run.seed: 0, 1; that takes a new run, or a branch of this one: run.br",
        ),
        (
            ["run.folder={}", "run.steps=12", "optimizer.lr=0.1"],
            "finished after 12 steps, so nothing is left",
        ),
        (
            ["run.folder={}", "run.steps=11"],
            "run.steps=11: the run has taken 12 steps already; more than that",
        ),
        (
            ["run.folder={}", "run.steps=20", "data.seq_len=64"],
            "data.seq_len=64: longer than model.max_seq_len=32",
        ),
        (
            ["run.folder={}", "run.steps=20", "run.batch_schedule=[[0,5]]"],
            r"is another for the 6 steps that were",
        ),
        (
            ["run.folder={}", "run.steps=20", "data.skip=[[3,9]]"],
            r"data.skip=\[\[3, 9\]\]: is another for the 6",
        ),
        (["run.folder={}", "run.steps=20", "data.weights=[1,2]"], "2, and 1 in data.corpus"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    words: list[str], said: str, small_job: Make, finished: Job
) -> None:
    before = tree(Path(finished.run.folder))
    with pytest.raises(UserError, match=said):
        api.resolve(load_job(None, [word.format(finished.run.folder) for word in words]))
    assert tree(Path(finished.run.folder)) == before


def test_a_branch_of_a_run_without_a_whole_checkpoint_says_so(finished: Job, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(finished.run.folder, run)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("null")
    with pytest.raises(DamagedCheckpoint, match=r"no checkpoint in .* is whole; .*manifest.json changed"):
        api.resolve(load_job(None, [f"run.branch_from={run}", "run.steps=20"]))


@pytest.mark.parametrize("file", ["pieces-00000.safetensors", "manifest.json", "COMMITTED"])
def test_a_damaged_checkpoint_is_no_beginning_and_a_whole_one_is_named(
    file: str, finished: Job, tmp_path: Path
) -> None:
    run, new = tmp_path / "damaged", tmp_path / "new"
    shutil.copytree(finished.run.folder, run)
    place = run / "checkpoints" / "step-00000012" / file
    data = bytearray(place.read_bytes())
    data[-20] ^= 1
    place.write_bytes(data)
    for said, which in ((run, "its newest checkpoint"), (f"{run}@12", "the checkpoint")):
        with pytest.raises(UserError, match=rf"{which}, of step 12, is damaged \(.*{file}.*{run}@6$"):
            api.train(load_job(None, [f"run.branch_from={said}", "run.steps=20", f"run.folder={new}"]))
    assert not new.exists()
    whole = Path(finished.run.folder) / "checkpoints" / place.parent.name
    assert check_beginning(run, f"{finished.run.folder}@12") == whole
    with pytest.raises(UserError, match=rf"neither has a whole checkpoint of step 12 any more \(.*{file}"):
        check_beginning(run, f"{run}@12")


@pytest.mark.parametrize(
    ("words", "recomputed"),
    [
        (["layout.recompute_layers=1"], ("full", 1)),
        (["layout.activation_gib=1e-9"], "with every layer recomputed, .* still take"),
        (["layout.recompute_layers=1", "layout.recompute=none"], "under layout.recompute=none no layer is"),
        (["layout.activation_gib=1e-9", "layout.recompute=none"], "layout.recompute=none: layout.activation"),
    ],
)
def test_a_run_that_goes_on_takes_the_memory_that_it_is_given(
    words: list[str], recomputed: tuple[str, int] | str, finished: Job
) -> None:
    if isinstance(recomputed, str):
        with pytest.raises(UserError, match=recomputed):
            going_on(finished, *words)
    else:
        layout = going_on(finished, *words).layout
        assert (layout.recompute, layout.recompute_layers) == recomputed


def test_what_is_said_again_is_not_derived_anew(finished: Job) -> None:
    """Each of these was derived when the run began; the word beside it would have it derived again."""
    job = going_on(
        finished, "layout.recompute_layers=1", "layout.recompute=selective", "layout.micro_batch=4"
    )
    assert (job.layout.recompute, job.layout.micro_batch) == ("selective", 4)
    words = ["run.steps=20", "optimizer.lr=0.001"]
    rates = [going_on(finished, *words, *more).optimizer for more in ([], ["optimizer.matrix_lr=0.003"])]
    assert [(rate.lr, rate.matrix_lr) for rate in rates] == [(0.001, 0.001), (0.001, 0.003)]
    with pytest.raises(UserError, match=r"layout.micro_batch=4: .*more than a rank's share"):
        going_on(finished, "run.steps=20", "run.global_batch=3", "layout.micro_batch=4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path, shards: Path) -> Job:
    from tests.trainer.conftest import SMALL

    places = [f"data.corpus={corpus}", f"data.folder={shards}"]
    folder = tmp_path_factory.mktemp("finished") / "run"
    job = api.resolve(load_job(None, [*SMALL, *COMMON, *places, f"run.folder={folder}"]))
    train(job)
    return job


def test_what_is_seen_of_a_change(small_job: Make) -> None:
    """In the log of lines, the report and the summary."""
    from colossus.monitor import summary

    job = small_job("run", *COMMON)
    train(job)
    heard: list[dict[str, Any]] = []
    api.train(going_on(job, "run.steps=20", "optimizer.lr=0.001"), listeners=[heard.append])
    said = "run.steps 12 to 20, optimizer.lr 0.003 to 0.001"
    folder = Path(job.run.folder)
    assert said in (folder / "log.txt").read_text() and said in (folder / "report.html").read_text()
    assert f"From step 6 on: {said}" in summary(folder)


def test_made_longer_on_two_ranks(small_job: Make) -> None:
    ranks = [*COMMON, "layout.dp_shard=2"]
    job, whole = small_job("run", *ranks), small_job("whole", *ranks, "run.steps=16")
    assert train_in_processes(whole) == [0, 0]
    assert train_in_processes(job) == [0, 0]
    assert train_in_processes(going_on(job, "run.steps=16")) == [0, 0]
    assert_bitwise_equal(job, whole)
