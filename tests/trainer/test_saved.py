"""What a stranger's checkpoints (with right checksums) and logs say of their run, and no run says."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colossus import api
from colossus.checkpoints.format import DamagedCheckpoint, committed_line, read_serial
from colossus.checkpoints.pieces import read_manifest
from colossus.cli import main
from colossus.data.shards import replace_synced
from colossus.errors import MachineError
from colossus.events import EventLog
from colossus.job import Job
from colossus.monitor.log import LogText
from colossus.monitor.report import write_report
from colossus.trainer.folder import locked
from colossus.trainer.going_on import Standing
from colossus.trainer.run import Run
from colossus.trainer.saved import saved_decisions
from tests.trainer.conftest import SMALL
from tests.trainer.running import run_of

Make = Callable[..., Job]
Meta = dict[str, Any]


def decision(meta: Meta, name: str) -> Meta:
    found: Meta = next(d for d in meta["decisions"] if d["name"] == name)
    return found


def setting(name: str, value: Any) -> Callable[[Meta], Any]:
    return lambda meta: meta.update({name: value})


def lacking(name: str) -> Callable[[Meta], Any]:
    return lambda meta: meta.pop(name)


def value_of(name: str, value: Any) -> Callable[[Meta], Any]:
    return lambda meta: decision(meta, name).update(value=value)


def part_of(name: str, part: str, value: Any) -> Callable[[Meta], Any]:
    return lambda meta: decision(meta, name)["value"].update({part: value})


def added(name: str, value: Any) -> Callable[[Meta], Any]:
    return lambda meta: meta["decisions"].append({"name": name, "value": value, "first_step": 3})


COUNTS = ("step", "optimizer_steps", "sample")
WRONG = (None, "12", 12.0, True, -1, 2**63, 10**30, [12], {})
CHANGES: dict[str, Callable[[Meta], Any]] = {
    **{f"no {name}": lacking(name) for name in (*COUNTS, "decisions")},
    **{f"{name} is {value!r}": setting(name, value) for name in COUNTS for value in WRONG},
    "another step": setting("step", 11),
    "more updates than steps": setting("optimizer_steps", 13),
    **{f"decisions are {v!r}": setting("decisions", v) for v in (None, "x", 5, {}, [5], [None], [[]], [{}])},
    **{f"a decision without {key}": (lambda m, k=key: m["decisions"][0].pop(k)) for key in ("name", "value")},
    "a decision of no step": lambda meta: meta["decisions"][0].pop("first_step"),
    "a decision of an earlier step than 0": lambda meta: meta["decisions"][0].update(first_step=-1),
    "a decision without a name": lambda meta: meta["decisions"][0].update(name=["machine"]),
    **{f"machine is {value!r}": value_of("machine", value) for value in (None, [], "x", {})},
    **{f"{value!r} threads": part_of("machine", "threads", value) for value in (None, 0, -2, 2**40, "1")},
    "ranks of text": part_of("machine", "ranks", "two"),
    "a type of a number": part_of("machine", "type", 32),
    **{f"phases are {value!r}": value_of("phases", value) for value in (None, 5, [5], [{}])},
    "phases with a part of their own": lambda meta: decision(meta, "phases")["value"][0].update(own=1),
    **{
        f"a change to {value!r}": added("change", value)
        for value in (None, 5, {}, {"before": {}, "after": {}})
    },
    **{
        f"a change to {after}": added("change", {"before": {}, "after": after, "rewarm": False})
        for after in (
            {"run.hooks": ["evil:run"]},
            {"data.corpus": ["evil:run"]},
            {"run.folder": "/elsewhere"},
            {"foo.bar": 1},
            {"optimizer.lr": "quick"},
            {"run.batch_schedule": [[1, 2]]},
        )
    },
    "a change from code": added("change", {"before": {"run.hooks": ["a:b"]}, "after": {}, "rewarm": False}),
    "a change of a list": added("change", {"before": [], "after": {}, "rewarm": False}),
    **{
        f"a decay of {value!r}": added("decay", value)
        for value in (None, {}, {"begin_step": 1, "end_step": 2})
    },
    "shares of text": added("shares", "12"),
    "documents of text": added("final_documents", "all"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    settings = [*SMALL, f"data.corpus={corpus}", f"data.folder={folder.parent / 'shards'}"]
    api.train(api.resolve(api.load_job(None, [*settings, f"run.folder={folder}"])))
    log = folder / "events.jsonl"  # as if it was killed after its last save
    lines = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["kind"] != "end"]
    log.write_text("".join(lines))
    return folder


def change_newest(folder: Path, change: Callable[[Meta], Any]) -> Path:
    path = folder / "checkpoints" / "step-00000012"
    tree = json.loads((path / "manifest.json").read_bytes())
    change(tree["meta"])
    data = json.dumps(tree).encode()
    line = committed_line(read_serial(path), data)
    (path / "manifest.json").write_bytes(data)
    (path / "COMMITTED").write_text(line)
    return path


def test_what_a_run_saves_is_taken(trained: Path) -> None:
    path = trained / "checkpoints" / "step-00000012"
    names = [d["name"] for d in saved_decisions(path, read_manifest(path))]
    assert {"machine", "phases"} <= set(names)


@pytest.mark.parametrize("kind", CHANGES)
def test_what_no_run_saves(kind: str, trained: Path) -> None:
    path = trained / "checkpoints" / "step-00000012"
    manifest = read_manifest(path)
    meta = copy.deepcopy(manifest.meta)
    CHANGES[kind](meta)
    with pytest.raises(
        DamagedCheckpoint, match=r"step-00000012: its manifest says what no run of step 12 saves: "
    ) as e:
        saved_decisions(path, dataclasses.replace(manifest, meta=meta))
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize("kind", ["no decisions", "step is 12.0", "-2 threads"])
def test_an_older_checkpoint_is_gone_on_from(
    kind: str, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    change_newest(folder, CHANGES[kind])
    assert Standing.of(folder).damage is not None
    job = api.resolve(api.load_job(folder / "job.toml", [f"run.folder={folder}"]))
    assert api.train(job).outcome == "finished"
    assert [e["step"] for e in run_of(job).events("resume")] == [8]
    (said,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert "step-00000012" in said and "no run of step 12 saves" in said


def test_no_other_is_there(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    change_newest(folder, CHANGES["optimizer_steps is -1"])
    for name in ("step-00000006", "step-00000008"):
        shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
    with pytest.raises(MachineError, match=r"no checkpoint in .* is whole; .*optimizer_steps=-1"):
        api.train(api.resolve(api.load_job(folder / "job.toml", [f"run.folder={folder}"])))


CODE = """
from pathlib import Path
Path({told!r}).touch()
def run(*args):
    raise SystemExit(9)
"""


def logged(name: Any, value: Any, first_step: Any = 12, **envelope: Any) -> str:
    event = {"attempt": 0, "run_seconds": 9.0, "kind": "decision", "step": 12, "name": name} | envelope
    return json.dumps(event | {"value": value, "first_step": first_step}) + "\n"


def changing(after: Any) -> str:
    return logged("change", {"before": {}, "after": after, "rewarm": False})


LINES = {
    "hooks": changing({"run.hooks": ["evil:run"]}),
    "a corpus": changing({"data.corpus": ["evil:run"]}),
    "no such field": changing({"foo.bar": 1}),
    "no rate": changing({"optimizer.lr": "quick"}),
    "a change of 5": logged("change", 5),
    "a change of nothing": logged("change", {}),
    "text for a step": logged("machine", None, "x"),
    "a machine of text": logged("machine", "x"),
    "phases of lists": logged("phases", [[1]]),
    "no name": '{"attempt":0,"run_seconds":9,"kind":"decision","step":1}\n',
    "an attempt of text": logged("shares", [1], attempt="q"),
    "no seconds": logged("shares", [1], run_seconds="nan"),
    "endless seconds": '{"attempt":0,"run_seconds":1e400,"kind":"step"}\n',
    "a step of text": logged("shares", [1], step="x"),
}


@pytest.mark.parametrize("kind", LINES)
def test_what_no_log_says(
    kind: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names the file, whichever way the run is taken up; nothing of it is imported."""
    told = tmp_path / "imported"
    (tmp_path / "evil.py").write_text(CODE.format(told=str(told)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    shutil.copytree(trained, "s")
    with Path("s/events.jsonl").open("a") as log:
        log.write(LINES[kind])
    before = Path("s/job.toml").read_bytes()
    for words in (
        ["s"],
        ["s", "run.steps=40"],
        ["--dry", "s"],
        ["s/job.toml", "--exact", "run.folder=new"],
        ["run.branch_from=s@8", "run.steps=40", "run.folder=new"],
    ):
        assert main(["train", *words]) == 2, words
        said = capsys.readouterr().err
        assert said.startswith("error: s/events.jsonl: ") and said.count("\n") == 1 and len(said) < 400
    assert not told.exists() and Path("s/job.toml").read_bytes() == before and not Path("new").exists()


def test_an_end_without_a_reason_ends_nothing(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "s")
    with (tmp_path / "s" / "events.jsonl").open("a") as log:
        log.write('{"attempt":0,"run_seconds":9,"kind":"end"}\n')
    assert Run(tmp_path / "s").outcome == "unfinished"


@pytest.mark.parametrize("name", ["events.jsonl", "log.txt", "lock", "job.toml.part", "report.html.part"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_a_run_writes_is_a_file_of_its_own(kind: str, name: str, tmp_path: Path) -> None:
    """A pipe is not waited for, also where somebody reads it; what a link leads to stays as it is."""
    path, other = tmp_path / "run" / name, tmp_path / "other"
    path.parent.mkdir()
    other.write_text("whole\ntorn")
    reader = None
    if kind == "pipe":
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    else:
        path.symlink_to(other)
    said = rf"{name}: cannot be written|cannot be written \((a link|no regular file)"
    if name == "events.jsonl":
        with pytest.raises(MachineError, match=said):
            EventLog(path.parent)
    elif name == "lock":
        with pytest.raises(MachineError, match=said), locked(path.parent):
            pass
    elif name == "job.toml.part":
        replace_synced(path.with_suffix(""), b"x")
        assert path.with_suffix("").read_bytes() == b"x"
    elif name == "report.html.part":
        assert write_report(path.parent).is_file()
    else:
        end = {"kind": "end", "step": 3, "reason": "asked", "run_seconds": 1.0, "time": 0.0}
        LogText(path.parent).show(end)
    assert other.read_text() == "whole\ntorn"
    if reader is not None:
        assert os.read(reader, 100) == b""
        os.close(reader)


def test_no_job_of_a_run_and_checkpoints_that_lead_to_themselves(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").symlink_to("checkpoints")
    for words in ([], ["--dry"]):
        assert main(["train", *words, str(folder), "run.steps=40"]) == 2
        said = capsys.readouterr().err
        assert (
            said.startswith("error: ")
            and "checkpoints: a link that leads to no folder" in said
            and said.count("\n") == 1
        )
    (folder / "checkpoints").unlink()
    (folder / "job.toml").write_text("")
    for words in ([str(folder)], ["--dry", str(folder)], ["--exact", str(folder / "job.toml")]):
        assert main(["train", *words]) == 2, words
        said = capsys.readouterr().err
        assert "job.toml: no run's: it lacks" in said and said.count("\n") == 1
