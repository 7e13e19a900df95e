"""Experts that are not visited alike: as declared, beside real ranks whose routers do so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from colossus.cli import main
from colossus.dryrun.mend import _rank_of
from colossus.dryrun.ranks import Judged, Kind, _price, kinds_of
from colossus.dryrun.routing import Routing, routing_of, rows_of
from colossus.dryrun.rows import GATED, Rows
from colossus.dryrun.work import Pass
from colossus.errors import UserError
from colossus.hardware.fleets import hardware_of
from colossus.layout import Layout
from colossus.parallel.mesh import Place
from colossus.planner.measured import corrections_for
from tests.dryrun.programs import allocated_routed, dry, really_routed
from tests.dryrun.test_price import H100, on_gpus, priced, problem
from tests.dryrun.test_rank import plain
from tests.ranks.cases import Case
from tests.ranks.pool import Pool

MIXTRAL = "mixtral-8x7b"
FOUR = {"experts.num_experts": 4, "experts.per_token": 2}
WIDE = FOUR | {"hidden_size": 128, "intermediate_size": 256, "num_layers": 2}
SHARES = (0.4375, 0.3125, 0.1875, 0.0625)  # of 4 experts; of two ranks that have two each, 3/4 and 1/4
CASES = [
    Case.of(WIDE, ep=2, dp_shard=2, preset=MIXTRAL, seq_len=128, batch=4, type="fp32"),
    Case.of(WIDE, ep=2, etp=2, tp=2, dp_shard=2, recompute="full", preset=MIXTRAL, seq_len=128, batch=4,
            type="fp32"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_declared_histogram_is_what_real_ranks_do_whose_routers_follow_it(case: Case, pool: Pool) -> None:
    """Every message with its bytes, every product, weights; and the most that lives at once."""
    job, routing = case.job(), Routing(SHARES)
    real = pool.run(job.layout.num_ranks, really_routed, job, SHARES)
    flops, peaks = [], []
    for rank in (0, len(real) - 1):
        (found,), done = pool.run(1, dry, job, rank, routing), real[rank]
        ((most, _),) = pool.run(1, allocated_routed, job, rank, SHARES)
        assert plain(found.messages) == plain(done.messages), f"rank {rank}"
        assert sum(found.flops.values()) == done.flops
        assert found.at_rest["weights"] == done.weights
        assert found.peak.num_bytes == pytest.approx(most, rel=0.01)
        flops.append(done.flops)
        peaks.append(found.peak.num_bytes)
    assert flops[0] > 1.3 * flops[1] and peaks[0] > 1.15 * peaks[1]


def test_rows_are_dealt_out_whole() -> None:
    assert rows_of([1.0, 1.0, 1.0, 1.0], 10) == [3, 3, 2, 2]
    assert rows_of([2.0, 1.5, 0.5, 0.0], 10) == [5, 4, 1, 0]
    assert rows_of([0.1 + 0.2, 1.7], 20) == [3, 17]


ARCH = Case.of({"experts.num_experts": 8, "experts.per_token": 2}, preset=MIXTRAL).arch


def test_what_is_declared_becomes_shares(tmp_path: Path) -> None:
    all_of = routing_of("4,2,1,1, 0,0,0,0", ARCH)
    assert all_of.shares == (0.5, 0.25, 0.125, 0.125, 0, 0, 0, 0)
    assert routing_of([8, 4, 2, 2, 0, 0, 0, 0], ARCH).shares == all_of.shares
    (tmp_path / "shares.json").write_text("[4, 2, 1, 1,\n 0, 0, 0, 0]\n")
    assert routing_of(tmp_path / "shares.json", ARCH).shares == all_of.shares
    busiest = routing_of("3,2", ARCH)
    assert busiest.shares == pytest.approx((3 / 8, 2 / 8, *[0.5 / 8] * 6))
    assert busiest.loads(4) == pytest.approx([2.5, 0.5, 0.5, 0.5])
    assert busiest.loads(1) == [1.0]
    assert routing_of("1,1,1,1,1,1,1,1", ARCH).kinds(4) == [(0, 4)]
    assert all_of.kinds(8) == [(0, 1), (1, 7)]
    assert routing_of("1,1,1,1,1,1,2,2", ARCH).kinds(4) == [(3, 1), (0, 3)]


def test_a_run_has_what_its_busiest_expert_got_at_most(tmp_path: Path) -> None:
    steps = [{"expert_load_mean": 1.2}, {"expert_load_mean": 2.5}, {"expert_load_mean": 1.1}, {}]
    lines = [
        {"schema": 1, "kind": "step", "attempt": 0, "run_seconds": i, "step": i, **step}
        for i, step in enumerate(steps)
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = routing_of(tmp_path, ARCH)
    assert found.loads(8)[0] == 2.5 and f"as in step 1 of {tmp_path}" in found.said
    for last in (lines[-1], lines[-1] | {"expert_load_mean": "nan"}):  # of a run gone wrong
        (tmp_path / "events.jsonl").write_text(json.dumps(last) + "\n")
        with pytest.raises(UserError, match="no step of it has measured expert_load_mean"):
            routing_of(tmp_path, ARCH)


@pytest.mark.parametrize("load", ["x", 0.5, True, []])
def test_damaged_events_are_told_with_their_step(load: object, tmp_path: Path) -> None:
    line = {"schema": 1, "kind": "step", "attempt": 0, "run_seconds": 1, "step": 7, "expert_load_mean": load}
    (tmp_path / "events.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"events are damaged: in step 7 expert_load_mean is .*1 to 4 times"):
        routing_of(tmp_path, ARCH)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("1,2,3,4,5,6,7,8,9", "9 numbers; 1 to 8"),
        ("", "0 numbers; 1 to 8"),
        ("1,-2", "-2 is no share of tokens; finite numbers from 0 on"),
        ("nan", "nan is no share"),
        ("0,0,0,0,0,0,0,0", "the sum is 0; at least one expert"),
        ("0.5", "each at least 1, together at most 8"),
        ("4,4,1", "each at least 1, together at most 8"),
        ("5", "5 times the mean; at most 4, since each token visits 2 different ones of 8"),
        ("9,1,1,1,1,1,1,1", "4.5 times the mean; at most 4"),
        ("4.0001", "4.0001 times the mean; at most 4"),
        ("nowhere", "must be numbers, a file of them, or the folder of a run"),
    ],
)
def test_what_no_router_does_is_refused(given: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^--routing {given}: .*{said}"):
        routing_of(given, ARCH)


def test_words_in_a_file_and_models_without_experts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("some words")
    with pytest.raises(UserError, match="has words that are no numbers; must be numbers"):
        routing_of(tmp_path / "words", ARCH)
    (tmp_path / "bytes").write_bytes(b"\x00\x01\xff")
    with pytest.raises(UserError, match="bytes: is no text; must be numbers"):
        routing_of(tmp_path / "bytes", ARCH)
    (tmp_path / "long").write_text("1 " * 600_000)
    with pytest.raises(UserError, match=r"long: longer than 1048576 bytes.*; must be numbers"):
        routing_of(tmp_path / "long", ARCH)
    with pytest.raises(UserError, match=r"--routing 2,1: the model has no experts; only with model\.experts"):
        routing_of([2.0, 1.0], Case.of().arch)


def test_the_rank_that_gets_most_is_one_of_its_own() -> None:
    """On every stage: of four ranks of ep the last, whose experts have two columns of ranks each."""
    layout = Layout(dp_shard=4, pp=2, tp=2, ep=4, etp=2).filled()
    case = Case.of({"experts.num_experts": 8, "experts.per_token": 2}, preset=MIXTRAL)
    job, routing = dataclasses.replace(on_gpus(case), layout=layout), routing_of("1,1,1,1,1,1,2,2", ARCH)
    hardware = hardware_of(H100)
    found = [
        (kind.rank, kind.stage, kind.count, kind.load, kind.is_waited_for)
        for kind in kinds_of(job, hardware, 8, routing=routing)
    ]
    assert found == [
        (6, 0, 2, 1.6, True),
        (0, 0, 6, 0.8, False),
        (14, 1, 2, 1.6, True),
        (8, 1, 6, 0.8, False),
    ]
    assert [Place.of(layout, rank).ep(layout) for rank in range(16)] == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    (alone,) = kinds_of(job, hardware, 8, 9, routing)
    assert (alone.rank, alone.count, alone.load, alone.is_waited_for) == (9, 6, 0.8, False)
    assert [_rank_of(job, stage, routing) for stage in (0, 1)] == [6, 14]
    assert _rank_of(job, 1, None) == 8


PRICED = Case.of(FOUR | {"hidden_size": 1024, "intermediate_size": 4096}, preset=MIXTRAL, dp_shard=2, ep=2,
                 seq_len=1024, type="bf16")  # fmt: skip


def test_a_step_takes_what_its_fullest_rank_takes(pool: Pool) -> None:
    """Products of experts as many more as that rank has rows; what lies between them, too; nothing else."""
    routing = Routing(SHARES)
    load = routing.loads(2)[0]
    alike, full = (pool.run(1, dry, on_gpus(PRICED), 0, each)[0] for each in (None, routing))
    of = {
        name: priced(PRICED, [each], load=by)
        for name, each, by in (("alike", alike, 1.0), ("full", full, load))
    }
    assert of["alike"].seconds * 1.02 < of["full"].seconds < of["alike"].seconds * load

    hardware, job = hardware_of(H100), on_gpus(PRICED)
    kinds = [
        Kind(1, 1, 0, 0, 4, hardware.accelerator, 2 - load, False),
        Kind(0, 1, 0, 0, 4, hardware.accelerator, load),
    ]
    both = [Judged(kind, traced, 0.0) for kind, traced in zip(kinds, (alike, full), strict=True)]
    assert _price(job, hardware, corrections_for(hardware), both) == of["full"]
    assert _price(job, hardware, None, both[:1]) is None

    def grouped(traced: object) -> float:
        works = [each for done in traced.passes.values() for each in done.items()]  # type: ignore[attr-defined]
        return sum(work.flops * times for work, times in works if getattr(work, "kind", "") == "grouped")

    assert grouped(full) == load * grouped(alike)
    layout, problem_ = PRICED.job().layout, problem(PRICED)
    made = problem_.shape(layout.schedule, layout.pp, 1)
    between = [
        {row.name: row.bytes for row in Rows(problem_, layout, made, by).between(Pass("F", 0, 0))}
        for by in (1.0, load)
    ]
    changed = {name: between[1][name] / size for name, size in between[0].items() if size != between[1][name]}
    assert changed == {GATED: pytest.approx(load)}


def test_the_verb_runs_the_rank_that_gets_most(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dryrun", "model=mixtral-8x7b", "model.hidden_size=64", "model.num_layers=1", "fleet=dgx-h100-1"]
    words += ["model.intermediate_size=64", "model.num_heads=8", "model.head_dim=8", "model.vocab_size=256"]
    words += ["data.seq_len=32", "layout.ep=2", "layout.dp_shard=2", "layout.dp_replicate=1", "layout.pp=1"]
    words += ["run.global_batch=4", "layout.micro_batch=2"]
    assert main([*words, "--routing", "0,0,0,0,1,1,1,1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(rank["rank"], rank["expert_load"]) for rank in found["ranks"]] == [(1, 2.0), (0, 0.0)]
    assert found["expert_shares"] == [0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25]
    assert any("of 2 ranks of ep one gets 2.00 times the mean" in note for note in found["notes"])
    assert found["price"] is not None
    assert found["ranks"][0]["flops"]["forward"] > found["ranks"][1]["flops"]["forward"]
