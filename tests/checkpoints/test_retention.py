"""What stays, what goes, and that the only whole one never goes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from colossus.checkpoints.claims import committed
from colossus.checkpoints.copy import copy_checkpoint
from colossus.checkpoints.load import DamagedCheckpoint, latest, open_checkpoint, verify
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


def test_one_that_is_known_to_be_damaged_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    assert [path.name for path in prune(tmp_path, keep=1, damaged=["step-00000003"])] == ["step-00000001"]
    assert steps(tmp_path) == [2, 3]
    assert prune(tmp_path, keep=1, damaged=["step-00000003", "step-00000002"]) == []


def test_nothing_but_the_marker_is_read(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    for path in (tmp_path / "checkpoints").glob("*/*"):
        if path.name != "COMMITTED":
            path.unlink()
            path.mkdir()  # cannot be read
    prune(tmp_path, keep=2)
    assert [path.name for path in committed(tmp_path)] == ["step-00000003", "step-00000002"]


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


@pytest.mark.parametrize(
    ("before", "left"), [(None, [50, 60]), (5, [50, 60]), (35, [30, 50, 60]), (55, [50, 60])]
)
def test_the_last_one_before_a_step_stays(tmp_path: Path, before: int | None, left: list[int]) -> None:
    save(tmp_path, *range(10, 70, 10))
    prune(tmp_path, keep=2, before=before)
    assert steps(tmp_path) == left


def test_the_first_one_of_a_branch_stays(tmp_path: Path) -> None:
    save(tmp_path, *range(10, 70, 10))
    prune(tmp_path, keep=2, first=20)
    assert steps(tmp_path) == [20, 50, 60]
    save(tmp_path, 70)
    prune(tmp_path, keep=1, before=55, first=20)
    assert steps(tmp_path) == [20, 50, 70]


def test_of_those_before_a_step_one_stays_that_is_not_damaged(tmp_path: Path) -> None:
    save(tmp_path, *range(10, 70, 10))
    prune(tmp_path, keep=1, before=35, damaged=["step-00000030"])
    assert steps(tmp_path) == [20, 30, 60]


@pytest.mark.parametrize("shared", [False, True])
def test_a_copy_is_the_newest_and_stands_alone(tmp_path: Path, shared: bool) -> None:
    """In the same run it is a later save of the same step; in another one its first."""
    save(tmp_path / "run", 4, 8)
    source = tmp_path / "run" / "checkpoints" / "step-00000004"
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    for run, name in ((tmp_path / "run", "step-00000004.2"), (tmp_path / "other", "step-00000004")):
        copied = copy_checkpoint(source, run, {"decisions": [1]}, shared=shared)
        assert copied.name == name and latest(run) == copied
        assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    shutil.rmtree(tmp_path / "run")
    found = open_checkpoint(copied)
    assert (found.step, found.meta) == (4, {"decisions": [1]})
    assert verify(copied) and torch.equal(found.read("w"), torch.full((3,), 4.0))


def test_of_a_damaged_one_there_is_no_copy(tmp_path: Path) -> None:
    save(tmp_path, 4)
    source = tmp_path / "checkpoints" / "step-00000004"
    pieces = source / "pieces-00000.safetensors"
    pieces.write_bytes(pieces.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedCheckpoint, match="damaged"):
        copy_checkpoint(source, tmp_path / "other", {})
    assert not (tmp_path / "other").exists()
