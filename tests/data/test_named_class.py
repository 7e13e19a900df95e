"""What is known of the classes of `transformers`, held against them."""

from __future__ import annotations

import inspect

import pytest
import transformers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES as OF_MODELS

from colossus.data.named_class import DEFAULTS, OF_MODEL, READ_AS_THEY_ARE
from colossus.models.hf.families import FAMILIES

AS_THEY_ARE = ("TokenizersBackend", "MistralCommonBackend")  # the second only beside a tekken.json


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_names_of_tokens_are_those_of_the_class(name: str) -> None:
    parameters = inspect.signature(getattr(transformers, name).__init__).parameters
    theirs = {key: p.default for key, p in parameters.items() if key.endswith("_token")}
    assert DEFAULTS[name] == {key: token for key, token in theirs.items() if isinstance(token, str)}


def test_the_class_of_a_model_is_that_of_transformers() -> None:
    for name in FAMILIES:
        assert (OF_MODELS.get(name) in AS_THEY_ARE) is (name in READ_AS_THEY_ARE), name
    assert {name: OF_MODELS.get(name) for name in OF_MODEL} == OF_MODEL
    others = {name for name in FAMILIES if OF_MODELS.get(name) not in (None, *AS_THEY_ARE)}
    assert others == {*OF_MODEL}
    assert all(OF_MODELS.get(name) in AS_THEY_ARE for name in READ_AS_THEY_ARE)
