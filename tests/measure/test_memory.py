"""Freed memory is kept where that pays, and given back where not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from colossus.hardware.machine import KEEPING_PAYS, Gpu
from colossus.measure import memory
from colossus.measure.memory import can_keep, keep_freed, keeping_gain, peak_memory_bytes
from tests.derive.machines import machine

ROOT = Path(__file__).resolve().parents[2]
needs_glibc = pytest.mark.skipif(not can_keep(), reason="needs glibc")


# In a process of its own: what was once kept is taken from then on. glibc leaves splinters between the first
# pieces, so that these do not fit one another; hence 30 that do not count.
FAULTS = """
import resource, torch
from colossus.measure.memory import keep_freed

def faults(mib):
    for _ in range(30):
        torch.ones(mib * 2**18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(mib * 2**18)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

assert not keep_freed(False)
given_back = faults(40), faults(64)
assert keep_freed(True)
print(*given_back, faults(40), faults(64))
"""


@needs_glibc
def test_what_is_kept_is_not_faulted_in_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    small, large, small_kept, large_kept = map(float, done.stdout.split())
    assert small >= 20 and large >= 32  # as few as that where pages are of 2 MiB
    assert small_kept <= small / 5 and large_kept <= large / 5


@needs_glibc
def test_the_same_product_either_way() -> None:
    left, right = torch.randn(300, 200), torch.randn(200, 40_000)
    found = []
    try:
        for keep in (True, False):
            keep_freed(keep)
            found.append(left @ right)
    finally:
        keep_freed(False)
    assert torch.equal(*found)


def test_it_is_measured_and_taken_where_it_pays() -> None:
    assert keeping_gain() > 0.2
    assert not machine().keeps_freed_memory
    pays = dataclasses.replace(machine(), keeping_gain=KEEPING_PAYS)
    assert pays.keeps_freed_memory
    assert not dataclasses.replace(pays, gpus=(Gpu("x", 1, 1.0),)).keeps_freed_memory


def test_where_the_memory_is_not_glibc_s_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "can_keep", lambda: False)
    assert keep_freed(True) is False and keeping_gain() == 1.0


def test_the_peak_is_what_was_there() -> None:
    before = peak_memory_bytes()
    piece = torch.ones(before // 4)
    assert peak_memory_bytes() > before + piece.nbytes // 4


def test_the_peak_is_not_that_of_who_started_the_process() -> None:
    """Linux counts that in `ru_maxrss`, since a process begins as a copy of the one that starts it."""
    code = """if True:
        import subprocess, sys
        much = b"x" * 2**30
        said = "from colossus.measure.memory import peak_memory_bytes; print(peak_memory_bytes())"
        sys.exit(int(subprocess.run([sys.executable, "-c", said], capture_output=True).stdout) >= 2**30)
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
