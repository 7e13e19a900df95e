"""`colossus train` in several processes that torchrun, or its variables, made the ranks of a job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from colossus.cli import main
from colossus.trainer.run import Run
from tests.cli.commands import ROOT
from tests.cli.test_train import small_words
from tests.parallel.real_ranks import in_ranks
from tests.trainer.running import kept_machine

KILL = """
import os
import signal
from pathlib import Path

from colossus.trainer.hooks import Hook


class Kill(Hook):
    def before_step(self, training):
        mark = Path(f"killed-{training.step}")
        if training.step in (6, 10) and not mark.exists():
            training.saver.wait()
            training.world.sum([0.0])
            if training.world.rank == (training.step == 6):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
"""


def command(words: list[str], folder: Path, cache: str) -> dict[str, Any]:
    """What one rank answers, prints and does of what one alone should do."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    os.environ["COLOSSUS_CACHE"] = cache
    from colossus import api
    from colossus.measure import machine

    done: list[str] = []

    def noted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def note(*arguments: Any, **named: Any) -> Any:
            done.append(name)
            return real(*arguments, **named)

        setattr(module, name, note)

    for module, name in ((api, "load_job"), (api, "resolve"), (machine, "measure_machine")):
        noted(module, name)
    said = folder / f"said-{os.environ['RANK']}"
    with said.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
        code = main(words)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    return {"code": code, "done": done, "said": said.read_text().splitlines()}


def test_the_first_rank_alone_measures_resolves_and_prints(tmp_path: Path) -> None:
    words = [*small_words(tmp_path), "run.steps=2", "layout.dp_shard=2"]
    first, other = in_ranks(2, command, words, tmp_path, str(tmp_path / "no-cache"))
    assert (first["code"], other) == (0, {"code": 0, "done": [], "said": []})
    assert first["done"] == ["load_job", "resolve", "measure_machine"]
    assert sum(line.startswith("model ") for line in first["said"]) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["run.stepz=3"], "error: run.stepz: no such field; run has"),
        (["layout.dp_shard=2", "--exact"], "error: --exact: name the job.toml of the run to follow"),
        (["--exacty"], "error: No such option: --exacty"),
        (["layout.dp_shard=2", "layout.ep=2"], "error: layout.ep=2: the model has no experts"),
        (["layout.dp_shard=4"], "error: layout: needs 4 ranks"),
    ],
)
def test_a_mistake_of_many_ranks_is_told_once(words: list[str], line: str, tmp_path: Path) -> None:
    ends = in_ranks(2, command, [*small_words(tmp_path), *words], tmp_path, kept_machine())
    assert [end["code"] for end in ends] == [2, 2]
    (said,) = [text for end in ends for text in end["said"]]
    assert said.startswith(line)


def test_a_rank_whose_peer_is_killed_says_a_line_and_ends_with_3(tmp_path: Path) -> None:
    (tmp_path / "kill_one.py").write_text(KILL)
    words = [*small_words(tmp_path), "layout.dp_shard=2", "run.hooks=kill_one:Kill"]
    first, gone = in_ranks(2, command, words, tmp_path, kept_machine(), lost={1})
    assert gone is None and first["code"] == 3
    assert [line for line in first["said"] if "error" in line.lower() or "Traceback" in line] == [
        "error: lost rank 1; 1 other ended with it; what is saved is whole, running again goes on"
    ]


def test_torchrun_goes_on_with_one_unnamed_run_over_restarts(tmp_path: Path) -> None:
    """Both ranks are killed in their turn; another start begins another run."""
    (tmp_path / "kill_one.py").write_text(KILL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [word for word in small_words(tmp_path) if not word.startswith("run.folder=")]
    words += ["run.steps=12", "layout.dp_shard=2", "run.hooks=kill_one:Kill"]
    for runs in (1, 2):
        done = subprocess.run(
            [*torchrun, "--max-restarts=3", "-m", "colossus", *words],
            env=os.environ | {"COLOSSUS_CACHE": kept_machine(), "PYTHONPATH": f"{ROOT}:{tmp_path}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / "runs").iterdir())) == runs
        if runs == 1:
            assert "Traceback" not in done.stderr
            assert [line.partition(";")[0] for line in done.stderr.splitlines() if "error:" in line] == [
                "error: lost rank 1",
                "error: lost rank 0",
            ]
    one, other = (Run(folder) for folder in sorted((tmp_path / "runs").iterdir()))
    assert [event["step"] for event in one.events("resume")] == [4, 8] and not other.events("resume")
    assert one.outcome == other.outcome == "finished" and one.loss == other.loss
    assert len(one.loss) == 12
