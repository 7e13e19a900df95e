"""What a person gets wrong is one line with the nearest valid name, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossus.cli.words import split
from tests.cli.commands import colossus

MISTAKES = [
    (["train", "rnu.minutes=5"], "section=rnu: no such section; one of model, data, optimizer, layout, "),
    (["train", "run.minuts=5"], "did you mean 'run.minutes'?"),
    (["train", "data.hidden_size=5"], "did you mean 'model.hidden_size'?"),
    (["train", "model=lama3.2-1b"], "did you mean 'llama3.2-1b'?"),
    (["train", "layout=fast"], "layout=fast: no such preset; one of auto"),
    (["train", "run=fast"], "no presets of 'run' exist"),
    (
        ["train", "precision.type=bf61"],
        "precision.type=bf61: must be 'fp32', 'bf16' or 'fp64'; did you mean 'bf16'?",
    ),
    (["train", "run.minuts=" + 300 * "5"], "did you mean 'run.minutes'?"),
    (["train", "run.steps=-3"], "run.steps=-3: must be greater than or equal to 1"),
    (["train", "run.steps=many"], "run.steps=many: must be a whole number"),
    (["train", "run.steps=true"], "run.steps=true: must not be true or false"),
    (["train", "optimizer.lr=nan"], "optimizer.lr=nan: must be a finite number"),
    (["train", "run.minutes=1e30"], "run.minutes=1e+30: must be less than or equal to 10000000"),
    (["train", "run.minutes=5", "run.steps=7"], "run.minutes and run.steps: give one of "),
    (["train", "job.toml"], "job file=job.toml: no such file"),
    (["train", "jobs.toml", "other.toml"], "one job at a time"),
    (["train", "--exact"], "--exact: name the job.toml of the run to follow"),
    (["train", "--drye"], "No such option: --drye"),
    (["trian"], "No such command 'trian'. Did you mean 'train'?"),
    (["generate"], "Missing argument 'path'"),
    (["generate", "no-run", "def "], "no-run"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    done = colossus(*words, folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_mistakes_in_a_file_are_told_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text("[run\n")
    done = colossus("train", str(path))
    assert done.returncode == 2 and f"job file {path}: not TOML" in done.stderr
    path.write_text("[run]\nstpes = 3\n")
    done = colossus("train", str(path))
    assert done.returncode == 2 and "run.stpes: no such field" in done.stderr


def test_what_is_a_value_and_what_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value may be longer than the name of any file, and stays one beside a file of its name."""
    monkeypatch.chdir(tmp_path)
    prompt = "run.prompt=" + "def " * 100
    for name in ("run.steps=3", "lr=0.1.toml"):
        Path(name).touch()
    assert split([prompt, "run.steps=3", "model=lama"]) == (None, [prompt, "run.steps=3", "model=lama"])
    assert split(["lr=0.1.toml", "run.steps=3"]) == (Path("lr=0.1.toml"), ["run.steps=3"])


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    done = colossus("train", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path}: not the folder of a run")
