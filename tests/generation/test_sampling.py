from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from colossus.generation.sampling import Sampling, penalised, uniform

LOGITS = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()


def shares(sampling, draws=4000):
    counts = Counter(sampling.choose(LOGITS, (), 0, position) for position in range(draws))
    return [counts[i] / draws for i in range(4)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=0.0), [0, 1, 0, 0]),
        (Sampling(temperature=1.0), [0.1, 0.5, 0.15, 0.25]),
        (Sampling(temperature=1.0, top_k=2), [0, 2 / 3, 0, 1 / 3]),
        (Sampling(temperature=1.0, top_p=0.7), [0, 2 / 3, 0, 1 / 3]),
        (Sampling(temperature=1.0, top_p=0.01), [0, 1, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
    ],
)
def test_draws_follow_the_distribution(sampling, expected):
    assert shares(sampling) == pytest.approx(expected, abs=0.025)


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([0.0, -torch.inf, 0.0])
    assert {Sampling(temperature=5.0).choose(logits, (), 0, position) for position in range(300)} == {0, 2}


def test_uniform_numbers_are_uniform_and_fixed():
    numbers = [uniform(0, prompt, position) for prompt in range(10) for position in range(500)]
    assert len(set(numbers)) == 5000 and min(numbers) >= 0 and max(numbers) < 1
    assert sum(numbers) / 5000 == pytest.approx(0.5, abs=0.02)
    assert uniform(7, 1, 2) == 0.3145389016006769  # on every machine


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "repetition_penalty": 1.5, "top_k": 60, "top_p": 0.9, "min_p": 0.03},
        {"temperature": 2.0, "repetition_penalty": 0.8, "top_k": 400, "top_p": 0.95, "min_p": 0.02},
    ],
)
def test_what_is_kept_and_its_shares_are_those_of_transformers(seed, settings):
    generator = torch.Generator().manual_seed(seed)
    logits_V = 3 * torch.randn(500, generator=generator, dtype=torch.float64)
    seen = torch.randint(500, (30,), generator=generator).tolist()
    theirs = LogitsProcessorList()
    if "repetition_penalty" in settings:
        theirs.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    theirs.append(TemperatureLogitsWarper(settings["temperature"]))
    for name, warper in (
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if name in settings:
            theirs.append(warper(settings[name]))
    expected_V = theirs(torch.tensor([seen]), logits_V[None].clone())[0].softmax(-1)
    penalty = settings.get("repetition_penalty", 1.0)
    p_N, ids_N = Sampling(**settings).candidates(penalised(logits_V, seen, penalty))
    found_V = torch.zeros(500, dtype=torch.float64).index_copy(0, ids_N, p_N / p_N.sum())
    assert torch.equal(found_V > 0, expected_V > 0) and 1 <= len(ids_N) < 500
    torch.testing.assert_close(found_V, expected_V, rtol=1e-9, atol=0)


def test_a_penalty_alone_changes_the_likeliest():
    logits = torch.tensor([2.0, 1.9, -1.0])
    assert Sampling(repetition_penalty=1.2).choose(logits, [0, 0, 2], 0, 3) == 1
    assert penalised(logits, [0, 2, 2], 2.0).tolist() == pytest.approx([1.0, 1.9, -2.0])
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0])  # not in place
