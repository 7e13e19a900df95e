"""Decisions: made once, by rank 0, on disk before they hold, replayed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from colossus.events import EventLog
from colossus.job import Job
from colossus.parallel.world import World
from colossus.trainer import training as training_module
from colossus.trainer.decisions import CLOCK_FOLLOWS, Decision, Decisions, to_follow
from colossus.trainer.training import _settle_machine

ALONE = World(0, 1, torch.device("cpu"))
Make = Callable[..., Job]


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def refuse() -> object:
    raise AssertionError("what is known is not decided again")


def test_what_holds_at_a_step() -> None:
    decisions = Decisions(
        [Decision("a", 1, 0), Decision("b", 5, 3), Decision("a", 2, 10), Decision("a", 3, 10)]
    )
    assert [decisions.get("a", step) for step in (0, 9, 10, 99)] == [1, 1, 3, 3]
    assert decisions.get("b", 2) is None and decisions.get("c", 99) is None
    assert [d.name for d in decisions.to_come(3)] == ["b", "a", "a"]


def test_a_decision_is_on_disk_before_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path)
    decisions = Decisions()
    sizes: list[int] = []  # of what is synced
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))

    def choose() -> int:
        assert not (tmp_path / "events.jsonl").read_text()
        return 7

    assert decisions.decide("x", 4, choose, ALONE, log) == 7
    assert sizes == [(tmp_path / "events.jsonl").stat().st_size]
    assert [(e["kind"], e["step"], e["name"], e["value"]) for e in lines(tmp_path)] == [
        ("decision", 4, "x", 7)
    ]
    assert decisions.decide("x", 4, refuse, ALONE, log) == 7
    decisions.record(Decision("x", 7, 4), log)
    assert len(lines(tmp_path)) == 1


def test_those_of_a_checkpoint_and_of_the_log_are_merged(tmp_path: Path) -> None:
    """The log of a run knows more than its last checkpoint; one that lost its log knows the checkpoint's."""
    log = EventLog(tmp_path)
    decisions = Decisions()
    for name, step in (("a", 0), ("b", 2), ("a", 5)):
        decisions.record(Decision(name, {"n": step, "xs": [1.5, None]}, step), log)
    saved = json.loads(json.dumps(decisions.to_list()[:2]))
    merged = Decisions.merge(saved, lines(tmp_path))  # type: ignore[arg-type]
    assert list(merged) == list(decisions)
    assert list(Decisions.merge(saved)) == list(decisions)[:2]


def test_a_follower_has_the_other_run_s_decisions_and_no_clock() -> None:
    made = [{"name": "decay", "value": {"begin_step": 5}, "first_step": 5, "kind": "decision"}]
    first, *rest = to_follow(made)
    assert (first.name, first.value, first.first_step) == (CLOCK_FOLLOWS, True, 0)
    assert rest == [Decision("decay", {"begin_step": 5}, 5)]


def settle(job: Job, decisions: Decisions, step: int) -> Job:
    threads = torch.get_num_threads()
    try:
        return _settle_machine(job, decisions, step, ALONE, None)
    finally:
        torch.set_num_threads(threads)


def test_the_machine_s_settings_are_decided_once(small_job: Make) -> None:
    job = small_job("run")
    decisions = Decisions()
    assert settle(job, decisions, 0) == job
    (decided,) = decisions
    assert decided.name == "machine" and decided.first_step == 0
    assert {"type", "threads", "compile", "processor", "ranks"} <= set(decided.value)
    assert settle(job, decisions, 8) == job
    assert len(list(decisions)) == 1


def test_another_processor_is_asked_anew(small_job: Make) -> None:
    """What the user asked for stays; the rest is chosen by what this machine is quick in."""
    job = small_job("run", "run.threads=1", "precision.type=fp32")
    before = {"processor": "another", "ranks": 1, "type": "bf16", "threads": 64, "compile": True}
    decisions = Decisions([Decision("machine", before, 0)])
    settled = settle(job, decisions, 8)
    assert (settled.precision.type, settled.run.threads, settled.layout.compile) == ("fp32", 1, False)
    assert [d.first_step for d in decisions] == [0, 8]


def test_what_the_user_changed_between_attempts_holds(small_job: Make) -> None:
    decisions = Decisions()
    settle(small_job("run", "run.threads=1"), decisions, 0)
    settled = settle(small_job("run", "run.threads=2"), decisions, 8)
    assert settled.run.threads == 2
    assert [d.value["threads"] for d in decisions] == [1, 2]


@pytest.mark.parametrize("origin", ["derived", "argument"])
def test_what_was_derived_gives_way_to_what_was_decided(small_job: Make, origin: str) -> None:
    job = small_job("run", "run.threads=1")
    decisions = Decisions()
    settle(job, decisions, 0)
    again = job.put({"run.threads": 3}, origin)
    assert settle(again, decisions, 4).run.threads == (1 if origin == "derived" else 3)


def test_the_kernel_of_attention_is_decided_once(small_job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes bits, so that a run keeps it, whatever is timed later."""
    monkeypatch.setattr(training_module, "fused_is_quicker", lambda *_: True)
    job, decisions = small_job("run"), Decisions()
    settle(job, decisions, 0)
    monkeypatch.setattr(training_module, "fused_is_quicker", lambda *_: False)
    settle(job, decisions, 4)
    assert [d.value["attention"] for d in decisions] == ["fused"]
    assert [d.value["equal_groups"] for d in decisions] == [False]  # there are no experts
    older = Decision("machine", {k: v for k, v in next(iter(decisions)).value.items() if k != "attention"}, 0)
    decisions = Decisions([older])
    settle(job, decisions, 4)
    assert list(decisions) == [older]  # which means plain products
