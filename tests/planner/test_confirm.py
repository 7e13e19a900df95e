"""What a search found, asked for once more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

import colossus
from colossus.cli import main
from colossus.errors import MachineError, UserError
from colossus.job import load_job
from colossus.planner.choice import Choice
from colossus.planner.confirm import Answer, Confirmed, confirmed
from colossus.planner.estimate import Problem
from colossus.planner.report import text
from colossus.planner.search import Found, search
from tests.dryrun.workers import kept_workers

SMALL = ["model=llama3.2-1b", "fleet=dgx-h100-1", "run.tokens=1e9"]
# Layers as they are written, so that a dry run is what is planned; in a pipeline, so that ranks differ.
AXES = ["layout.pp=2", "layout.tp=1", "layout.cp=1", "layout.compile=false", "run.global_batch=16",
        "model.num_layers=4", "layout.schedule=1f1b", "layout.stages_per_rank=1", "layout.dp_shard=4",
        "layout.micro_batch=1", "layout.zero=2", "layout.recompute=none"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def workers() -> Iterator[None]:
    with kept_workers():
        yield


@pytest.fixture(scope="module")
def found() -> tuple[Found, Problem]:
    made = colossus.plan(load_job(None, SMALL))
    return search(made.problem, made.limits), made.problem


def needing(*sizes: float):
    """Answers of so many bytes, of the 100 that there are, in the order of the choices."""
    left = list(sizes)
    return lambda problem, choice: Answer(choice, left.pop(0), 100.0, 1)


def test_the_quickest_that_fits_is_the_best(found: tuple[Found, Problem]) -> None:
    whole, problem = found
    left, said = confirmed(whole, problem, needing(101, 100.5, 100))
    assert left.choices == whole.choices[2:]
    assert said.best is not None and said.best.choice == whole.choices[2]
    assert [answer.choice for answer in said.refused] == list(whole.choices[:2])


def test_where_none_fits_all_are_shown_and_it_is_said(found: tuple[Found, Problem]) -> None:
    whole, problem = found
    left, said = confirmed(whole, problem, needing(*[101.0] * len(whole.choices)))
    assert left == whole and said.none_fits and len(said.refused) == len(whole.choices)


@pytest.mark.parametrize("kind", [UserError, MachineError])
def test_what_cannot_be_run_dry_is_planned_by_formulas(
    kind: type[Exception], found: tuple[Found, Problem]
) -> None:
    def fails(problem: Problem, choice: Choice) -> Answer:
        raise kind("a module that cannot be traced")

    whole, problem = found
    left, said = confirmed(whole, problem, fails)
    assert left == whole and said == Confirmed(why="a module that cannot be traced") and not said.none_fits


def test_the_answer_is_that_of_the_dry_run_of_the_whole_world() -> None:
    """And the plan says what its memory rests on."""
    asked = colossus.plan(load_job(None, [*SMALL, *AXES]), confirm=True)
    run = colossus.dry_run(load_job(None, [*SMALL, *AXES]))
    assert run.job.layout.schedule == asked.best.row["schedule"]
    assert asked.confirmed.best is not None
    assert asked.confirmed.best.reserved == pytest.approx(run.worst.reserved, rel=0.001)
    assert asked.confirmed.best.capacity == run.worst.kind.accelerator.memory
    assert "fits      dry runs of" in text(asked) and "by dry runs of the program" in text(asked)
    refused = replace(asked, confirmed=Confirmed(refused=(asked.confirmed.best,)))
    assert "fits      by formulas alone" in text(refused) and "refused   " in text(refused)


def test_the_verb_asks_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=gpt2-124m", "fleet=dgx-h100-1", "layout.tp=1", "layout.pp=1", "layout.micro_batch=1"]
    assert main(["plan", *words, "run.tokens=1e9", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["dry_run_reserved_bytes"] == pytest.approx(data["reserved_bytes"], rel=0.3)
    assert data["refused"] == []


def test_the_verb_says_no_where_the_program_never_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("colossus.dryrun.confirm.confirm", lambda job, say: needing(*[101.0] * 8))
    assert main(["plan", *SMALL, "layout.tp=1", "layout.pp=1"]) == 1
    assert "dry runs of the program need more than there is" in capsys.readouterr().out
