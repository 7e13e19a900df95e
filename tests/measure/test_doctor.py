"""What `colossus doctor` says of a machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from colossus.hardware.machine import Gpu, Machine, Rate
from colossus.job import Job, load_job
from colossus.measure import doctor
from colossus.measure.doctor import report, torch_in_range

ROOT = Path(__file__).resolve().parents[2]
FAST_BF16 = Machine(
    processor="AMD EPYC 9B45 (family 26.2)",
    cores=2,
    rates=tuple(
        Rate(*rate)
        for rate in [("fp32", 1, 9e10), ("fp32", 2, 1.8e11), ("bf16", 1, 2e11), ("bf16", 2, 4.14e11)]
    ),
    memory_bandwidth_bytes_per_second=4.86e10,
    memory_bytes=25 * 10**9,
    dispatch_seconds=1.7e-6,
    compiler="/usr/bin/g++",
)
SLOW_BF16 = dataclasses.replace(
    FAST_BF16, rates=(Rate("fp32", 1, 6e10), Rate("fp32", 2, 1.2e11), Rate("bf16", 1, 0.9e9))
)


def resolved() -> Job:
    """A job of which all that the report reads is filled in."""
    small = ["model=llama3.2-1b", "model.num_layers=2", "model.initializer_range=0.02", "run.minutes=5"]
    return load_job(None, small)


def test_a_type_that_is_quicker_is_taken_and_said_by_how_much() -> None:
    text = report(FAST_BF16)
    assert "type       bf16, 2.3 times as fast as fp32" in text
    assert "counted against 414 GFLOP/s" in text and "bf16 on 2 threads" in text
    assert "slower than" not in text


def test_a_slow_type_is_warned_of() -> None:
    text = report(SLOW_BF16)
    assert "type       fp32, 130 times as fast as bf16" in text
    assert "bf16 is 130 times slower than fp32 here: it is never used unasked" in text
    assert "counted against 120 GFLOP/s" in text


def test_the_table_has_a_row_for_each_type_and_a_column_for_each_number_of_threads() -> None:
    lines = report(SLOW_BF16).splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == ["1", "thread", "2", "threads"])
    assert lines[head + 1].split() == ["fp32", "60", "GFLOP/s", "120", "GFLOP/s"]
    assert lines[head + 2].split() == ["bf16", "900", "MFLOP/s", "-"]
    assert len({len(line) for line in lines[head : head + 3]}) == 1  # the columns end together


def test_gpus_are_counted_and_decide() -> None:
    gpu = Gpu("NVIDIA H100", 80 * 10**9, 7.1e14)
    text = report(dataclasses.replace(FAST_BF16, gpus=(gpu, gpu)))
    assert "2 x NVIDIA H100, 80 GB, bf16 at 710 TFLOP/s" in text
    assert "2 GPUs, one rank each" in text and "the bf16 products of one GPU" in text


def test_what_is_missing_is_said_with_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    text = report(dataclasses.replace(FAST_BF16, compiler=None, quiet=False))
    assert "compiler   none: the C++ compiler no-such-compiler is missing" in text
    assert "compile    no" in text and "torch.compile needs the C++ compiler no-such-compiler" in text
    assert "colossus doctor --refresh" in text
    monkeypatch.setattr(doctor, "EXTRAS", {"no_such_package": "things named so"})
    assert "no_such_package is not installed, which things named so need" in report(FAST_BF16)
    monkeypatch.setattr(doctor, "SCARCE_BYTES", 2**60)
    scarce = report(FAST_BF16)
    assert "of memory is free" in scarce and "of disk is free for runs" in scarce


def test_extras_are_real_packages() -> None:
    for package in doctor.EXTRAS:
        missing = importlib.util.find_spec(package) is None
        assert (f"{package} is not installed" in report(FAST_BF16)) == missing


def test_the_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert doctor._free_bytes(tmp_path / "a" / "b") == pytest.approx(free, rel=0.1)


def test_the_range_of_torch_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"torch>={doctor.OLDEST_TORCH},<={doctor.NEWEST_TORCH}" in project["dependencies"]
    assert [torch_in_range(v) for v in ("2.11.0", "2.12.1", "2.13.0+cpu", "2.13.0+cu130")] == [True] * 4
    assert [torch_in_range(v) for v in ("2.10.2", "2.13.1", "3.0", "2.11.0rc1")] == [False] * 4


def test_what_a_run_would_be() -> None:
    line = next(line for line in report(FAST_BF16, resolved()).splitlines() if line.startswith("  a run"))
    assert "5 min of training: a model of 384M parameters (2 layers of width 2,048)" in line


def test_it_fits_one_screen() -> None:
    everything = dataclasses.replace(SLOW_BF16, quiet=False, processor="x" * 60)
    lines = report(everything, resolved()).splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 110
    assert not any(line != line.rstrip() for line in lines)


def test_the_verb_shows_the_report_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path))

    def verb(*options: str) -> str:
        command = [sys.executable, "-m", "colossus", "doctor", *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    table = json.loads(verb("--json"))
    assert json.loads(Machine.from_json(json.dumps(table)).to_json()) == table
    (kept,) = tmp_path.rglob("*.json")
    assert json.loads(kept.read_text()) == table  # measured once, kept, shown
    text = verb()
    for said in (table["processor"], "What follows", "5 min of training: a model of"):
        assert said in text
