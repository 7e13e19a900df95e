"""What stays, what goes, and that the only whole one never goes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from colossus.checkpoints.find import committed
from colossus.checkpoints.load import latest
from colossus.checkpoints.retention import delete_leftovers, prune
from colossus.checkpoints.save import Saver


def save(run: Path, *steps: int, keep: int = 99, keep_every: int = 0) -> None:
    with Saver(run, keep=keep, keep_every=keep_every) as saver:
        for step in steps:
            saver.save(step, {("w", "weight"): torch.full((3,), float(step))}, {})


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1].split(".")[0]) for path in (run / "checkpoints").iterdir())


def test_the_newest_and_every_so_many_stay(tmp_path: Path) -> None:
    save(tmp_path, *range(10, 130, 10), keep=2, keep_every=50)
    assert steps(tmp_path) == [50, 100, 110, 120]


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000003" / "pieces-00000.safetensors").write_bytes(b"short")
    assert [path.name for path in prune(tmp_path, keep=1)] == ["step-00000001"]
    assert steps(tmp_path) == [2, 3]
    (folder / "step-00000002" / "manifest.json").unlink()
    assert prune(tmp_path, keep=1) == []


@pytest.mark.parametrize("keep", [1, 3])
def test_the_only_one_stays(tmp_path: Path, keep: int) -> None:
    save(tmp_path, 7, keep=keep)
    assert prune(tmp_path, keep=keep) == []
    assert steps(tmp_path) == [7]


def test_leftovers_of_killed_saves_go_at_the_next_start(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / "step-00000003")
    marker = folder / "step-00000003" / "COMMITTED"
    marker.write_bytes(marker.read_bytes()[:-1])  # killed while it was written
    (folder / "step-00000004").mkdir()
    (folder / "notes.txt").write_text("a user's own")
    assert latest(tmp_path) == folder / "step-00000002"
    save(tmp_path, 3)
    assert [path.name for path in committed(tmp_path)] == ["step-00000003", "step-00000002", "step-00000001"]
    assert not (folder / "step-00000004").exists()
    assert (folder / "notes.txt").exists()


def test_leftovers_are_told_by_the_commit_alone(tmp_path: Path) -> None:
    save(tmp_path, 1)
    marker = tmp_path / "checkpoints" / "step-00000001" / "COMMITTED"
    marker.write_text("x" * 200)
    delete_leftovers(tmp_path)  # damaged, but not ours to delete
    assert marker.exists()
