"""The folder of a run: made whole or not at all, held by one process, continued by the same job alone."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest

from colossus import api
from colossus.errors import MachineError, UserError
from colossus.job import Job, load_job
from colossus.trainer import folder as folders
from colossus.trainer.decisions import Decision, to_follow
from colossus.trainer.hooks import Hook
from colossus.trainer.run import Run
from colossus.trainer.training import Training
from tests.trainer.conftest import SMALL

Make = Callable[..., Job]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "shards" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "bytes.json").write_text("{}")
    return folder


def test_a_new_folder_is_a_run_once_its_job_is_there(
    small_job: Make, tmp_path: Path, tokenizer: Path
) -> None:
    job = small_job("run")
    folders.make(tmp_path / "run", job, tokenizer, to_follow([]))
    assert folders.is_run(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"job.toml", "tokenizer", "lock", "events.jsonl"}
    assert not load_job(tmp_path / "run" / "job.toml").differing(job)


def test_the_job_is_synced_and_takes_its_name_last(
    small_job: Make, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        sync(descriptor)
        order.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")

    def renamed(source: Path, target: Path) -> None:
        names = {path.name for path in target.parent.iterdir()}
        assert names == {"lock", "tokenizer", "events.jsonl", "job.toml.part"}
        rename(source, target)
        order.append("rename job.toml")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    folders.make(tmp_path / "run", small_job("run"), tokenizer, [Decision("a", 1, 0)])
    assert order == ["sync run", "sync events.jsonl", "sync job.toml.part", "rename job.toml", "sync run"]


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "tokenizer"], ["lock", "tokenizer", "events.jsonl"]])
def test_what_a_kill_left_of_a_folder_is_made_whole(
    left: list[str], small_job: Make, tmp_path: Path, tokenizer: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in left:
        (run / name).mkdir() if name == "tokenizer" else (run / name).write_text("torn")
    folders.make(run, small_job("run"), tokenizer, [Decision("a", 1, 0)])
    assert (run / "tokenizer" / "bytes.json").read_text() == "{}"
    assert [e["name"] for e in Run(run).events()] == ["a"]


def test_no_link_is_written_through(small_job: Make, tmp_path: Path, tokenizer: Path) -> None:
    """Of what a kill may have left, and what may be a link that somebody else put there."""
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir()
    (other / "bytes.json").write_text("precious")
    (run / "tokenizer").symlink_to(other)
    folders.make(run, small_job("run"), tokenizer)
    assert (run / "tokenizer" / "bytes.json").read_text() == "{}"
    (begun := tmp_path / "begun" / "tokenizer").mkdir(parents=True)
    (begun / "bytes.json").symlink_to(other / "bytes.json")
    folders.make(begun.parent, small_job("begun"), tokenizer)
    assert [path.name for path in other.iterdir()] == ["bytes.json"]
    assert (other / "bytes.json").read_text() == "precious"


def test_a_folder_with_other_things_is_refused(small_job: Make, tmp_path: Path, tokenizer: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"run\.folder=.*run: not empty, and not the folder of a run"):
        folders.make(run, small_job("run"), tokenizer)
    assert [p.name for p in run.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way(small_job: Make, tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(UserError, match="is a file, not a folder"):
            folders.make(tmp_path / place, small_job("run"), tokenizer)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(small_job: Make, tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(MachineError, match=r"cannot be written \(Permission denied\)"):
        folders.make(tmp_path / "closed" / "run", small_job("run"), tokenizer)


def test_a_place_that_cannot_be_written_for_anyone(small_job: Make, tokenizer: Path) -> None:
    with pytest.raises(MachineError, match=r"run\.folder=/proc/run: cannot be written"):
        folders.make(Path("/proc/run"), small_job("run"), tokenizer)


def test_names_count_up(small_job: Make, tmp_path: Path) -> None:
    job = small_job("run")
    first = folders.new_folder(job, tmp_path)
    assert re.fullmatch(rf"llama-[\d.]+k-{date.today().isoformat()}-1", first.name)
    assert first.is_dir()  # so that of two processes that ask at about the same time, each has its own
    assert folders.new_folder(job, tmp_path).name == first.name[:-1] + "2"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        folders.new_folder(job, tmp_path / "file")


def test_a_run_that_was_begun_meanwhile_keeps_its_job(
    small_job: Make, tmp_path: Path, tokenizer: Path
) -> None:
    run, job, other = tmp_path / "run", small_job("run"), small_job("run", "run.steps=5")
    folders.make(run, job, tokenizer)
    with pytest.raises(UserError, match=r"run\.folder=.*run: another run was begun in it meanwhile"):
        folders.make(run, other, tokenizer, [Decision("a", 1, 0)])
    assert not load_job(run / "job.toml").differing(job) and not (run / "events.jsonl").exists()


class StartAnother(Hook):
    """Tries to train in the folder while this run holds it."""

    def __init__(self, job: Job) -> None:
        self.job, self.message = job, ""

    def before_step(self, training: Training) -> None:
        if training.step == 2:
            with pytest.raises(UserError) as caught:
                api.train(self.job)
            self.message = str(caught.value)


def test_a_second_process_in_the_same_folder_is_told_who_is_there(small_job: Make) -> None:
    job = small_job("run", "run.steps=4")
    hook = StartAnother(job)
    assert api.train(job, [hook]).outcome == "finished"
    assert f"process {os.getpid()} is training in it" in hook.message
    with folders.locked(Path(job.run.folder)):
        pass  # and let go of


class MakeFolder(Hook):
    """Puts a folder in the way of a file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_start(self, training: Training) -> None:
        (training.folder / self.name).mkdir()


def again(job: Job, *overrides: str) -> Job:
    asked = load_job(None, [*SMALL, f"run.folder={job.run.folder}"])
    return api.resolve(load_job(None, [f"run.folder={job.run.folder}", *overrides])) if overrides else asked


def test_another_job_is_refused_with_the_fields_that_differ(small_job: Make) -> None:
    job = small_job("run", "run.steps=4")
    api.train(job)
    with pytest.raises(UserError) as caught:
        again(job, "run.seed=5", "optimizer.beta1=0.5", "optimizer.name=adamw", "layout.micro_batch=2")
    text = str(caught.value)
    assert text.startswith(f"run.folder={job.run.folder}: holds another job; differing (there, asked): ")
    assert "run.seed: 0, 5" in text and "optimizer.name: 'muon', 'adamw'" in text
    assert "layout" not in text and "beta1" not in text and text.endswith("; that takes a new run")


def test_how_it_is_spread_and_saved_may_change(small_job: Make) -> None:
    job = small_job("run", "run.steps=4")
    api.train(job)
    changed = again(job, "layout.dp_shard=2", "checkpoint.steps=1", "run.threads=2")
    assert (changed.layout.dp_shard, changed.checkpoint.steps, changed.run.threads) == (2, 1, 2)
    kept = {name.partition(":")[0] for name in changed.differing(job)}
    assert kept == {"layout.dp_shard", "layout.micro_batch", "checkpoint.steps", "run.threads"}
    assert changed.layout.micro_batch == 2  # derived again: half of the batch


def test_who_follows_a_run_exactly_may_change_what_its_next_attempt_may(
    small_job: Make, tmp_path: Path
) -> None:
    job = small_job("run", "run.steps=4")
    folder = Path(job.run.folder)
    folders.make(folder, job, api.train(small_job("other", "run.steps=1")).folder / "tokenizer")
    path = folder / "job.toml"
    with pytest.raises(UserError) as caught:
        api.load_job(path, ["run.steps=5", "optimizer.lr=0.003", "layout.dp_shard=2"], exact=True)
    assert str(caught.value) == (
        f"--exact: takes the steps of {folder}, which has another job; "
        "differing (there, asked): run.steps: 4, 5"
    )
    changes = ["layout.dp_shard=2", "checkpoint.steps=1", "run.folder=there"]
    changed = api.resolve(api.load_job(path, changes, exact=True), exact=True)
    names = {name.partition(":")[0] for name in changed.differing(job)}
    assert names == {"layout.dp_shard", "layout.micro_batch", "checkpoint.steps", "run.folder"}
    assert api.load_job(path, exact=True).run.folder is None


def test_a_finished_run_is_returned_as_it_is(small_job: Make) -> None:
    job = small_job("run", "run.steps=4")
    first = api.train(job)
    before = {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")}
    second = api.train(job)
    assert second == first and second.outcome == "finished"
    assert {p: p.stat().st_mtime_ns for p in first.folder.rglob("*")} == before
