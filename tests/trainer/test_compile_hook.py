"""Layers that are compiled in a run's first steps, on trial: a decision, replayed bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colossus import api
from colossus.derive.settings import Compiling
from colossus.job import Job
from colossus.trainer.hooks import Hook, compile
from colossus.trainer.training import Training
from tests.trainer.running import StopAt, assert_bitwise_equal, follower_of, run_of

Make = Callable[..., Job]


class Crash(Hook):
    """Ends the process's work before a step, with nothing more saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_step(self, training: Training) -> None:
        if training.step == self.step:
            training.saver.wait()
            raise ZeroDivisionError


class Seen(Hook):
    """Whether the layers were compiled, step by step; switches come before it."""

    def __init__(self) -> None:
        self.compiled: dict[int, bool] = {}

    def before_step(self, training: Training) -> None:
        layers = training.state.model.layers
        self.compiled[training.step] = all(layer._compiled_call_impl is not None for layer in layers)


Looks = list[tuple[float, bool]]  # a step's seconds, and whether other programs disturbed it


@pytest.fixture
def seen_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[Looks, Looks], None]:
    """A job whose first steps suggest that compiling pays; its looks, at eager steps and then at compiled
    ones, see what is given, and the last of each again and again."""

    def make(eager: Looks, compiled: Looks) -> None:
        looks = [iter(eager), iter(compiled)]
        now: dict[int, tuple[float, bool]] = {}
        real_look, real_judge = compile.Compile._look, compile.Compile._judge

        def look(self: compile.Compile, step: int) -> None:
            real_look(self, step)
            now[self._compiled] = next(looks[self._compiled], now.get(self._compiled, (1.0, False)))

        def judge(self: compile.Compile, training: Training, value: dict[str, Any]) -> Any:
            self._times, disturbed = [now[self._compiled][0]] * len(self._times), now[self._compiled][1]
            monkeypatch.setattr(compile.accounting, "was_disturbed", lambda *_: disturbed)
            return real_judge(self, training, value)

        monkeypatch.setattr(compile, "UNSTEADY", 1)
        monkeypatch.setattr(compile, "WATCHED", 2)
        monkeypatch.setattr(compile, "LOOKS", 3)
        monkeypatch.setattr(compile, "LOOK_SECONDS", 2.0)
        monkeypatch.setattr(compile, "expected_compiling", lambda *_: Compiling(2.0, 1.0))
        monkeypatch.setattr(compile.Compile, "_look", look)
        monkeypatch.setattr(compile.Compile, "_judge", judge)

    return make


@pytest.fixture
def likely(seen_as: Callable[[Looks, Looks], None]) -> Callable[[float], None]:
    """A job whose compiled steps gain so much, on a quiet machine."""
    return lambda gain: seen_as([(2.0, False)], [(2.0 / gain, False)])


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The gains that were kept for later runs."""
    gains: list[float | None] = []
    monkeypatch.setattr(compile, "keep_compiled", lambda *given: gains.append(given[-1].gain))
    return gains


def make_open(small_job: Make, name: str) -> Job:
    """A job of 12 steps in which compilation is left open."""
    job = small_job(name)
    assert not job.layout.compile
    return job.put({"layout.compile": False}, "derived")


def machine_decisions(job: Job) -> list[tuple[int, bool, float | None]]:
    found = (e for e in run_of(job).events("decision") if e["name"] == "machine")
    return [(e["first_step"], e["value"]["compile"], e["value"].get("compiled_gain")) for e in found]


def test_a_trial_that_gains_stays_and_is_replayed(
    small_job: Make, likely: Callable[[float], None], tmp_path: Path
) -> None:
    likely(1.25)
    job, seen = make_open(small_job, "crashed"), Seen()
    with pytest.raises(ZeroDivisionError):
        api.train(job, [seen, Crash(5)])  # on trial; what was taken is saved on the way out
    assert seen.compiled == {0: False, 1: False, 2: False, 3: True, 4: True, 5: True}
    api.train(job, [seen])
    assert machine_decisions(job) == [(0, False, None), (3, True, None), (8, True, 1.25)]
    assert [seen.compiled[step] for step in range(12)] == [False] * 3 + [True] * 9

    follower, again = follower_of(job, tmp_path / "follower"), Seen()
    api.train(follower, [again], follow=Path(job.run.folder))
    assert again.compiled == seen.compiled
    assert_bitwise_equal(job, follower)


def test_a_trial_that_gains_nothing_goes_back(small_job: Make, likely: Callable[[float], None]) -> None:
    likely(0.9)
    job, seen = make_open(small_job, "run"), Seen()
    api.train(job, [seen, StopAt(7)])
    api.train(job, [seen])
    assert machine_decisions(job) == [(0, False, None), (3, True, None), (6, False, 0.9)]
    assert [seen.compiled[step] for step in range(12)] == [False] * 3 + [True] * 3 + [False] * 6


def test_what_the_user_said_stays(small_job: Make, likely: Callable[[float], None]) -> None:
    likely(2.0)
    job, seen = small_job("run", "layout.compile=false"), Seen()
    api.train(job, [seen])
    assert machine_decisions(job) == [(0, False, None)] and not any(seen.compiled.values())


@pytest.mark.parametrize(
    ("eager", "compiled", "decided", "gains"),
    [
        # other programs slowed the first looks: the quiet ones count
        ([(3.0, True), (1.0, False)], [(1.0, False)], [(5, True, None), (8, False, 1.0)], [1.0]),
        ([(1.0, False)], [(2.0, True), (0.8, False)], [(3, True, None), (8, True, 1.25)], [1.25]),
        ([(1.0, False)], [(2.0, True), (1.25, False)], [(3, True, None), (8, False, 0.8)], [0.8]),
        # quicker though it was disturbed; but by how much is not known
        ([(1.0, False)], [(0.8, True)], [(3, True, None), (10, True, 1.25)], []),
        # a second or two say little: a machine may be slow for so long, and no one tells
        ([(1.0, False)], [(0.9, False), (0.5, False)], [(3, True, None), (8, True, 2.0)], [2.0]),
        ([(0.9, False), (0.5, False)], [(1.0, False)], [(5, True, None), (8, False, 0.5)], [0.5]),
        # eager steps were quiet, compiled ones never: that shows nothing, and what was expected holds
        ([(1.0, False)], [(2.0, True)], [(3, True, None), (10, True, None)], []),
        # both were disturbed to the end: the quickest look of each counts
        ([(3.0, True), (2.0, True)], [(4.0, True), (2.5, True)], [(7, True, None), (14, False, 0.8)], []),
    ],
)
def test_a_look_that_others_disturbed_is_taken_again(
    eager: Looks,
    compiled: Looks,
    decided: list[tuple[int, bool, float | None]],
    gains: list[float],
    small_job: Make,
    seen_as: Callable[[Looks, Looks], None],
    kept: list[float | None],
) -> None:
    seen_as(eager, compiled)
    job, seen = make_open(small_job, "run").put({"run.steps": 16}, "argument"), Seen()
    api.train(job, [seen])
    assert machine_decisions(job) == [(0, False, None), *decided]
    assert kept == gains
    (begun, _, _), (settled, stays, _) = decided
    assert [seen.compiled[step] for step in range(16)] == [
        begun <= step < settled or (step >= settled and stays) for step in range(16)
    ]


def test_nothing_is_asked_once_a_trial_was_given_up(
    small_job: Make, seen_as: Callable[[Looks, Looks], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eager steps that were disturbed, and of which nothing is expected."""
    seen_as([(3.0, True)], [(0.5, False)])
    monkeypatch.setattr(compile, "expected_compiling", lambda *_: Compiling(0.5, 1.0))
    job, seen = make_open(small_job, "run"), Seen()
    api.train(job, [seen])
    assert machine_decisions(job) == [(0, False, None)] and not any(seen.compiled.values())
