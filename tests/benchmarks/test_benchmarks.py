"""Every benchmark says how it is run, and its receipts say what ran."""

from __future__ import annotations

import ast
import importlib
import json
import math
import shlex
import sys
from itertools import dropwhile
from pathlib import Path

import pytest

from colossus.perf.receipts import SPEED_VARIABLES

ROOT = Path(__file__).resolve().parents[2]
RECEIPTS = sorted((ROOT / "benchmarks" / "receipts").glob("*.json"))
NAMES = [
    path.stem
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if any(
        "__main__" in ast.unparse(node)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.If)
    )
]


def test_there_are_benchmarks() -> None:
    assert {"train_speed", "data_speed", "memory", "checkpoint"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_the_options_are(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every option is named in the module's own words, too, and nothing is measured."""
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    if hasattr(module, "this_machine"):
        monkeypatch.setattr(module, "this_machine", lambda: pytest.fail("--help measures this machine"))
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    asked = {word.strip("[]") for word in usage.split() if word.startswith("[--")}
    assert asked >= {"--quick", "--out"}
    summary = (module.__doc__ or "").strip().splitlines()[0]
    assert summary.split()[:3] == rest.split()[:3]
    (line,) = [line for line in (module.__doc__ or "").splitlines() if f"python -m benchmarks.{name}" in line]
    assert {word.strip("[]") for word in line.split() if word.startswith("[--")} == asked


@pytest.mark.parametrize("name", NAMES)
def test_a_receipt_is_written_by_its_own_name(name: str) -> None:
    tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())
    calls = [
        [ast.unparse(argument) for argument in node.args]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("write_receipt")
    ]
    assert [(first, out) for first, _, out, *_ in calls] == [(repr(name), "arguments.out")]


@pytest.mark.parametrize("path", RECEIPTS, ids=lambda path: path.stem)
def test_a_kept_receipt_says_what_ran(path: Path) -> None:
    receipt = json.loads(path.read_text())
    assert list(receipt) == ["name", "command", "date", "versions", "hardware", "figures"]
    assert receipt["name"] in NAMES and path.stem.startswith(receipt["name"])
    words = shlex.split(receipt["command"])
    command = list(dropwhile(lambda word: word.partition("=")[0] in SPEED_VARIABLES, words))
    assert command[:3] == ["python", "-m", f"benchmarks.{receipt['name']}"]
    assert {"python", "torch"} <= receipt["versions"].keys()
    assert receipt["figures"]
    for figure in receipt["figures"]:
        assert (
            {"name", "value", "unit"} <= figure.keys() <= {"name", "value", "unit", "goal", "peer", "ratio"}
        )
        assert math.isfinite(figure["value"]) and math.isfinite(figure.get("ratio", 0.0))
