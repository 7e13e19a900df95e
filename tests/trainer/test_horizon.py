"""The end of a run, from its job or from the clock; the clock on machines that turn slower."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.data.order import BatchSchedule
from colossus.job import Job
from colossus.optim.schedule import Decay
from colossus.trainer.decisions import Decision, Decisions
from colossus.trainer.horizon import Deadline, Horizon, steps_for


def job_of(minutes: float | None = None, **values: object) -> Job:
    run = {"run.minutes": minutes} if minutes is not None else {}
    return Job().put(
        {
            "data.seq_len": 32,
            "data.phases": [],
            "optimizer.schedule": "wsd",
            "optimizer.warmup_steps": 0,
            "optimizer.decay_fraction": 0.5,
            "optimizer.final_lr_fraction": 0.0,
            **run,
            **values,
        },
        "argument",
    )


def simulate(
    seconds_of: Callable[[int, float], float],
    minutes: float = 1.0,
    reserve: float = 0.0,
    fraction: float = 0.5,
) -> tuple[int, float, list[Decay], list[float]]:
    """A run on a simulated machine that asks the clock as the loop does.

    Returns (steps, seconds at their end, decays, factors).

    seconds_of: (step, seconds into the run) -> what the step takes.
    """
    job = job_of(minutes, **{"optimizer.decay_fraction": fraction})
    decisions = Decisions()
    horizon = Horizon(job, BatchSchedule([(0, 4)]), decisions)
    deadline = Deadline(job)
    step, now = 0, 0.0
    decays: list[Decay] = []
    factors: list[float] = []
    while not horizon.done(step):
        found = deadline.propose(step, now, reserve, horizon.decay(step), horizon.factor(step))
        if found is not None:
            decays.append(found)
            decisions.record(Decision("decay", vars(found), step), None)
            if horizon.done(step):
                break
        factors.append(horizon.factor(step))
        now += seconds_of(step, now)
        step += 1
        deadline.step_ended(step, now)
        assert step < 10**6, "it never ends"
    return step, now, decays, factors


def test_given_steps_and_given_tokens() -> None:
    schedule = BatchSchedule([(0, 4), (10, 8)])
    by_steps = Horizon(job_of(**{"run.steps": 20}), schedule, Decisions())
    assert by_steps.total_steps(0) == 20 and not by_steps.done(19) and by_steps.done(20)
    assert [by_steps.factor(s) for s in (9, 10, 15, 19)] == pytest.approx([1, 1, 0.5, 0.1])
    tokens = 32 * (10 * 4 + 8) + 1  # a step of 8 samples and one token more
    by_tokens = Horizon(job_of(**{"run.tokens": tokens}), schedule, Decisions())
    assert by_tokens.total_steps(0) == 12
    assert Horizon(job_of(**{"run.tokens": tokens - 1}), schedule, Decisions()).total_steps(0) == 11


def test_a_run_of_minutes_has_no_end_until_the_clock_decides() -> None:
    decisions = Decisions()
    horizon = Horizon(job_of(1.0), BatchSchedule([(0, 4)]), decisions)
    assert horizon.total_steps(10**6) is None and horizon.factor(10**6) == 1.0
    decisions.record(Decision("decay", vars(Decay(30, 50, 1.0, 0.0)), 30), None)
    assert horizon.total_steps(29) is None and horizon.total_steps(30) == 50
    decisions.record(Decision("decay", vars(Decay(40, 44, 0.5, 0.0)), 40), None)
    assert horizon.total_steps(39) == 50 and horizon.total_steps(40) == 44
    assert horizon.factor(42) == pytest.approx(0.25)


def test_a_steady_machine() -> None:
    """One decision; the decay takes the share of the steps that it should, and the time is used."""
    steps, end, decays, factors = simulate(lambda step, now: 0.05)
    assert len(decays) == 1 and 58.0 <= end <= 60.05
    assert decays[0].begin_step == pytest.approx(steps / 2, abs=2)
    assert factors[0] == 1.0 and factors[-1] < 0.01
    assert all(a >= b for a, b in pairwise(factors))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9, 0.97])
def test_a_machine_that_turns_slower_by_half(share: float) -> None:
    """In the middle, in the decay, shortly before the end: it ends on time, with the rate come down."""
    _, end, decays, factors = simulate(lambda step, now: 0.05 if now < 60 * share else 0.1)
    assert 55.0 <= end <= 60.0 * 1.02 + 0.2
    assert factors[-1] < 0.05
    assert len(decays) < 40  # each is a line in the log


def test_time_is_kept_free_for_what_comes_after_the_last_step() -> None:
    _, end, _, _ = simulate(lambda step, now: 0.05, reserve=10.0)
    assert 48.0 <= end <= 50.1


def test_a_slow_first_step_is_not_taken_for_the_rule() -> None:
    """It compiles."""
    steps, end, _, _ = simulate(lambda step, now: 20.0 if step == 0 else 0.05)
    assert end <= 60.1 and steps > 780


def test_a_first_step_that_takes_all_the_time() -> None:
    steps, _, _, _ = simulate(lambda step, now: 100.0)
    assert steps <= 2


@settings(max_examples=150, deadline=None)
@given(
    step_seconds=st.floats(0.005, 2.0),
    slower=st.floats(1.0, 3.0),
    share=st.floats(0.0, 1.0),
    reserve=st.floats(0.0, 20.0),
    fraction=st.floats(0.05, 1.0),
    noise=st.integers(0, 2**31),
)
def test_the_end_is_on_time_on_any_machine(
    step_seconds: float, slower: float, share: float, reserve: float, fraction: float, noise: int
) -> None:
    """Within two steps or the tolerance of the clock (1% of the time, at the rate the machine turned to)."""

    def seconds_of(step: int, now: float) -> float:
        jitter = 0.9 + 0.2 * ((step * 2654435761 + noise) % 1000) / 1000
        return step_seconds * jitter * (slower if now > 60 * share else 1.0)

    steps, end, _, factors = simulate(seconds_of, reserve=reserve, fraction=fraction)
    slow = step_seconds * slower * 1.1
    assert end <= 60.0 - reserve + max(2 * slow, 0.6 * slower * 1.1 + slow)
    assert steps >= 1 and all(math.isfinite(f) and 0 <= f <= 1 for f in factors)


@settings(max_examples=100, deadline=None)
@given(
    step=st.integers(2, 10_000),
    step_seconds=st.floats(0.001, 5.0),
    factor=st.floats(0.0, 1.0),
    reserve=st.floats(0.0, 100.0),
)
def test_a_decided_end_is_within_the_budget(
    step: int, step_seconds: float, factor: float, reserve: float
) -> None:
    """Of a steady machine: the first decision, whenever it falls, ends at most a step late."""
    deadline = Deadline(job_of(1.0))
    for n in range(max(0, step - 20), step + 1):
        deadline.step_ended(n, n * step_seconds)
    now = step * step_seconds
    found = deadline.propose(step, now, reserve, None, factor)
    if found is not None:
        assert found.begin_step == step and found.from_factor == factor
        end = now + (found.end_step - step) * step_seconds + reserve
        assert end <= 60.0 + step_seconds or found.end_step == step + 1


@given(
    st.integers(1, 20_000),
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(2, 64)), max_size=3, unique_by=lambda change: change[0]
    ),
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 5)), max_size=2, unique_by=lambda change: change[0]
    ),
)
def test_tokens_are_counted_through_phases_and_batches(
    tokens: int, phases: list[tuple[int, int]], batches: list[tuple[int, int]]
) -> None:
    """Against adding up the tokens of every step."""
    changes = [{"from_step": step, "seq_len": length} for step, length in phases]
    job = job_of(**{"data.seq_len": 16, "data.phases": changes})
    schedule = BatchSchedule([(0, 2), *batches])
    lengths, taken, step = dict(phases), 0, 0
    seq_len = 16
    while taken < tokens:
        seq_len = lengths.get(step, seq_len)
        needed = tokens - taken
        taken += min(schedule.batch(step), -(-needed // seq_len)) * seq_len
        step += 1
    assert steps_for(tokens, job, schedule) == step
