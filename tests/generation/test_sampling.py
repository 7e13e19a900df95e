from collections import Counter

import pytest
import torch

from colossus.generation.sampling import Sampling, uniform

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
