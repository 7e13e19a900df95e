"""The public functions: reachable by name, whatever else was imported; light until they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import colossus
from colossus import api
from colossus.errors import UserError
from colossus.job import Job
from colossus.trainer.hooks import Hook
from colossus.trainer.step import StepResult
from colossus.trainer.training import Training
from tests.trainer.conftest import SMALL

ROOT = Path(__file__).resolve().parents[1]


def python(script: str) -> str:
    """What `script` prints in a process of its own."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_name_is_a_function_twice_after_importing_all_there_is() -> None:
    """A submodule that is named like a function would take its place at the first import."""
    out = python(
        "import importlib, pkgutil, colossus\n"
        "for twice in range(2):\n"
        "    for name in colossus.__all__:\n"
        "        function = getattr(colossus, name)\n"
        "        assert callable(function) and function.__module__ == 'colossus.api', name\n"
        "    modules = [m.name for m in pkgutil.walk_packages(colossus.__path__, 'colossus.')]\n"
        "    for module in modules:\n"
        "        if not module.endswith('__main__'):\n"
        "            try:\n"
        "                importlib.import_module(module)\n"
        "            except ModuleNotFoundError as error:\n"
        "                assert error.name.partition('.')[0] == 'lm_eval', error  # an extra\n"
        "print(*modules)\n"
    )
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "colossus").rglob("*.py"))
    every = {".".join(part for part in file.parts if part != "__init__") for file in files}
    assert set(out.split()) == every - {"colossus"}  # else a folder lacks its __init__.py


def test_no_module_is_named_like_a_public_function() -> None:
    names = {path.stem for path in (ROOT / "colossus").iterdir()}
    assert not names & set(colossus.__all__)


def test_public_names_are_listed_and_others_refused() -> None:
    assert {*colossus.__all__, "__version__"} <= set(dir(colossus))
    for name in colossus.__all__:
        assert getattr(colossus, name) is getattr(api, name) and getattr(colossus, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = colossus.tarin


def test_loading_a_job_needs_no_torch() -> None:
    script = (
        "import sys, colossus; colossus.load_job(None, ['model=llama3.2-1b']); print('torch' in sys.modules)"
    )
    assert python(script) == "False\n"


def test_a_job_by_a_file_and_by_the_folder_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    job = colossus.load_job(None, ["run.steps=3", "run.folder=elsewhere"]).derive(**{"run.seed": 7})
    assert colossus.load_job(None, ["run.steps=3"]) == colossus.load_job(overrides=["run.steps=3"])
    from colossus.job import save_job

    save_job(Job(**{**vars(job), "made": {"processor": "x"}}), run / "job.toml")
    goes_on = colossus.load_job(run)
    assert goes_on.run.folder == str(run) and goes_on.run.seed == 7
    starts = colossus.load_job(run / "job.toml")
    assert starts.run.folder is None and starts.run.steps == 3
    changed = colossus.load_job(run / "job.toml", ["run.steps=4"])
    assert changed.run.seed is None and changed.run.steps == 4  # what was derived is derived again
    elsewhere = colossus.load_job(run / "job.toml", ["run.folder=there"])
    assert elsewhere.run.folder == "there" and elsewhere.run.seed == 7  # nothing derived depends on it
    with pytest.raises(UserError, match="not the folder of a run"):
        colossus.load_job(tmp_path)


def test_what_another_machine_derived_is_derived_again() -> None:
    job = api.resolve(colossus.load_job(None, [*SMALL, "data.corpus=python"]).without("run.threads"))
    moved = job.put({"run.threads": 61}, "derived")
    assert api.resolve(moved).run.threads == 61  # of this machine it is kept
    elsewhere = Job(**{**vars(moved), "made": {**moved.made, "processor": "another"}})
    assert api.resolve(elsewhere).run.threads == job.run.threads


class Count(Hook):
    """A user's hook."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_step(self, training: Training, result: StepResult) -> None:
        self.losses.append(result.loss)


def test_from_text_to_text_twice(tmp_path: Path) -> None:
    """Trains with a hook, loads the run and one of its checkpoints, generates: each function twice."""
    (tmp_path / "texts").mkdir()
    for n in range(20):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"def f{n}(x): return x + {n}\n" * 10)
    places = [f"data.corpus={tmp_path / 'texts'}", f"data.folder={tmp_path / 'data'}"]
    settings = [s for s in SMALL if not s.startswith("run.steps=")]
    runs = []
    for name in ("one", "two"):
        hook = Count()
        job = colossus.load_job(None, [*settings, *places, "run.steps=8", f"run.folder={tmp_path / name}"])
        runs.append(colossus.train(job, hooks=[hook]))
        assert runs[-1].outcome == "finished" and list(runs[-1].loss.values()) == hook.losses
        assert len(hook.losses) == 8 and hook.losses[-1] < hook.losses[0]
    one, two = runs
    assert one.loss == two.loss and one.bits_per_byte == two.bits_per_byte
    assert {p.name for p in one.folder.iterdir()} >= {
        "job.toml",
        "events.jsonl",
        "checkpoints",
        "report.html",
        "log.txt",
    }
    assert [e["text"] for e in one.events("sample")] == [e["text"] for e in two.events("sample")]

    texts = []
    for path in (one.folder, one.folder / "checkpoints" / "step-00000008", two.folder):
        model, tokenizer = colossus.load_model(path)
        logits_BTV = model(torch.tensor([tokenizer.encode("def ")]))
        assert logits_BTV.shape[-1] == tokenizer.vocab_size
        texts.append(colossus.generate(model, tokenizer, ["def ", "x"], max_tokens=8, temperature=0.0))
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 2 and all(texts[0])
    untouched, again = (one.folder / "events.jsonl").read_bytes(), Count()
    resumed = colossus.train(colossus.load_job(one.folder), hooks=[again])
    assert resumed.folder == one.folder and resumed.loss == one.loss and not again.losses
    assert (one.folder / "events.jsonl").read_bytes() == untouched  # nothing was begun
