"""What generation may be asked with; every other value is named, with what is allowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from colossus import api
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.errors import UserError
from colossus.generation import generate, stream
from colossus.models import build
from tests.models.reference import architecture

TOKENIZER = BytesTokenizer()
HALF = "\ud83d"


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return build(architecture(vocab_size=TOKENIZER.vocab_size, initializer_range=0.5), seed=0)


ONE = "expected a text, or a list of token ids"


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (None, "prompts=None: expected a list; each of it a text, or a list of token ids"),
        (b"abc", "prompts=b'abc': expected a list; each of it"),
        (7, "prompts=7: expected a list"),
        ({"a": 1}, "prompts={'a': 1}: expected a list"),
        ({"abc"}, "prompts={'abc'}: expected a list"),
        ("abc", r"prompts=abc: expected a list of strings; write \[prompt\]"),
        (["a", None], rf"prompts\[1\]=None: {ONE}"),
        ([b"abc"], rf"prompts\[0\]=b'abc': {ONE}"),
        ([1, 2, 3], rf"prompts\[0\]=1: {ONE}"),
        ([1.5], rf"prompts\[0\]=1\.5: {ONE}"),
        ([True], rf"prompts\[0\]=True: {ONE}"),
        (["fine", f"a{HALF}b"], r"prompts\[1\]='a.ud83db': character 1 is U\+D83D, half of a surrogate pair"),
        ([[]], r"prompts\[0\]=\[\]: expected one token id or more"),
        ([[1, 2.0]], r"prompts\[0\]\[1\]=2\.0: must be a whole number, 0 to 257"),
        ([[1, True]], r"prompts\[0\]\[1\]=True: must be a whole number"),
        ([[1], [258]], r"prompts\[1\]\[0\]=258: must be a whole number, 0 to 257"),
        ([[-1]], r"prompts\[0\]\[0\]=-1: must be a whole number, 0 to 257"),
        (
            [{"role": "user"}],
            r"prompts\[0\]={'role': 'user'}: expected .*; messages are one prompt together: a",
        ),
        ([[{"role": "user"}]], r"prompts\[0\]: messages, which this tokenizer has no chat template for"),
        ([["a"]], r"prompts\[0\]\[0\]='a': must be a whole number"),
    ],
)
def test_prompts(model: Any, prompts: Any, said: str) -> None:
    for opened in (generate, api.generate):
        with pytest.raises(UserError, match="^" + said):
            opened(model, TOKENIZER, prompts, max_tokens=1)


@pytest.mark.parametrize("prompt", [None, b"abc", 7, 1.5, f"{HALF}", [], [300]])
def test_a_prompt_of_a_stream_is_refused_at_once(model: Any, prompt: Any) -> None:
    with pytest.raises(UserError, match=r"^prompt(\[0\])?="):
        stream(model, TOKENIZER, prompt)


WHOLE, NUMBER = "must be a whole number", "must be a number"
WRONG: list[tuple[str, Any, str]] = [
    *(
        ("max_tokens", value, f"{WHOLE}, 0 or more")
        for value in (-1, 2.0, 1.5, True, "3", None, math.nan, [4])
    ),
    *(
        ("seed", value, f"{WHOLE}, 0 to 9223372036854775807")
        for value in (-1, 1.0, 0.5, False, 2**63, 2**70, "1", None)
    ),
    *(("top_k", value, f"{WHOLE}, 1 or more") for value in (0, -3, 5.0, True, "5")),
    *(
        ("temperature", value, f"{NUMBER}, 0 .the likeliest token. or more")
        for value in (math.nan, math.inf, -0.1, "0.8", None, True, 1j)
    ),
    *(("top_p", value, f"{NUMBER} above 0 and at most 1") for value in (math.nan, 0, 1.01, -1, "0.9", True)),
    *(("min_p", value, f"{NUMBER} from 0 to 1") for value in (math.nan, 1.5, -0.1, "0.1", False)),
    *(
        ("repetition_penalty", value, f"{NUMBER} above 0; 1 is none")
        for value in (math.nan, math.inf, 0, -1.0, "1.2", None, True)
    ),
    *(("stop", value, "expected a list of texts") for value in (None, 3, b"a", {"a"})),
    ("stop", "", "expected a text of one character or more"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), WRONG)
def test_numbers_and_texts(model: Any, field: str, value: Any, allowed: str) -> None:
    for ask in (
        lambda **asked: generate(model, TOKENIZER, ["abc"], **asked),
        lambda **asked: stream(model, TOKENIZER, "abc", **asked),
    ):
        with pytest.raises(UserError) as error:
            ask(**{field: value})
        assert str(error.value).startswith(f"{field}={value!r}: ")
        assert allowed.replace(".the likeliest token.", "(the likeliest token)") in str(error.value)


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        ([""], r"stop\[0\]='': expected a text of one character or more"),
        (["a", ""], r"stop\[1\]='': expected"),
        (["a", 3], r"stop\[1\]=3: expected"),
        ([b"a"], r"stop\[0\]=b'a': expected"),
        ([HALF], r"stop\[0\]='.ud83d': character 0 is U\+D83D"),
    ],
)
def test_texts_to_stop_before(model: Any, stop: Any, said: str) -> None:
    with pytest.raises(UserError, match="^" + said):
        generate(model, TOKENIZER, ["abc"], stop=stop)


def test_what_is_a_number_is_one_of_any_kind(model: Any) -> None:
    asked = {"max_tokens": 5, "temperature": 0.5, "seed": 2**63 - 1, "top_k": 9}
    other = {
        "max_tokens": np.int64(5),
        "temperature": np.float32(0.5),
        "seed": np.uint64(2**63 - 1),
        "top_k": np.int32(9),
    }
    assert generate(model, TOKENIZER, ("abc",), **other) == generate(model, TOKENIZER, ["abc"], **asked)


def test_token_ids_are_read_as_they_are(model: Any) -> None:
    """With nothing in front of them: the same as the text where they begin as one does."""
    text = "def f(x"
    ids = [*TOKENIZER.begins, *TOKENIZER.encode(text)]
    for sampling in ({}, {"temperature": 1.0, "seed": 3}):
        expected = generate(model, TOKENIZER, [text, text], max_tokens=20, **sampling)
        for given in (ids, tuple(ids), [np.int64(token) for token in ids]):
            assert generate(model, TOKENIZER, [text, given], max_tokens=20, **sampling) == expected
        assert (
            "".join(stream(model, TOKENIZER, ids, max_tokens=20, **sampling))
            == (generate(model, TOKENIZER, [ids], max_tokens=20, **sampling)[0])
        )
    bare = TOKENIZER.encode(text)
    written, tokens = "", list(bare)
    while len(tokens) < len(bare) + 9:
        with torch.no_grad():
            token = int(model(torch.tensor([tokens]))[0, -1, : TOKENIZER.vocab_size].argmax())
        if token in TOKENIZER.ends:
            break
        tokens.append(token)
    written = TOKENIZER.decode(tokens[len(bare) :])
    assert generate(model, TOKENIZER, [bare], max_tokens=9) == [written]
    assert bare == TOKENIZER.encode(text)  # what was given is left alone
