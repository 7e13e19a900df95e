"""`colossus train` as a person runs it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
