"""The law of the critical batch: against its authors' own runs, and beside published runs."""

from __future__ import annotations

import pytest

from colossus import api
from colossus.derive import to_plan
from colossus.job import load_job
from colossus.planner.batch import (
    critical_batch_tokens,
    default_batch,
    more_tokens,
    tokens_of_steps,
)

# Tokens of a model's run, 20 a weight: steps to one loss by sequences of 512 tokens (the authors' figures:
# hlzhang109/critical-batch-size, plots/chinchilla.ipynb).
STEPS = {
    1.7e9: {64: 46000, 128: 23000, 256: 13282, 512: 7000, 1024: 3840, 2048: 2500, 4096: 1800},
    12.1e9: {64: 311000, 128: 166000, 256: 81000, 1024: 21320, 2048: 11400, 4096: 7199, 8192: 4700},
    24e9: {64: 643000, 128: 331000, 256: 176000, 1024: 46500, 2048: 25000, 4096: 15360, 8192: 8900},
}
PUBLISHED = {  # tokens of the run, tokens of a step
    "GPT-3 175B": (300e9, 3.2e6),
    "BLOOM": (366e9, 2048 * 2048),
    "Nemotron-4 340B": (8e12, 2304 * 4096),
    "Llama 3 405B": (15.6e12, 2048 * 8192),
    "DeepSeek-V3": (14.8e12, 15360 * 4096),
}


def test_a_critical_batch_takes_a_fifth_more_tokens_in_the_runs_that_the_law_is_of() -> None:
    for tokens, steps in STEPS.items():
        least = min(sequences * count for sequences, count in steps.items() if sequences <= 256)
        critical = critical_batch_tokens(tokens) / 512
        below = max(n for n in steps if n <= critical)
        above = min(n for n in steps if n > critical)
        taken = [n * steps[n] / least - 1 for n in (below, above)]
        assert taken[0] < 0.3 and taken[0] < taken[1] and 0.1 < sum(taken) / 2 < 0.45
        for sequences in (below, above):
            said = more_tokens(512 * sequences, tokens)
            assert said == pytest.approx(sequences * steps[sequences] / least - 1, abs=0.25)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_lie_about_it(name: str) -> None:
    tokens, batch = PUBLISHED[name]
    assert 1 / 2.5 < batch / critical_batch_tokens(tokens) < 2.5


def test_the_law_in_numbers() -> None:
    assert critical_batch_tokens(1e12) == pytest.approx(22.91 * 10 ** (6 * 0.47) * 512)
    steps = 1000
    assert steps * critical_batch_tokens(tokens_of_steps(steps)) == pytest.approx(tokens_of_steps(steps))
    assert more_tokens(critical_batch_tokens(3e11), 3e11) == pytest.approx(0.2)


@pytest.mark.parametrize("tokens", [1e6, 1e9, 3e10, 1e12, 15e12])
@pytest.mark.parametrize("seq_len", [256, 8191, 8192])
def test_ranks_can_share_it(tokens: float, seq_len: int) -> None:
    batch, critical = default_batch(tokens, seq_len), critical_batch_tokens(tokens) / seq_len
    assert batch == 1 > critical or critical / 1.25 <= batch <= critical or batch == int(critical)
    odd = batch
    while odd % 2 == 0:
        odd //= 2
    assert odd in (1, 3, 5, 7)


ONE = [f"layout.{name}=1" for name in ("dp_shard", "tp", "pp", "cp", "ep", "micro_batch")]


def planned(*words: str):
    return api.plan(
        load_job(None, ["model=llama3.2-1b", *words, *ONE, "fleet.accelerator=h200-sxm", "fleet.count=1"])
    )


def test_a_plan_takes_it_for_every_kind_of_length() -> None:
    tokens = planned("run.tokens=10000000000")
    assert tokens.global_batch == default_batch(10e9, 8192) and tokens.tokens == 10e9
    steps = planned("run.steps=1000")
    assert steps.tokens == 1000 * steps.global_batch * 8192
    assert steps.global_batch == default_batch(tokens_of_steps(1000), 8192)
    minutes = planned("run.minutes=60")
    assert minutes.low.days * 1440 == pytest.approx(60, rel=0.01)
    assert minutes.global_batch == pytest.approx(default_batch(minutes.tokens, 8192), rel=0.3)
    none = planned()
    assert none.tokens == pytest.approx(20 * 1_235_814_400)
    asked = planned("run.global_batch=24")
    assert asked.global_batch == 24
    schedule = planned("run.batch_schedule=[[0,8],[100,48]]")
    assert schedule.global_batch == 48 and any("run.batch_schedule" in line for line in schedule.assumptions)


def test_no_fleet_is_so_large_that_a_step_is_not_sane() -> None:
    job = load_job(None, ["model=llama3.1-405b", "fleet=colossus-100k", "run.tokens=15000000000000"])
    made = to_plan.with_model(job, None)
    batch = default_batch(15e12, made.data.seq_len) * made.data.seq_len
    assert 16e6 < batch < 28e6  # its paper's: 16.8 million
