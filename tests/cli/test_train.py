"""`colossus train` as a person runs it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from colossus.cli import main
from colossus.trainer.run import Run
from tests.cli.commands import ROOT
from tests.trainer.conftest import SMALL
from tests.trainer.running import kept_machine


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOSSUS_CACHE", kept_machine())


def small_words(folder: Path) -> list[str]:
    """To train a small model on texts that are written here."""
    (folder / "texts").mkdir()
    for n in range(20):
        (folder / "texts" / f"{n}.txt").write_text(f"def f{n}(x): return x + {n}\n" * 10)
    places = [f"data.corpus={folder / 'texts'}", f"data.folder={folder / 'data'}"]
    return ["train", *SMALL, *places, f"run.folder={folder / 'run'}"]


def test_a_reader_that_leaves_ends_no_run(tmp_path: Path) -> None:
    command = shlex.join([sys.executable, "-m", "colossus", *small_words(tmp_path)])
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("model ") and done.stdout.endswith("\n0\n")
    run = Run(tmp_path / "run")
    assert run.outcome == "finished" and len(run.loss) == 12
    assert (run.folder / run.events("checkpoint")[-1]["path"]).is_dir()
    assert "finished after 12 steps" in (run.folder / "log.txt").read_text()


def test_all_ranks_of_torchrun_end_well(tmp_path: Path) -> None:
    """Each is a command of its own; one of them writes how the run ended, and tells."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*small_words(tmp_path), "layout.dp_shard=2"]
    done = subprocess.run(
        [*torchrun, "-m", "colossus", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "run").outcome == "finished"
    assert done.stdout.count("try        colossus generate") == 1


STOPPING = """
from colossus.trainer.hooks import Hook


class Stop(Hook):
    def after_step(self, training, result):
        training.ask_to_stop("asked")
"""


def test_a_run_that_a_hook_stopped_is_not_finished_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stopping_early.py").write_text(STOPPING)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [*small_words(tmp_path), "run.hooks=stopping_early:Stop"]
    assert main(words) == 0
    assert "Not finished (stopped by a hook)." in capsys.readouterr().out
    assert main([word for word in words if not word.startswith("run.hooks")] + ["run.hooks=[]"]) == 0


STOPPED_AT = """
import os
import signal

from colossus.trainer.hooks import Hook


class First(Hook):
    step = 0

    def before_step(self, training):
        if training.step == self.step:
            training.state.model.norm.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))


class Third(First):
    step = 2
"""


@pytest.mark.parametrize(("hook", "code"), [("First", 3), ("Third", 143)])
def test_143_is_said_of_what_was_saved(
    hook: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first step may compile for long and is given up: nothing is saved then."""
    (tmp_path / "stopped_at.py").write_text(STOPPED_AT)
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*small_words(tmp_path), f"run.hooks=stopped_at:{hook}", "checkpoint.steps=0"]) == code
    run = Run(tmp_path / "run")
    assert run.outcome == "SIGTERM" and bool(run.events("checkpoint")) is run.is_saved is (code == 143)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code == 3) and all("before it was saved" in line for line in errors)
