"""Hooks that a job names, as `package.module:Name`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from colossus import api
from colossus.cli import main
from colossus.errors import UserError
from colossus.trainer.hooks import Hook
from colossus.trainer.run import Run
from tests.trainer.conftest import SMALL
from tests.trainer.test_hooks import Make, Tell

WATCH = """
from colossus.trainer.hooks import Hook

class Watch(Hook):
    def on_finish(self, training):
        training.event("note", text=f"rank {training.world.rank} of {training.world.size}")

class Other(Watch):
    pass

class Stop(Hook):
    def after_step(self, training, result):
        training.ask_to_stop("asked")

def no_hook():
    return {}
"""


@pytest.fixture(autouse=True)
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user in the current folder, which is not on the path."""
    (tmp_path / "kept_watch.py").write_text(WATCH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "kept_watch", raising=False)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_named_hook_is_called(ranks: int, small_job: Make) -> None:
    job = small_job("run", "run.hooks=kept_watch:Watch", "run.steps=2", f"layout.dp_shard={ranks}")
    run = api.train(job)
    assert [event["text"] for event in run.events("note")] == [f"rank 0 of {ranks}"]


def test_named_hooks_come_before_those_of_python(small_job: Make) -> None:
    calls: list[tuple[str, str, int]] = []

    class Last(Hook):
        def on_finish(self, training: object) -> None:  # in reverse: before the named ones
            calls.append(("last", "finish", 0))

    job = small_job("run", "run.hooks=[kept_watch:Watch, kept_watch:Other]", "run.steps=1")
    run = api.train(job, [Tell("mine", calls), Last()])
    assert calls[-2:] == [("last", "finish", 0), ("mine", "finish", 1)]
    assert len(run.events("note")) == 2


def test_a_run_that_goes_on_may_be_watched_otherwise(small_job: Make) -> None:
    api.train(small_job("run", "run.steps=2"), [_Stop()])
    run = api.train(small_job("run", "run.steps=2", "run.hooks=kept_watch:Watch"))
    assert run.outcome == "finished" and run.events("note")


def test_a_hook_that_stops_the_run_fails_nothing(
    corpus: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"data.corpus={corpus}", f"data.folder={shards}", "run.folder=run"]
    assert main(["train", *SMALL, *places, "run.hooks=kept_watch:Stop"]) == 0
    assert Run(Path("run")).outcome == "asked"
    said = capsys.readouterr().out
    assert "stopped by a hook after 1 step; what was learned is saved" in said
    assert "(stopped by a hook)" in said


class _Stop(Hook):
    def after_step(self, training: object, result: object) -> None:
        training.ask_to_stop("asked")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kept_watch:Wtach", r"kept_watch has no such callable; did you mean 'kept_watch:Watch'\?"),
        ("kept_watch", r"run\.hooks=kept_watch: must be package\.module:Name"),
        ("nowhere:Watch", r"run\.hooks=nowhere:Watch: cannot be imported \(No module named 'nowhere'\)"),
        ("kept_watch:no_hook", r"gives a dict; must give a colossus\.trainer\.hooks\.Hook"),
    ],
)
def test_a_hook_that_cannot_be(name: str, message: str, small_job: Make) -> None:
    with pytest.raises(UserError, match=message):
        api.train(small_job("run", f"run.hooks={name}"))


@pytest.mark.parametrize(("hook", "said"), [(print, "a builtin"), (Hook, "the class Hook"), ({}, "a dict")])
def test_what_is_no_hook_is_refused_before_anything_starts(hook: object, said: str, small_job: Make) -> None:
    job = small_job("run", "run.steps=1")
    with pytest.raises(UserError, match=f"hooks: {said}.*; each must be an object of a colossus.trainer"):
        api.train(job, hooks=[hook])
    assert not Path(job.run.folder).exists()
