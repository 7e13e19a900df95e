"""A kill at any instant leaves a whole checkpoint, and a folder that can be gone on with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def crash(*arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.crashing", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(("who", "saved", "calls"), [("points", 0, 20), ("commit", 1, 16)])
def test_killed_before_every_call_of_the_system(who: str, saved: int, calls: int, tmp_path: Path) -> None:
    """The process that trains, in the first save of a run, or the one that commits beside it, in a save that
    also deletes the one before."""
    points = crash(who, str(tmp_path), str(saved))
    assert points > calls  # folders and files: two of each there, two here; opened, written, synced


def test_killed_at_random_instants(tmp_path: Path) -> None:
    assert crash("random", str(tmp_path), "25") > 10
