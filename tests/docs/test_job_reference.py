"""The page of all fields is as the job has them."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
from types import ModuleType

import pytest

from colossus import api
from colossus.derive import dial
from colossus.derive.model import MADE_FOR, SEQ_LEN
from colossus.job import fields, load_job
from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("job_reference", ROOT / "tools" / "job_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page: str) -> dict[str, list[str]]:
    """Field -> the other cells of its row."""
    cells = [
        [c.strip() for c in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| `"
    ]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_page_is_up_to_date(reference: ModuleType) -> None:
    page = reference.PAGE.read_text(encoding="utf-8")
    assert page == reference.updated(page), "run: python tools/job_reference.py"
    assert list(rows(page)) == reference.names()
    assert [name for name in rows(page) if name.count(".") == 1] == fields()
    assert "to be written" not in page


def test_every_change_of_the_job_shows(reference: ModuleType) -> None:
    page = reference.PAGE.read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith("| `run.seed`"))
    lost = page.replace(line + "\n", "")
    assert "| `run.seed` | whole number, at least 0 | to be written" in reference.updated(lost)
    stale = page.replace(line, line.replace("whole number", "text"))
    assert reference.updated(stale) == page
    gone = page.replace(line, line + "\n" + line.replace("run.seed", "run.sede"))
    assert reference.updated(gone) == page


def test_constants_are_those_that_are_derived(reference: ModuleType) -> None:
    job = api.resolve(load_job(None, ["run.steps=10"]))
    page = rows(reference.PAGE.read_text(encoding="utf-8"))
    checked = 0
    for name, cells in page.items():
        constant = re.fullmatch(r"`([^`]+)`", cells[-1])
        if constant is None or constant[1] in page or constant[1].startswith("runs/"):
            continue
        holds = job.get(name) if name.count(".") == 1 else reference._field(name).default
        assert holds == tomllib.loads(f"value = {constant[1]}")["value"], name
        checked += 1
    assert checked > 30


def test_the_dial_is_the_one_that_is_described() -> None:
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    laws = [(float(a), float(b)) for a, b in re.findall(r"([\d.]+) C\^(-?\d[\d.]*\d)", text)]
    module = importlib.import_module(dial.__module__)
    functions = (module.tokens_for, module.batch_tokens_for, module.lr_for)
    for compute in (1e12, 1e20):
        assert [a * compute**b for a, b in laws] == pytest.approx([f(compute) for f in functions])


def test_lengths_of_samples_are_those_that_are_derived(reference: ModuleType) -> None:
    cell = rows(reference.PAGE.read_text(encoding="utf-8"))["data.seq_len"][-1]
    assert f"{SEQ_LEN['cpu']:,} on a CPU, {SEQ_LEN['cuda']:,} on a GPU" in cell
    assert f"up to {MADE_FOR:,}" in cell
