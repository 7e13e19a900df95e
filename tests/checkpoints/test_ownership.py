"""A save deletes what it wrote itself, before its commit; whatever else is there stays."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from colossus.checkpoints import committer
from colossus.checkpoints.claims import committed
from colossus.checkpoints.find import latest, verify
from colossus.checkpoints.format import Key
from colossus.checkpoints.retention import delete_leftovers, locked
from colossus.checkpoints.save import Saver
from colossus.errors import MachineError
from tests.checkpoints.outside import with_fault


def state(value: float = 0.0) -> dict[Key, torch.Tensor]:
    return {("w", "weight"): torch.full((1000,), value)}


def save(saver: Saver, step: int) -> None:
    saver.save(step, state(step), {"step": step})
    saver.wait()


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_two_savers_on_one_folder(tmp_path: Path) -> None:
    """The second finds its step taken; neither loses what the other has saved."""
    first, second = Saver(tmp_path), Saver(tmp_path)
    save(first, 4)
    with pytest.raises(MachineError, match=r"cannot save step 4 .*File exists; step-00000004 is saved whole"):
        save(second, 4)
    assert verify(tmp_path / "checkpoints" / "step-00000004").step == 4
    save(second, 5)
    save(first, 6)
    assert {path.name for path in committed(tmp_path)} >= {"step-00000005", "step-00000006"}


def test_a_second_saver_leaves_alone_what_the_first_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, may_commit = Saver(tmp_path / "run"), tmp_path / "now"
    monkeypatch.setattr(committer, "command", with_fault("wait", may_commit))
    saver.save(1, state(1), {})
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    while not (folder / "pieces-00000.index").exists():
        pass
    Saver(tmp_path / "run")
    may_commit.touch()
    saver.wait()
    assert verify(folder).step == 1


USERS = [
    "step-00000004-good",
    "step-00000004.bak",
    "step-4",
    "step-00000004.1",
    "step-00000004.02",
    "step-٠٠٠٠٠٠٠٤",
    "my-step-00000004",
    "step-00000004 (copy)",
]


@pytest.mark.parametrize("name", USERS)
def test_a_copy_of_a_user_is_neither_counted_nor_deleted(name: str, tmp_path: Path) -> None:
    with Saver(tmp_path, keep=1) as saver:
        save(saver, 4)
        shutil.copytree(tmp_path / "checkpoints" / "step-00000004", tmp_path / "checkpoints" / name)
        for step in (5, 6, 7):
            save(saver, step)
    assert names(tmp_path) == {name, "step-00000007"}
    assert verify(tmp_path / "checkpoints" / name).step == 4
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-00000007"
    with Saver(tmp_path, keep=1) as saver:
        save(saver, 8)
    assert names(tmp_path) == {name, "step-00000008"}


@pytest.mark.parametrize("name", ["exported", "step-00000002-hf", "step-00000002"])
def test_an_export_among_the_checkpoints_stays(name: str, tmp_path: Path) -> None:
    with Saver(tmp_path, keep=1) as saver:
        save(saver, 1)
    folder = tmp_path / "checkpoints" / name
    (folder / "sub").mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "sub/notes"):
        (folder / file).write_text(file)
    with Saver(tmp_path, keep=1) as saver:
        save(saver, 2)
        save(saver, 3)
    assert names(tmp_path) == {name, "step-00000003"}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {
        "config.json",
        "model.safetensors",
        "sub/notes",
    }


def test_an_export_that_came_meanwhile_is_not_written_to(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir()
    (folder / "model.safetensors").write_text("")
    with pytest.raises(MachineError, match="File exists"):
        save(saver, 2)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_notes_in_a_checkpoint_outlive_it(tmp_path: Path) -> None:
    with Saver(tmp_path, keep=1) as saver:
        save(saver, 1)
        notes = tmp_path / "checkpoints" / "step-00000001" / "notes.txt"
        notes.write_text("the good one")
        save(saver, 2)
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]
    delete_leftovers(tmp_path)
    assert notes.read_text() == "the good one"


def test_a_link_to_an_archive_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, archive = tmp_path / "run", tmp_path / "archive"
    with Saver(run, keep=1) as saver:
        save(saver, 1)
    shutil.move(run / "checkpoints" / "step-00000001", archive)
    (run / "checkpoints" / "step-00000001").symlink_to(archive)
    with Saver(run, keep=1) as saver:
        save(saver, 2)
    assert verify(archive).step == 1 and names(run) == {"step-00000001", "step-00000002"}
    assert latest(run) == run / "checkpoints" / "step-00000002"
    assert "passed over" in caplog.text


@pytest.mark.parametrize("error", ["disk", "value", "key"])
def test_what_goes_wrong_after_the_commit_is_a_warning(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(committer, "command", with_fault("tidy", error))
    saver = Saver(tmp_path)
    with caplog.at_level(logging.WARNING):
        save(saver, 1)
    assert [saved.step for saved in saver.poll()] == [1]
    assert verify(tmp_path / "checkpoints" / "step-00000001").step == 1
    assert "cannot tidy" in caplog.text


def test_a_marker_that_can_neither_be_synced_nor_deleted_keeps_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be read again, so what it vouches for stays, although the save is told as failed."""
    saver = Saver(tmp_path)
    monkeypatch.setattr(committer, "command", with_fault("marker"))
    with pytest.raises(MachineError, match=r"cannot save step 4 .*Input/output error"):
        save(saver, 4)
    monkeypatch.undo()
    assert verify(tmp_path / "checkpoints" / "step-00000004").step == 4


def test_leftovers_that_cannot_be_deleted_do_not_keep_a_run_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Saver(tmp_path) as saver:
        save(saver, 1)
    (tmp_path / "checkpoints" / "step-00000002").mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "rmdir", refuse)
    with Saver(tmp_path) as saver:
        save(saver, 2)
    assert latest(tmp_path) == tmp_path / "checkpoints" / "step-00000002.2"
    assert "cannot tidy" in caplog.text


def test_what_is_known_to_be_damaged_does_not_count(tmp_path: Path) -> None:
    """Step 3 does not, so that steps 4 and 2 are the two."""
    with Saver(tmp_path, keep=9) as saver:
        for step in (1, 2, 3):
            save(saver, step)
    damaged = [tmp_path / "checkpoints" / "step-00000003"]
    with Saver(tmp_path, keep=2, damaged=damaged) as saver:
        save(saver, 4)
        assert names(tmp_path) == {"step-00000002", "step-00000003", "step-00000004"}
        save(saver, 5)
    assert names(tmp_path) == {"step-00000004", "step-00000005"}


def test_a_lock_of_saves(tmp_path: Path) -> None:
    with locked(tmp_path), locked(tmp_path), locked(tmp_path, alone=True) as free:
        assert not free
    with locked(tmp_path, alone=True) as free:
        assert free
