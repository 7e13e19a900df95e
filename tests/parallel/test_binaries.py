"""What a killed compilation leaves must not stop later runs."""

from __future__ import annotations

import os
import platform
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
    kept = {"empty.so": 0, "header.o": 64, "half.so": len(content) // 2, "last.so": len(content) - 1}
    for name, size in (kept | {"all.so": len(content)}).items():
        (binary.parent / name).write_bytes(content[:size])
    (binary.parent / "zeros.so").write_bytes(bytes(len(content)))
    removed = ["empty.so", "half.so", "header.o", "last.so", "zeros.so"]
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


def test_no_link_is_made_into_a_file(tmp_path: Path) -> None:
    """The usual cache lies where anybody may write."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "colossus.lock").symlink_to(tmp_path / "elsewhere")
    assert drop_torn_binaries(tmp_path / "cache") == []
    assert not (tmp_path / "elsewhere").exists()


def test_a_cache_that_cannot_be_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert drop_torn_binaries(tmp_path / "file" / "cache") == []


CHOSEN = (
    "import os; from colossus.parallel.binaries import choose_cache; "
    "choose_cache(); print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
)


def chosen_cache(**settings: str) -> str:
    """What a process compiles into that has these environment variables."""
    environment = {n: v for n, v in os.environ.items() if n not in ("TORCHINDUCTOR_CACHE_DIR", *settings)}
    command = [sys.executable, "-c", CHOSEN]
    done = subprocess.run(command, env=environment | settings, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names kinds of x86")
def test_kinds_of_vector_instructions_share_no_binaries() -> None:
    avx2, default = (Path(chosen_cache(ATEN_CPU_CAPABILITY=name)) for name in ("avx2", "default"))
    assert avx2 != default and avx2.parent == default.parent
    assert (avx2.name, default.name) == ("avx2", "default")


def test_a_cache_that_the_user_names_is_kept(tmp_path: Path) -> None:
    assert chosen_cache(TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) == str(tmp_path)
