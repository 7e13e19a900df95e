"""A test that hangs fails by itself, and the tests behind it run: with the project's own settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HANGING = """import signal
import time

import pytest


@pytest.fixture
def hanging():
    yield
    time.sleep(60)


def test_that_waits():
    time.sleep(60)


def test_whose_fixture_waits(hanging):
    pass


def test_that_no_signal_reaches():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)


def test_behind_them():
    pass
"""


def test_what_hangs_ends_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "test_hanging.py").write_text(HANGING)
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    limits = ["-o", "timeout=2", "-o", "faulthandler_timeout=5"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "1", *settings, *limits, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=100,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    failed = {
        line.split("::")[1].split()[0] for line in done.stdout.splitlines() if line.startswith("FAILED")
    }
    assert failed == {"test_that_waits", "test_that_no_signal_reaches"}
    assert "ERROR test_hanging.py::test_whose_fixture_waits" in done.stdout
    assert "2 failed, 2 passed, 1 error" in done.stdout


def test_the_limits_are_set(pytestconfig: pytest.Config) -> None:
    limits = [float(pytestconfig.getini(name)) for name in ("timeout", "faulthandler_timeout")]
    assert 0 < limits[0] < limits[1]
