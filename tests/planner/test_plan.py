"""The verb: what it says and writes, what it refuses; without PyTorch."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import colossus
from colossus import api
from colossus.cli import main
from colossus.derive import to_plan
from colossus.errors import UserError
from colossus.job import load_job
from colossus.layout import violations
from colossus.planner.report import hardware_text, page, text, waterfall
from colossus.planner.sensitivity import by_batch, days_by_count, days_if

SMALL = ["model=llama3.2-1b", "fleet=dgx-h100-1", "run.tokens=1e9"]


@pytest.fixture(scope="module")
def made():
    return colossus.plan(load_job(None, SMALL))


@pytest.fixture(scope="module")
def narrow():
    """Of few layouts, whose whole report is quick."""
    return colossus.plan(load_job(None, [*SMALL, "layout.tp=1", "layout.pp=1"]))


@pytest.fixture(scope="module")
def said(narrow):
    return text(narrow)


def test_a_plan_says_everything_that_is_asked(made, said):
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


QUANTITY = re.compile(r"(\d[\d.,]*) ?(s|ms|us|GiB|MiB|KiB|Wh|kWh|MWh|GWh|W|kW|MW|h|min)\b")


def test_every_quantity_has_the_unit_of_its_size(narrow, said):
    """A step of seconds, a run of an hour on eight GPUs: nothing is 0.000 of anything."""
    for words in (said, page(narrow, said, days_by_count(narrow), days_if(narrow))):
        assert "million" not in words and "e-0" not in words and "0.000" not in words
        numbers = [(float(n.replace(",", "")), unit) for n, unit in QUANTITY.findall(words)]
        assert len(numbers) > 20
        assert not [pair for pair in numbers if 0 < pair[0] < 0.1], words
    assert "kWh" in said and "GWh" not in said and "between pods" not in said
    assert re.search(r"1 in \d+ days", said)


def test_lines_about_pods_stand_where_a_run_spans_several():
    words = ["model=llama3.1-8b", "fleet=colossus-100k", "fleet.count=1024", "run.tokens=1e12", "layout.tp=1",
             "layout.pp=1", "layout.cp=1", "layout.micro_batch=1"]  # fmt: skip
    said = text(colossus.plan(load_job(None, words)))
    assert "network between pods 4 times slower" in said and "MWh" in said and "spare servers" in said


def test_time_is_shown_against_batch(narrow, said):
    rows = by_batch(narrow)
    assert [row.sequences for row in rows] == [narrow.global_batch * n // 4 for n in (1, 2, 4, 8, 16)]
    mine = rows[2]
    assert mine.seconds == narrow.best.seconds and mine.share == 1
    assert mine.days == pytest.approx((narrow.low.days + narrow.high.days) / 2, rel=0.01)
    steps = [narrow.tokens / (row.sequences * narrow.seq_len) for row in rows]
    assert [row.days for row in rows] == pytest.approx(
        [row.seconds * n / 86400 for row, n in zip(rows, steps, strict=True)], rel=0.01
    )
    assert rows[4].more == pytest.approx(16 * rows[0].more) and rows[4].days <= rows[0].days
    assert f"{narrow.global_batch:>10,}" in said and "this plan" in said


def test_a_part_of_the_fleet_is_all_that_other_batches_have():
    words = [
        "model=llama3.2-1b",
        "fleet=dgx-h100-2",
        "run.tokens=1e9",
        "layout.tp=1",
        "layout.pp=1",
        "layout.cp=1",
    ]
    made = colossus.plan(load_job(None, words), aim="cost")
    assert made.hardware.count < 16 and made.problem.pricer.hardware == made.hardware
    assert all(0 < row.share <= 1 for row in by_batch(made))


def test_a_batch_that_cannot_feed_the_fleet_says_so():
    words = ["model=llama3.2-1b", "fleet=dgx-h100-1", "run.tokens=1e9", "run.global_batch=4", "layout.tp=1",
             "layout.pp=1", "layout.cp=1"]  # fmt: skip
    rows = by_batch(colossus.plan(load_job(None, words)))
    assert {row.sequences: row.share for row in rows} == {1: 1 / 8, 2: 2 / 8, 4: 4 / 8, 8: 1.0, 16: 1.0}


def test_the_waterfall_ends_at_the_whole(made):
    """And what is left before failures is the MFU: attention's own FLOPs are no loss."""
    found = dict(waterfall(made))
    assert sum(found.values()) == pytest.approx(100)
    assert min(found.values()) >= 0
    assert found["goodput"] + found["failures, where many"] == pytest.approx(100 * made.best.mfu)
    assert 0 < made.high.goodput.share < 1
    assert found["goodput"] == pytest.approx(100 * made.best.mfu * made.high.goodput.share)
    arch, seconds, parts = made.arch, made.best.seconds, made.best.parts
    # 6 x heads x width of a head x half of the keys, for scores and for values
    flops = made.global_batch * made.seq_len * 6 * 16 * 32 * 64 * (made.seq_len + 1)
    at_peak = flops / (8 * made.hardware.accelerator.bf16)
    assert (arch.num_layers, arch.num_heads, arch.head_dim) == (16, 32, 64)
    lost = 100 * (parts["attention"] - at_peak) / seconds
    assert found["attention below the peak"] == pytest.approx(lost, rel=0.01)


def test_choices_of_the_table_differ(made):
    rows = [tuple(c.row[n] for n in ("tp", "cp", "pp", "ep", "recompute")) for c in made.table]
    assert len(set(rows)) == len(rows) == 8
    assert len({row[:2] for row in rows}) > 2  # not one shape in eight spellings
    assert [c.seconds for c in made.table] == sorted(c.seconds for c in made.table)
    assert made.table[-1].seconds < 1.6 * made.best.seconds
    deep = colossus.plan(
        load_job(None, ["model=llama3.1-70b", "fleet=dgx-h100-8", "layout.tp=8", "layout.cp=1"])
    )
    alike = [tuple(c.row[n] for n in ("ep", "recompute")) for c in deep.table]
    assert max(alike.count(kind) for kind in alike) <= 2


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
                "--formulas",
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
    assert main(["plan", *SMALL, "layout.tp=1", "layout.pp=1", "--json", "--formulas"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["layout"]["tp"] == 1 and data["few_failures"]["goodput"]["share"] <= 1


def test_hardware_is_shown_as_a_table(capsys):
    assert main(["plan", "--hardware"]) == 0
    assert capsys.readouterr().out.strip() == hardware_text().strip()
    assert "h200-sxm" in hardware_text() and "dgx-h100" in hardware_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fleet=dgx-h100-1"], "model.hidden_size: must be given to plan for another machine, or run.t"),
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
    assert "model.hidden_size" in capsys.readouterr().err


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


@pytest.mark.parametrize("words", [SMALL, ["model.hidden_size=256", *SMALL[1:]], SMALL[1:]])
def test_a_plan_needs_no_pytorch(words):
    """Nor does a model that is described, or chosen by the length of the run."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from colossus.cli import main\n"
        f"sys.exit(main(['plan', *{words!r}, 'layout.tp=1', 'layout.pp=1', 'layout.cp=1']))"
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


def test_what_is_given_is_refused_by_the_first_step_at_which_it_is_wrong():
    for words, said in [
        (["layout.tp=2", "data.seq_len=64", "data.phases=[{from_step=4,seq_len=63}]"],
         "layout.tp=2: from step 4 on: tp x cp must divide the 63 tokens"),
        (["layout.dp_shard=8", "run.batch_schedule=[[0,64],[5,6]]"],
         "run.global_batch=6: from step 5 on: fewer sequences than the 8 data-parallel ranks"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as error:
            colossus.plan(load_job(None, [*SMALL, *words]))
        assert said in str(error.value)


def test_unequal_pools_share_every_batch_of_the_run():
    """A later batch is shared in the proportions of the first, by whole sequences."""
    pools = "[{accelerator='h100-sxm', count=16}, {accelerator='h200-sxm', count=8}]"
    job = load_job(None, ["model=llama3.2-1b", f"fleet.pools={pools}", "run.steps=90", "layout.tp=1",
                          "layout.pp=2", "layout.schedule=interleaved_1f1b", "layout.dp_shard=1",
                          "run.batch_schedule=[[0,120],[5,84]]"])  # fmt: skip
    plan = colossus.plan(job)
    layout = to_plan.planned(job, plan).layout
    assert len(layout.pools) == 2
    later = [(5, 84, plan.seq_len)]
    assert not violations(layout, plan.arch, global_batch=120, seq_len=plan.seq_len, later=later)


POOLS = ["model=llama3.1-8b", "fleet.accelerator=h100-sxm", "fleet.count=16", "layout.dp_replicate=2",
         "layout.dp_shard=8", "run.global_batch=64", "run.steps=90"]  # fmt: skip


@pytest.mark.parametrize(
    ("shares", "own", "micro_batch"), [((56, 8), "", 1), ((32, 32), "", 2), ((56, 8), ", micro_batch=1", 2)]
)
def test_no_rank_of_a_pool_computes_more_at_once_than_its_share(shares, own, micro_batch):
    """Unless that pool says itself how many."""
    first, second = (f"{{replicas=1, share={share}{own if share == 8 else ''}}}" for share in shares)
    job = load_job(None, [*POOLS, f"layout.pools=[{first}, {second}]"])
    plan = colossus.plan(job)
    assert plan.best.row["micro_batch"] == micro_batch
    layout = to_plan.planned(job, plan).layout
    assert not violations(layout, plan.arch, global_batch=64, seq_len=plan.seq_len)
    assert any("equal shares" in words for words in plan.assumptions)


def test_shares_of_pools_say_the_batch():
    pools = "layout.pools=[{replicas=1, share=40}, {replicas=1, share=8}]"
    words = [word for word in POOLS if not word.startswith("run.global_batch")]
    plan = colossus.plan(load_job(None, [*words, pools]))
    assert plan.global_batch == 48 and plan.best.row["micro_batch"] == 1


def test_a_micro_batch_that_a_pool_has_no_sequences_for_is_refused():
    pools = "layout.pools=[{replicas=1, share=56}, {replicas=1, share=8}]"
    with pytest.raises(
        UserError, match=r"^layout.pools\[1\]: layout.micro_batch=2: more than a rank's share.*; 1"
    ):
        colossus.plan(load_job(None, [*POOLS, pools, "layout.micro_batch=2"]))


@pytest.mark.parametrize(
    ("counts", "replicas", "why"),
    [
        ((5, 3), None, "6 accelerators work, 2 are idle: of no kind are there enough for a replica more"),
        ((6, 4), 4, "8 accelerators work, 2 are idle: no layout searched is better with them"),
    ],
)
def test_of_unequal_pools_it_is_true_why_some_are_idle(counts, replicas, why):
    """A replica of two, of one kind: of 5 and 3 one of each kind is left, of 6 and 4 there are two of one."""
    pools = f"[{{accelerator='h100-sxm', count={counts[0]}}}, {{accelerator='h200-sxm', count={counts[1]}}}]"
    fixed = [] if replicas is None else [f"layout.dp_replicate={replicas}"]
    job = load_job(None, ["model=llama3.2-1b", f"fleet.pools={pools}", "run.steps=90", "run.global_batch=128",
                          "layout.tp=2", "layout.cp=1", "layout.pp=1", "layout.dp_shard=1",
                          "layout.micro_batch=1", "layout.recompute=full", *fixed])  # fmt: skip
    assert colossus.plan(job).use() == why


@pytest.mark.parametrize(
    "words",
    [
        ["model=llama3.1-8b", "fleet.accelerator=h100-sxm", "fleet.count=7"],
        ["model=llama3.1-8b", "fleet=dgx-h100-1", "layout.cp=1"],
        ["model=llama2-13b", "fleet=dgx-h100-8", "layout.pp=7"],
    ],
    ids=" ".join,
)
def test_no_choice_only_recomputes_more_than_a_quicker_one(words):
    """What is slower for more recomputation is shown where that frees memory."""
    table = colossus.plan(load_job(None, words)).table
    assert len(table) > 1
    pairs = [(a, b) for i, a in enumerate(table) for b in table[i + 1 :]]
    for quick, slow in pairs:
        if quick.name.partition(" recompute=")[0] == slow.name.partition(" recompute=")[0]:
            assert slow.reserved < 0.9 * quick.reserved, (quick.name, slow.name)


def test_one_micro_batch_is_one(narrow):
    one, two = (dataclasses.replace(narrow, best=dataclasses.replace(narrow.best, micro_batches=n))
                for n in (1, 2))  # fmt: skip
    assert "1 micro-batch a step\n" in text(one) and "2 micro-batches a step\n" in text(two)
    assert "; 1 layout priced\n" in text(dataclasses.replace(narrow, priced=1))
