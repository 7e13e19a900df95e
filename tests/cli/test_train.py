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


def test_a_reader_that_leaves_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for n in range(20):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"def f{n}(x): return x + {n}\n" * 10)
    places = [f"data.corpus={tmp_path / 'texts'}", f"data.folder={tmp_path / 'data'}"]
    words = ["train", *SMALL, *places, f"run.folder={tmp_path / 'run'}"]
    command = shlex.join([sys.executable, "-m", "colossus", *words])
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
