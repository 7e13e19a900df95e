"""A tokenizer goes with a model, or is told apart from it."""

from __future__ import annotations

import pytest

from colossus.data.prepare import check_vocabulary, vocabulary_to_train
from colossus.errors import UserError
from colossus.job import load_job


def test_a_model_has_at_least_the_tokens_of_its_tokenizer() -> None:
    job = load_job(None, ["model.vocab_size=300", "data.tokenizer=some.json"])
    for tokens in (258, 299, 300):
        check_vocabulary(job, tokens)
    with pytest.raises(UserError, match=r"model\.vocab_size=300: the tokenizer some\.json has 301 tokens"):
        check_vocabulary(job, 301)


def test_a_tokenizer_is_trained_for_what_was_asked_for_and_small_for_a_preset() -> None:
    """A published vocabulary of 128,256 is filled up to 32,768; one that was asked for is made whole."""
    assert vocabulary_to_train(load_job(None, ["model=llama3.2-1b"])) == 2**15
    assert vocabulary_to_train(load_job(None, ["model=llama2-7b"])) == 32_000
    assert vocabulary_to_train(load_job(None, ["model=llama3.2-1b", "model.vocab_size=50000"])) == 50_000
