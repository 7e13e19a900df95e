"""Files that options write: what cannot be written is told before the work, in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from colossus.cli import main

NO_ROOM = [
    "plan",
    "model=llama3.1-405b",
    "fleet.accelerator=h100-sxm",
    "fleet.count=1",
]  # exit 1, once searched
SMALL = ["plan", "model=llama3.2-1b", "fleet.accelerator=h100-sxm", "fleet.count=8", "run.tokens=1e9"]

PLACES = [
    ("none/plan", "no such folder: none"),
    ("file/plan", "no such folder: file"),
    ("folder", "is a folder"),
    ("to-folder", "is a folder"),
    (".", "is a folder"),
    ("to-none", "no such folder"),
    ("n" * 300, "cannot be written (File name too long)"),
    ("/proc/plan", "cannot be written"),
    pytest.param("kept/plan", "cannot be written (Permission denied)", marks=pytest.mark.skipif(
        os.geteuid() == 0, reason="root may write everywhere")),
    pytest.param("kept-file", "cannot be written (Permission denied)", marks=pytest.mark.skipif(
        os.geteuid() == 0, reason="root may write everywhere")),
]  # fmt: skip


@pytest.mark.parametrize("option", [[*NO_ROOM, "--html"], [*NO_ROOM, "--job"], ["eval", "no-run", "--json"]])
@pytest.mark.parametrize(("place", "message"), PLACES)
def test_a_place_that_cannot_be_written_is_told_first(
    option: list[str],
    place: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("kept")
    Path("to-folder").symlink_to("folder")
    Path("to-none").symlink_to("none/plan")
    Path("kept").mkdir(mode=0o500)
    Path("kept-file").touch(mode=0o400)
    before = sorted(tmp_path.rglob("*"))
    assert main([*option, place]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"error: {option[-1]}={place}: ") and message in said.err
    assert sorted(tmp_path.rglob("*")) == before and Path("file").read_text() == "kept"


def test_a_place_that_can_be_written_is_kept_as_it_was_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old").write_text("kept")
    Path("to-new").symlink_to("new")
    assert main([*NO_ROOM, "--html", "to-new", "--job", "old"]) == 1
    assert Path("old").read_text() == "kept" and not Path("new").exists() and Path("to-new").is_symlink()


def test_two_files_are_not_written_to_one_place(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    place = str(tmp_path / "both")
    assert main([*NO_ROOM, "--html", place, "--job", place]) == 2
    assert "name two files" in capsys.readouterr().err


def test_data_on_the_output_stays_data_beside_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html, job = tmp_path / "plan.html", tmp_path / "job.toml"
    assert main([*SMALL, "--json", "--html", str(html), "--job", str(job)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["tokens"] == 1e9
    assert said.err.count("wrote") == 2 and html.stat().st_size and job.stat().st_size
