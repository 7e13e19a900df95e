"""Which type, threads and compilation follow from what steps were timed at."""

from __future__ import annotations

import pytest

from colossus.derive.settings import (
    COMPILE_SECONDS,
    Compiling,
    Length,
    candidates,
    choose,
    compiling_of,
)
from colossus.hardware.timings import Setting, Timing, Timings
from colossus.job import load_job
from tests.derive.machines import machine

FLOPS = 7e6  # of a token of the default model of width 128
FIVE_MINUTES = Length(seconds=255.0)
PEAKS = {"bf16": 3.1e12, "fp32": 365e9}


def timing(kind: str, threads: int, tokens_per_second: float, **seen: float) -> Timing:
    return Timing(kind, threads, FLOPS * tokens_per_second, **seen)


AMX = [  # tokens/s of eager steps, as measured on a Xeon
    timing("bf16", 1, 10_300),
    timing("bf16", 2, 13_400),
    timing("fp32", 1, 7_000),
    timing("fp32", 2, 13_900),  # 10,800 and 14,700 in two rounds
]


def expected(of: Timing) -> Compiling:
    return compiling_of(of, 128, PEAKS[of.type], [])


def test_with_amx_two_threads_of_bf16_win_once_compiled() -> None:
    """Eager fp32 may seem quicker; compiled, bf16 reached 16,900 to 19,500, and fp32 15,800."""
    found = choose(AMX, FIVE_MINUTES, expected)
    assert found.setting == Setting("bf16", 2)
    assert found.mean_flops_per_second > found.flops_per_second  # and it is worth a trial,
    assert not found.compile  # which the run's first steps make
    assert 1.25 < expected(AMX[1]).gain < 1.45 and expected(AMX[3]).gain < expected(AMX[1]).gain


def test_what_a_run_saw_counts_instead() -> None:
    seen = [timing("bf16", 2, 13_400, gain=1.4, compile_seconds=25.0), *AMX[2:]]
    found = choose(seen, FIVE_MINUTES, expected)
    assert found.setting == Setting("bf16", 2) and found.compile
    assert found.mean_flops_per_second == pytest.approx(FLOPS * 13_400 * 1.4 * 230 / 255)
    worse = [timing("bf16", 2, 13_400, gain=0.97, compile_seconds=25.0), *AMX[2:]]
    assert choose(worse, FIVE_MINUTES, expected).setting == Setting("fp32", 2)


def test_a_short_run_takes_what_is_quickest_uncompiled() -> None:
    found = choose(AMX, Length(seconds=60.0), expected)
    assert found.setting == Setting("fp32", 2) and not found.compile
    assert found.mean_flops_per_second == found.flops_per_second
    steps = Length(flops=FLOPS * 13_900 * 60)
    assert choose(AMX, steps, expected) == found


def test_nothing_is_compiled_that_cannot_be_or_does_not_pay() -> None:
    gains = Compiling(1.2, 30.0, seen=True)
    assert gains.pays(181) and not gains.pays(179)
    assert not Compiling(1.0, 0.0, seen=True).pays(1e9)
    assert not choose(AMX, FIVE_MINUTES, lambda _: None).compile
    assert choose(AMX, Length(seconds=10.0), lambda _: gains, forced=True).compile


def test_one_thread_is_taken_where_a_second_is_worth_nothing() -> None:
    small = [timing("fp32", 1, 30_000), timing("fp32", 2, 24_000), timing("bf16", 2, 20_000)]
    assert choose(small, Length(seconds=30.0), expected).setting == Setting("fp32", 1)


def test_a_neighbour_s_gain_holds_near_its_width() -> None:
    kept = [(128, timing("bf16", 2, 1, gain=1.5, compile_seconds=9.0)), (128, timing("fp32", 2, 1, gain=1.1))]
    near = compiling_of(timing("bf16", 1, 10_000), 192, 3e12, kept)
    assert near == Compiling(1.5, 9.0, seen=True)
    far = compiling_of(timing("bf16", 1, 10_000), 384, 3e12, kept)
    assert not far.seen and far.seconds == COMPILE_SECONDS


def test_what_is_all_products_gains_nothing() -> None:
    assert compiling_of(Timing("fp32", 1, 1e11), 4096, 1e11, []).gain == 1


def test_the_candidates_are_what_is_open_and_not_hopeless() -> None:
    job = load_job(None, ["layout.dp_shard=1", "layout.dp_replicate=1", "layout.tp=1", "layout.pp=1"])
    job = job.derive(**{"layout.cp": 1, "fleet.device": "cpu"})
    eight = machine(cores=8)
    assert set(candidates(job, eight)) == {Setting(t, n) for t in ("fp32", "bf16") for n in (1, 4, 8)}
    assert {s.type for s in candidates(job, machine(fp32=120e9, bf16=0.9e9))} == {"fp32"}
    asked = job.put({"precision.type": "bf16", "run.threads": 3}, "argument")
    assert candidates(asked, machine(fp32=120e9, bf16=0.9e9)) == [Setting("bf16", 3)]
    ranks = job.put({"layout.dp_shard": 4}, "argument")
    assert {s.threads for s in candidates(ranks, eight)} == {1, 2}


def test_of_two_tables_the_better_rates_and_the_newer_gains_stay() -> None:
    old = Timings(
        128, (timing("bf16", 2, 10, gain=1.2, compile_seconds=30.0), timing("fp32", 1, 5)), quiet=True
    )
    new = Timings(
        128, (timing("bf16", 2, 8, gain=1.3, compile_seconds=12.0), timing("bf16", 1, 6)), quiet=False
    )
    both = new.with_best_of(old)
    assert set(both.timings) == {
        timing("bf16", 2, 10, gain=1.3, compile_seconds=12.0), timing("fp32", 1, 5), timing("bf16", 1, 6),
    }  # fmt: skip
    assert Timings.from_json(both.to_json()) == both


def test_the_length_of_a_run_counts_every_batch_and_sample_length() -> None:
    """8 steps: 2 of 4 x 32 tokens, 3 of 6 x 32, 3 of 6 x 16; a phase beyond the last step counts nothing."""
    from colossus.derive.machine import _tokens_of_steps

    shapes = [
        "run.batch_schedule=[[0,4],[2,6]]",
        "data.phases=[{from_step=5,seq_len=16},{from_step=9,seq_len=8}]",
    ]
    job = load_job(None, ["data.seq_len=32", "run.steps=8", *shapes])
    assert _tokens_of_steps(job) == 2 * 4 * 32 + 3 * 6 * 32 + 3 * 6 * 16
    assert (
        _tokens_of_steps(load_job(None, ["data.seq_len=32", "run.steps=8", "run.global_batch=5"]))
        == 8 * 5 * 32
    )
