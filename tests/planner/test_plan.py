"""The verb: what it says and writes, what it refuses; without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import colossus
from colossus import api
from colossus.cli import main
from colossus.errors import UserError
from colossus.job import load_job
from colossus.planner.report import hardware_text, text, waterfall

SMALL = ["model=llama3.2-1b", "fleet=dgx-h100-1", "run.tokens=1e9"]


@pytest.fixture(scope="module")
def made():
    return colossus.plan(load_job(None, SMALL))


def test_a_plan_says_everything_that_is_asked(made):
    said = text(made)
    for words in (
        "best ",
        "step ",
        "MFU",
        "binds",
        "next ",
        "measured",
        "goodput",
        "memory of the rank",
        "assumed",
    ):
        assert words in said, words
    assert made.low.days <= made.high.days
    assert made.best.seconds > 0 and 0.1 < made.best.mfu < 0.7
    assert made.tokens == 1e9


def test_the_waterfall_ends_at_the_whole(made):
    assert sum(points for _, points in waterfall(made)) == pytest.approx(100, abs=0.5)


def test_days_energy_and_money_follow_from_the_step(made):
    costs, hardware = made.low, made.hardware
    seconds = 1e9 / (made.global_batch * made.seq_len) * made.best.seconds / costs.goodput.share
    assert costs.days == pytest.approx(seconds / 86400)
    assert costs.money == pytest.approx(seconds / 3600 * 8 * hardware.usd_per_hour)
    assert costs.energy == pytest.approx(seconds / 3600 * 8 * hardware.watts * hardware.pue / 1e3)


def test_a_page_and_a_job_are_written(tmp_path: Path, capsys):
    page, job = tmp_path / "plan.html", tmp_path / "plan.toml"
    assert (
        main(
            [
                "plan",
                *SMALL,
                "layout.tp=1",
                "layout.pp=1",
                "layout.cp=1",
                "--html",
                str(page),
                "--job",
                str(job),
            ]
        )
        == 0
    )
    html = page.read_text()
    assert "<svg" in html and "http" not in html.split("</style>")[1].split("<pre>")[0]
    again = load_job(job, [])
    assert again.layout.tp == 1 and again.layout.micro_batch and again.run.global_batch
    assert "best " in capsys.readouterr().out


def test_json_is_plain_data(capsys):
    assert main(["plan", *SMALL, "layout.tp=1", "layout.pp=1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["layout"]["tp"] == 1 and data["few_failures"]["goodput"]["share"] <= 1


def test_hardware_is_shown_as_a_table(capsys):
    assert main(["plan", "--hardware"]) == 0
    assert capsys.readouterr().out.strip() == hardware_text().strip()
    assert "h200-sxm" in hardware_text() and "dgx-h100" in hardware_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fleet=dgx-h100-1"], "model.vocab_size, model.hidden_size, model.num_layers, model.num_"),
        (["model=llama3.1-8b", "fleet=colossus-10k"], "did you mean"),
        (["model=llama3.1-8b", "fleet=dgx-h100-1", "run.tokens=0"], "run.tokens"),
        (["model=llama3.1-8b", "fleet=dgx-h100-1", "fleet.accelerator=h101"], "h100"),
        (["model=llama3.1-8b", "fleet=colossus-200k", "fleet.count=7"], "two accounts"),
        (["model=llama3.1-8b", "fleet=dgx-h100-1", "run.tokens=1e9", "run.steps=5"], "give one of"),
    ],
)
def test_mistakes_are_told_in_a_line(words, said, capsys):
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_mistake_is_told_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(api, "calibrate", lambda say: pytest.fail("timed first"))
    assert main(["plan", "fleet=dgx-h100-1", "--calibrate"]) == 2
    assert "model.vocab_size" in capsys.readouterr().err


def test_a_calibration_alone_plans_nothing(monkeypatch, capsys):
    monkeypatch.setattr(api, "calibrate", lambda say: "a table")
    assert main(["plan", "--calibrate"]) == 0
    assert capsys.readouterr().out == "a table\n"


def test_a_model_that_does_not_fit_is_the_answer_no(capsys):
    assert main(["plan", "model=llama3.1-70b", "fleet=dgx-h100-1"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("no: ") and "memory binds" in said


def test_an_unknown_aim_is_refused():
    with pytest.raises(UserError, match="time, cost, energy"):
        colossus.plan(load_job(None, SMALL), aim="fame")


def test_a_plan_needs_no_pytorch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from colossus.cli import main\n"
        f"sys.exit(main(['plan', *{SMALL!r}, 'layout.tp=1', 'layout.pp=1', 'layout.cp=1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "best " in done.stdout


def test_muon_takes_longer_than_adamw_and_as_long_for_any_batch():
    words = ["model=llama3.2-1b", "fleet.accelerator=h100-sxm", "fleet.count=1", "layout.micro_batch=1",
             "layout.recompute=full"]  # fmt: skip

    def update(*more: str) -> float:
        return colossus.plan(load_job(None, [*words, *more])).best.parts["update"]

    adamw, muon = (
        [update(f"optimizer.name={name}", f"run.global_batch={batch}") for batch in (64, 128)]
        for name in ("adamw", "muon")
    )
    assert muon[0] - adamw[0] > 0.02
    assert muon[0] - adamw[0] == pytest.approx(muon[1] - adamw[1])
