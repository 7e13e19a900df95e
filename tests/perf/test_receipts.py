"""Receipts as others read them: plain JSON of a fixed form."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch

from colossus.perf.receipts import SPEED_VARIABLES, Figure, print_figures, versions, write_receipt

FIGURES = [
    Figure("training", 1234.5, "tokens/s", ">= 1.05 x the peer", 1000.0, 1.2345),
    Figure("model FLOPs", 1.5e11, "FLOP/s"),
    Figure("saves that were lost", 0, "", "0"),
]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SPEED_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def written(tmp_path: Path, **hardware: object) -> dict:
    path = tmp_path / "new folder" / "receipt.json"
    write_receipt("speed", FIGURES, path, hardware or None)
    return json.loads(path.read_text())


def test_what_a_receipt_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick", "--folder", "a b"])
    before = time.strftime("%Y-%m-%d", time.gmtime())
    receipt = written(tmp_path, processor="synthetic", cores=2)
    assert list(receipt) == ["name", "command", "date", "versions", "hardware", "figures"]
    assert receipt["name"] == "speed"
    assert before <= receipt["date"] <= time.strftime("%Y-%m-%d", time.gmtime())
    assert receipt["versions"] == versions()
    assert receipt["hardware"] == {"processor": "synthetic", "cores": 2}
    command = ["python", "-m", "benchmarks.speed", "--quick", "--folder", "a b"]
    assert shlex.split(receipt["command"]) == command  # it can be run again as it stands


def test_a_command_without_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py"])
    assert written(tmp_path)["command"] == "python -m benchmarks.speed"


def test_a_command_says_the_variables_that_change_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick"])
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("GOMP_SPINCOUNT", "3000")
    command = "ATEN_CPU_CAPABILITY=avx2 GOMP_SPINCOUNT=3000 python -m benchmarks.speed --quick"
    assert written(tmp_path)["command"] == command


def test_what_a_figure_has_not_is_left_out(tmp_path: Path) -> None:
    assert written(tmp_path)["figures"] == [
        {
            "name": "training",
            "value": 1234.5,
            "unit": "tokens/s",
            "goal": ">= 1.05 x the peer",
            "peer": 1000.0,
            "ratio": 1.2345,
        },
        {"name": "model FLOPs", "value": 1.5e11, "unit": "FLOP/s"},
        {"name": "saves that were lost", "value": 0, "unit": "", "goal": "0"},
    ]


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_receipt("speed", FIGURES, None)
    assert list(tmp_path.iterdir()) == []


def test_versions_are_those_that_run() -> None:
    found = versions()
    assert found["python"] == platform.python_version() == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == torch.__version__ and found["numpy"] == numpy.__version__
    assert found["system"].split() == [platform.system(), platform.machine()]
    assert all(isinstance(version, str) and version for version in found.values())


def test_the_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    print_figures(FIGURES)
    header, training, flops, lost = capsys.readouterr().out.splitlines()
    assert header.split() == ["figure", "value", "goal", "peer", "ratio"]
    assert [cell.strip() for cell in training.split("  ") if cell] == [
        "training",
        "1,234 tokens/s",
        ">= 1.05 x the peer",
        "1,000",
        "1.234",
    ]
    assert flops.split() == ["model", "FLOPs", "1.5e+11", "FLOP/s"]
    assert lost.index("0 ") == training.index("1,234") and lost.endswith(" 0")
