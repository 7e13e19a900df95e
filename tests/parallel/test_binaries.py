"""What a killed compilation leaves must not stop later runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from colossus.parallel.binaries import drop_torn_binaries, is_whole


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """A whole shared library in a cache."""
    import torch

    library = next(p for p in (Path(torch.__file__).parent / "lib").iterdir() if "libshm." in p.name)
    path = tmp_path / "ab" / "whole.main.so"
    path.parent.mkdir()
    shutil.copy(library, path)
    return path


def in_another_process(folder: Path) -> list[str]:
    """What a fresh process removes; this one may hold the lock."""
    program = (
        "import sys, pathlib; from colossus.parallel.binaries import drop_torn_binaries as drop\n"
        "print(*sorted(p.name for p in drop(pathlib.Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", program, str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF headers")
def test_half_written_files_go_and_whole_ones_stay(binary: Path) -> None:
    content = binary.read_bytes()
    for name, kept in (("empty.so", 0), ("header.o", 64), ("half.so", len(content) // 2), ("all.so", None)):
        (binary.parent / name).write_bytes(content[:kept])
    (binary.parent / "zeros.so").write_bytes(bytes(len(content)))
    removed = ["empty.so", "half.so", "header.o", "zeros.so"]
    assert in_another_process(binary.parents[1]) == removed
    assert sorted(p.name for p in binary.parent.iterdir()) == ["all.so", "whole.main.so"]
    assert is_whole(binary)


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF headers")
def test_nothing_goes_while_another_run_may_be_writing(binary: Path) -> None:
    folder = binary.parents[1]
    assert drop_torn_binaries(folder) == []  # this process holds the lock from now on
    (binary.parent / "being-written.so").write_bytes(b"\x7fELF")
    assert in_another_process(folder) == []
    assert (binary.parent / "being-written.so").exists()


def test_a_cache_that_cannot_be_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert drop_torn_binaries(tmp_path / "file" / "cache") == []
