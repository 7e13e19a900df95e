"""What is only shown of a run costs it neither its steps nor its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from colossus import api
from colossus.cli import main
from colossus.job import Job, to_toml
from colossus.trainer.hooks import Hook
from colossus.trainer.run import Run
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training
from tests.trainer.running import kept_machine
from tests.trainer.test_folder import MakeFolder

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., Job]


@pytest.fixture
def words_only(tmp_path: Path, corpus: Path) -> Path:
    """A tokenizer of whole words: none of its tokens begins with a blank."""
    found = sorted({word for path in corpus.iterdir() for word in path.read_text().split()})
    vocabulary = {word: index for index, word in enumerate(["<unk>", "</s>", "The", *found])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_without_tokens_that_begin_with_a_blank(
    words_only: Path, small_job: Make, tmp_path: Path
) -> None:
    job = small_job("run", f"data.tokenizer={words_only}", f"data.folder={tmp_path / 'own'}", "run.steps=2")
    run = api.train(job)
    assert run.outcome == "finished"
    (sample,) = run.events("sample")
    assert sample["prompt"] == "The " and sample["text"]


class Ruin(Hook):
    """Leaves weights that predict nothing finite: of these no token can be drawn."""

    def after_step(self, training: Training, result: StepResult) -> None:
        if training.horizon.done(training.step):
            with torch.no_grad():
                training.state.model.norm.weight.fill_(float("nan"))


def test_a_sample_that_cannot_be_drawn(small_job: Make, caplog: pytest.LogCaptureFixture) -> None:
    run = api.train(small_job("run", "run.steps=2"), [Ruin()])
    assert run.outcome == "finished" and run.events("sample") == []
    assert "the run is finished; no sample of what it writes: " in caplog.text
    assert (run.folder / "report.html").is_file()


def test_a_report_that_could_not_be_written_is_written_when_the_run_is_shown_again(
    small_job: Make, caplog: pytest.LogCaptureFixture
) -> None:
    job = small_job("run", "run.steps=4")
    folder = Path(job.run.folder)
    assert api.train(job, [MakeFolder("report.html.part")]).outcome == "finished"
    assert f"{folder / 'report.html'}: cannot be written (Is a directory)" in caplog.text
    assert not (folder / "report.html").exists()
    (folder / "report.html.part").rmdir()
    api.train(job)
    assert "finished" in (folder / "report.html").read_text()


def test_views_that_raise(small_job: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A bug in any of them is said, and the command ends as its run did."""

    def fail(*_: Any) -> None:
        raise KeyError("a bug")

    for name in ("colossus.monitor.LiveView.show", "colossus.monitor.log.LogText.show"):
        monkeypatch.setattr(name, fail)
    for name in ("colossus.monitor.summary", "colossus.monitor.report.render"):
        monkeypatch.setattr(name, fail)
    job = small_job("run", "run.steps=2")
    (tmp_path / "asked.toml").write_text(to_toml(job))
    assert main(["train", str(tmp_path / "asked.toml"), f"run.folder={job.run.folder}"]) == 0
    assert Run(Path(job.run.folder)).outcome == "finished"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written(small_job: Make, tmp_path: Path) -> None:
    job = small_job("run", "run.steps=2")
    (tmp_path / "asked.toml").write_text(to_toml(job))
    command = [sys.executable, "-m", "colossus", "train", str(tmp_path / "asked.toml")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*command, f"run.folder={job.run.folder}"],
            env=os.environ | {"COLOSSUS_CACHE": kept_machine(), "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert Run(Path(job.run.folder)).outcome == "finished"
