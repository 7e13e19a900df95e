"""Storage that is full or refuses: a clear error, and the checkpoint before stays."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from colossus.checkpoints.load import latest, newest_whole
from colossus.checkpoints.save import Saver
from colossus.errors import MachineError

TWO_MB = {("w", "weight"): torch.ones(500_000)}
NINE_MB = {("w", "weight"): torch.ones(2_250_000)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk(small_disk: Path, asynchronous: bool) -> None:
    saver = Saver(small_disk, keep=1)
    with pytest.raises(
        MachineError, match=r"step 1 .*No space left on device; nothing of this run is saved yet"
    ):
        saver.save(1, NINE_MB, {}, asynchronous)
        saver.wait()
    saver.save(2, TWO_MB, {}, asynchronous)
    saver.wait()
    with pytest.raises(MachineError, match=r"step 3 .*No space left on device; step-00000002 is saved whole"):
        saver.save(3, NINE_MB, {}, asynchronous)
        saver.save(4, TWO_MB, {}, asynchronous)  # the next call tells, and begins nothing
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000002"]
    saver.save(4, TWO_MB, {}, asynchronous)
    saver.wait()
    assert [saved.step for saved in saver.poll()] == [2, 4]
    found = newest_whole(small_disk)
    assert found is not None
    assert found.step == 4


def test_a_disk_that_turns_read_only(small_disk: Path) -> None:
    saver = Saver(small_disk)
    saver.save(1, TWO_MB, {})
    saver.wait()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    saver.save(2, TWO_MB, {})
    with pytest.raises(MachineError, match=r"Read-only file system; step-00000001 is saved whole"):
        saver.wait()
    with pytest.raises(MachineError, match=r"cannot save to .*checkpoints: Read-only file system"):
        Saver(small_disk / "another")


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """As a full disk, where none can be mounted."""
    program = f"""
import resource, signal, torch
from colossus.checkpoints.save import Saver
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
saver = Saver({str(tmp_path)!r})
saver.save(1, {{("w", "weight"): torch.ones(1000)}}, {{}})
saver.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
saver.save(2, {{("w", "weight"): torch.ones(1_000_000)}}, {{}})
saver.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "MachineError: cannot save step 2" in done.stderr
    assert "File too large; step-00000001 is saved whole" in done.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1_000_000


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(MachineError, match=r"cannot save to .*checkpoints: File exists"):
        Saver(tmp_path)


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    (tmp_path / "checkpoints").rmdir()
    saver.save(1, TWO_MB, {})
    with pytest.raises(MachineError, match=r"No such file or directory; nothing of this run is saved yet"):
        saver.wait()
    assert latest(tmp_path) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(MachineError, match="Permission denied"):
        Saver(tmp_path)


def test_where_priorities_may_not_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "setpriority", refuse)
    saver = Saver(tmp_path)
    saver.save(1, TWO_MB, {})
    saver.wait()
    assert [saved.step for saved in saver.poll()] == [1]


def test_leaving_after_an_error_raises_that_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Saver(tmp_path) as saver:
        saver.save(1, TWO_MB, {})
        raise KeyError
    assert latest(tmp_path) is not None  # the save under way was let finish


def test_leaving_tells_of_a_failed_save(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot save step 1"), Saver(tmp_path) as saver:
        (tmp_path / "checkpoints").rmdir()
        saver.save(1, TWO_MB, {})
