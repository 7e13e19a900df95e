"""A run beside its dry run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import colossus
from colossus.cli import main
from colossus.errors import UserError
from colossus.events import read_events
from tests.cli.commands import colossus as run_command
from tests.cli.test_train import small_words
from tests.trainer.running import kept_machine


def test_what_a_run_measured_stands_beside_what_was_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLOSSUS_CACHE", kept_machine())  # to measure the machine takes memory, too
    words = [*small_words(tmp_path), "run.steps=6", "layout.compile=false", "model.hidden_size=128"]
    done = run_command(*words)  # in a process of its own: its memory is the run's alone
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    made = colossus.compare(run)
    rows = {row.what: row for row in made.rows}
    speeds = [e["tokens_per_second"] for e in read_events(run) if e["kind"] == "step"]
    measured = rows["tokens/s"].measured
    assert measured is not None
    assert min(speeds) <= measured <= max(speeds)
    saved = rows["a checkpoint"]
    assert saved.measured == pytest.approx(saved.predicted, rel=0.05)  # and what describes it
    step, host = rows["a step"], rows["host memory of rank 0, the most"]
    assert step.measured is not None and step.predicted > 0  # the machine may be busy, and steps are of ms
    assert host.measured is not None and 0.3 < host.measured / host.predicted < 3
    capsys.readouterr()
    assert main(["dryrun", f"--compare={run}"]) == 0
    said = capsys.readouterr().out
    assert all(row.what in said for row in made.rows) and "messages: a run records none" in said
    assert "bound from above" not in said
    assert main(["dryrun", f"--compare={run}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["what"] for row in found["compared"]} == set(rows)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        colossus.compare(tmp_path)
    assert main(["dryrun", f"--compare={tmp_path}", "layout.tp=2"]) == 2
    assert "takes the run's own job" in capsys.readouterr().err
