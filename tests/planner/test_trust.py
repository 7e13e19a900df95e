"""The band beside a step: by what its seconds rest on, with errors that the receipts hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plan_measured import COMMON, CPU_CASES
from colossus import api
from colossus.derive import to_plan
from colossus.hardware.machine import Machine
from colossus.job import load_job
from colossus.planner.plan import make_plan
from colossus.planner.report import text
from colossus.planner.trust import FORMULAS, NO_TABLE, PUBLISHED, TABLE, UNSEEN

RECEIPTS = Path(__file__).resolve().parents[2] / "benchmarks" / "receipts"
ONE = [f"layout.{name}=1" for name in ("dp_shard", "tp", "pp", "cp", "ep", "micro_batch")]


def receipt(name: str) -> dict:
    return json.loads((RECEIPTS / f"{name}.json").read_text())


def test_errors_of_accelerators_are_those_of_held_out_runs() -> None:
    figures = {figure["name"]: figure["value"] for figure in receipt("plan_accuracy")["figures"]}
    sets = {("ampere", "dense models"): "A100 dense"} | {
        (generation.lower(), kind): f"{generation} {kind.split()[0]}"
        for generation in ("Hopper", "Blackwell")
        for kind in ("dense models", "experts")
    }
    assert {key: round(figures[f"{name}: p90"] / 100, 2) for key, name in sets.items()} == PUBLISHED
    kinds = {"dense": "dense models", "experts": "experts"}
    less = {name: round(figures[f"Hopper {kind}, no table: p90"] / 100, 2) for kind, name in kinds.items()}
    assert less == NO_TABLE
    for kind, name in kinds.items():
        others = [value for key, value in figures.items() if f" {kind}, as " in key]
        assert len(others) == (6 if kind == "dense" else 4) and round(max(others) / 100, 2) == UNSEEN[name]


def test_errors_of_processors_are_those_of_measured_jobs() -> None:
    """With the calibration that was made, as the receipt has it; without one, planned again."""
    made = receipt("plan_measured")
    steps = {f["name"]: f for f in made["figures"] if f["name"].endswith(": step")}
    with_table = [abs(step["peer"] / step["value"] - 1) for step in steps.values()]
    assert np.quantile(with_table, 0.9) == pytest.approx(TABLE, abs=0.005)
    machine = Machine.from_json(json.dumps(made["hardware"]))
    alone = []
    for case in CPU_CASES:
        job = to_plan.with_model(load_job(None, [*case.words, *COMMON, "run.steps=11"]), machine)
        alone.append(make_plan(job, machine).best.seconds / steps[f"{case.name}: step"]["value"] - 1)
    assert np.quantile(np.abs(alone), 0.9) == pytest.approx(FORMULAS, abs=0.02)


def band(*words: str):
    return api.plan(
        load_job(None, [*words, *ONE, "fleet.count=1", "run.tokens=1e9", "run.global_batch=4"])
    ).band


@pytest.mark.parametrize(
    ("part", "share"),
    [
        ("h200-sxm", 0.19),
        ("b200-sxm", 0.24),
        ("a100-sxm-80", 0.35),
        ("mi325x", 0.48),
        ("h20", 0.48),
        ("gh200-96", 0.48),
    ],
)
def test_an_accelerator_has_the_band_of_its_generation(part: str, share: float) -> None:
    found = band("model=llama3.2-1b", f"fleet.accelerator={part}")
    assert found.share == pytest.approx(
        share, abs=0.005
    )  # all its shapes lie within the table, where there is one
    assert ("no run of dense models" in found.why) == (share == 0.48)


def test_experts_are_known_less_well() -> None:
    words = [
        "model=qwen3-30b-a3b",
        "model.num_layers=2",
        "model.max_seq_len=1024",
        "fleet.accelerator=h200-sxm",
    ]
    assert 0.33 <= band(*words).share <= 0.36
    ampere = band(*words[:-1], "fleet.accelerator=a100-sxm-80")
    assert ampere.share == 0.46 and "no run of experts" in ampere.why


def test_what_lies_beyond_measured_shapes_counts_as_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of an H200 as a processor's: a narrow model's products lie beyond it, a wide one's in it."""
    from colossus.hardware.calibration import of_accelerator
    from colossus.planner import measured
    from tests.derive.machines import machine

    far = ["model.hidden_size=128", "model.num_layers=1", "data.seq_len=64", "fleet.accelerator=h100-sxm"]
    found = band(*far)
    assert found.share == pytest.approx(NO_TABLE["dense models"], abs=0.01) and "lie beyond" in found.why

    monkeypatch.setattr(measured, "kept", lambda machine: of_accelerator("h200-sxm"))
    shares = []
    for width, tokens in ((2048, 4096), (64, 64)):
        words = [f"model.hidden_size={width}", "model.num_layers=1", "precision.type=bf16",
                 f"data.seq_len={tokens}"]  # fmt: skip
        job = to_plan.with_model(
            load_job(None, [*words, *ONE, "run.steps=5", "run.global_batch=4"]), machine()
        )
        made = make_plan(job, machine())
        shares.append(made.band.share)
        low, high = made.to_dict()["step_seconds_band"]
        assert [1 - low / made.best.seconds, high / made.best.seconds - 1] == pytest.approx(
            2 * [made.band.share]
        )
        assert f"{made.band.share:.0%} either way" in text(made)
    assert TABLE <= shares[0] < 0.25 and 0.3 < shares[1] <= FORMULAS
