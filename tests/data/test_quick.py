"""tiktoken is used where a tokenizer's file says that it gives the same ids, and nowhere else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from colossus.data.bpe import train_bpe
from colossus.data.quick import GPT2_SPLIT, as_tiktoken, byte_characters
from tests.data.kinds import texts

TEXTS = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
TRAINED = train_bpe(TEXTS, 600)._text
MODEL = json.loads(TRAINED)["model"]


def changed(**model: Any) -> str:
    """The trained tokenizer with another model."""
    state = json.loads(TRAINED)
    state["model"] |= model
    return json.dumps(state)


def by_library(text: str) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(text)
    made.encode_special_tokens = True
    return made


def test_one_that_was_trained_is_the_same_for_every_text() -> None:
    quick, plain = as_tiktoken(TRAINED), by_library(TRAINED)
    assert quick is not None
    for text in [*TEXTS, *texts(1000, spelled=True)]:
        found = quick.encode(text, disallowed_special=())
        assert found == plain.encode(text, add_special_tokens=False).ids


def joined(merges: list[tuple[str, str]]) -> str:
    """A tokenizer of bytes and these merges, ids in their order."""
    vocabulary = {character: byte for byte, character in byte_characters().items()}
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made.to_str()


def test_a_token_that_the_merges_do_not_make() -> None:
    """Of abc the merges make a and bc, though abc is a token: tiktoken would join them."""
    text = joined([("b", "c"), ("a", "b"), ("ab", "c")])
    assert by_library(text).encode("abc").tokens == ["a", "bc"]
    assert as_tiktoken(text) is None
    wrong = as_tiktoken(text, proved=True)
    assert wrong is not None and len(wrong.encode("abc")) == 1  # else this test shows nothing
    assert as_tiktoken(joined([("a", "b"), ("ab", "c"), ("b", "c")])) is not None


def test_ids_in_another_order_than_merges() -> None:
    pairs = [("a", "b"), ("b", "c")]
    state = json.loads(joined(pairs))
    state["model"]["merges"].reverse()
    assert by_library(json.dumps(state)).encode("abc").tokens == ["a", "bc"]
    assert as_tiktoken(json.dumps(state)) is None and as_tiktoken(joined(pairs)) is not None


@pytest.mark.parametrize(
    "model",
    [
        {"ignore_merges": True},
        {"dropout": 0.1},
        {"merges": MODEL["merges"][:-1]},  # the last token has no merge
        {"merges": [MODEL["merges"][1], MODEL["merges"][0], *MODEL["merges"][2:]]},
        {"vocab": {token: i for token, i in MODEL["vocab"].items() if token != "a"}},
    ],
    ids=["ignore_merges", "dropout", "no merge", "swapped", "no byte"],
)
def test_other_models(model: dict[str, Any]) -> None:
    assert as_tiktoken(changed(**model)) is None


@given(st.integers(0, 2**32))
def test_whatever_is_taken_is_the_same(seed: int) -> None:
    """Merges drawn at random, most of which make tokens that others take away; texts of the same letters."""
    draw = random.Random(seed)
    parts, merges = ["a", "b", "c"], list[tuple[str, str]]()
    for _ in range(draw.randint(1, 8)):
        pair = (draw.choice(parts), draw.choice(parts))
        if pair[0] + pair[1] not in parts:
            merges.append(pair)
            parts.append(pair[0] + pair[1])
    text = joined(merges)
    quick, plain = as_tiktoken(text), by_library(text)
    for _ in range(30):
        word = "".join(draw.choices("abc", k=draw.randint(1, 12)))
        if quick is not None:
            assert quick.encode(word) == plain.encode(word).ids


def test_every_character_is_of_the_same_class() -> None:
    """Letters, digits, blanks: their tables of Unicode say the same, or texts would be split elsewhere."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for before in "a1!":
        pairs = {before.encode() + bytes([byte]): 256 + byte for byte in range(256)}
        quick = tiktoken.Encoding(
            "pairs", pat_str=GPT2_SPLIT, mergeable_ranks=ranks | pairs, special_tokens={}
        )
        for code in range(0x3000):
            text = before + chr(code)
            together = len(split.pre_tokenize_str(text)) == 1
            assert (quick.encode(text, disallowed_special=())[0] >= 256) is together, hex(code)
