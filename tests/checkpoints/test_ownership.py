"""A save deletes what it wrote itself, before its commit; whatever else is there stays."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from colossus.checkpoints.find import committed, latest, verify
from colossus.checkpoints.format import Key
from colossus.checkpoints.parts import commit
from colossus.checkpoints.retention import delete_leftovers, locked, prune
from colossus.checkpoints.save import Saver
from colossus.errors import MachineError


def state(value: float = 0.0) -> dict[Key, torch.Tensor]:
    return {("w", "weight"): torch.full((1000,), value)}


def save(saver: Saver, step: int) -> None:
    saver.save(step, state(step), {"step": step})
    saver.wait()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


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
    saver, may_commit = Saver(tmp_path), threading.Event()

    def slowly(*arguments: Any) -> Any:
        assert may_commit.wait(60)
        return commit(*arguments)

    monkeypatch.setattr("colossus.checkpoints.save.commit", slowly)
    saver.save(1, state(1), {})
    folder = tmp_path / "checkpoints" / "step-00000001"
    while not (folder / "pieces-00000.safetensors").exists():
        pass
    Saver(tmp_path)
    may_commit.set()
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


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ValueError("a bug"), KeyError("x")])
def test_what_goes_wrong_after_the_commit_is_a_warning(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("colossus.checkpoints.save.prune", broken)
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
    sync, unlink = os.fsync, os.unlink

    def broken_sync(descriptor: int) -> None:
        if (Path(f"/proc/self/fd/{descriptor}").readlink() / "COMMITTED").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    def broken_unlink(path: Any, **options: Any) -> None:
        if Path(path).name == "COMMITTED":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        unlink(path, **options)

    saver = Saver(tmp_path)
    monkeypatch.setattr(os, "fsync", broken_sync)
    monkeypatch.setattr(os, "unlink", broken_unlink)
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


def test_keep_counts_whole_ones_alone(tmp_path: Path) -> None:
    """Of equal length, but with a flipped bit: step 3 does not count, so that steps 4 and 2 are the two."""
    with Saver(tmp_path, keep=9) as saver:
        for step in (1, 2, 3):
            save(saver, step)
    pieces = tmp_path / "checkpoints" / "step-00000003" / "pieces-00000.safetensors"
    flip(pieces)
    assert [path.name for path in prune(tmp_path, keep=2)] == []
    found = tmp_path / "checkpoints" / "step-00000002"
    with Saver(tmp_path, keep=2, found=found) as saver:
        save(saver, 4)
        assert names(tmp_path) == {"step-00000002", "step-00000003", "step-00000004"}
        save(saver, 5)
    assert names(tmp_path) == {"step-00000004", "step-00000005"}


@pytest.mark.parametrize(
    ("read_bytes", "told", "kept"),
    [(10**9, False, {2, 3, 4}), (0, False, {3, 4}), (0, True, {2, 3, 4})],
    ids=["read", "too long to read", "read at the start"],
)
def test_an_older_one_is_read_unless_it_is_long(
    read_bytes: int, told: bool, kept: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four, step 3 is damaged: with it, two are three."""
    monkeypatch.setattr("colossus.checkpoints.save.READ_BYTES", read_bytes)
    with Saver(tmp_path, keep=9) as saver:
        for step in (1, 2, 3):
            save(saver, step)
    folder = tmp_path / "checkpoints"
    flip(folder / "step-00000003" / "pieces-00000.safetensors")
    found, damaged = (folder / "step-00000002", [folder / "step-00000003"]) if told else (None, [])
    with Saver(tmp_path, keep=2, found=found, damaged=damaged) as saver:
        save(saver, 4)
    assert names(tmp_path) == {f"step-{step:08d}" for step in kept}


def test_a_lock_of_saves(tmp_path: Path) -> None:
    with locked(tmp_path), locked(tmp_path), locked(tmp_path, alone=True) as free:
        assert not free
    with locked(tmp_path, alone=True) as free:
        assert free
