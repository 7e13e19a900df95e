"""A calibration of this machine, from the timings to a plan that rests on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossus import api
from colossus.hardware import calibration as table
from colossus.hardware.calibration import Calibration
from colossus.job import load_job
from colossus.measure.calibrate import calibrate, in_words
from colossus.measure.loopback import message_timings
from colossus.measure.machine import this_machine

SMALL = ["model.hidden_size=128", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=1000",
         "data.seq_len=256", "run.global_batch=8", "layout.compile=false"]  # fmt: skip


@pytest.fixture(scope="module")
def made() -> Calibration:
    said: list[str] = []
    found = calibrate(this_machine(), said.append, quick=True)
    assert said[0].startswith("products in ")
    return found


def test_a_table_is_read_as_it_was_written(made: Calibration) -> None:
    again = Calibration.from_json(made.to_json())
    assert again == made
    assert "timings in" in in_words(made) and "product" in in_words(made)
    kinds = {timing.kind for timing in made.timings}
    assert {"product", "attention", "layer", "loss", "update", "copy"} <= kinds


def test_a_plan_rests_on_the_table(
    made: Calibration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path))
    machine = this_machine()
    job = load_job(None, SMALL)
    before = api.plan(job)
    assert dict(before.basis)["products"] == "this machine's rate of large products, and formulas"
    table.keep(made, machine)
    assert table.kept(machine) == made
    after = api.plan(job)
    assert machine.processor in dict(after.basis)["products"]
    assert after.best.seconds != before.best.seconds


def test_a_damaged_table_is_no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLOSSUS_CACHE", str(tmp_path))
    path = table.kept_file(this_machine())
    path.parent.mkdir(parents=True)
    path.write_text('{"device": "cpu"')
    assert table.kept(this_machine()) is None


def test_messages_between_two_ranks_take_longer_the_more_they_carry() -> None:
    timings = [t for t in message_timings("cpu", 2) if t.kind == "all_gather"]
    assert len(timings) == 5
    assert timings[-1].seconds > 5 * timings[0].seconds
    assert message_timings("cpu", 1) == []
