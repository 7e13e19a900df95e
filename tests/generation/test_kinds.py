"""Text from models with every kind of tokenizer, held against `transformers`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from colossus.data.tokenizer import load_tokenizer
from colossus.errors import UserError
from colossus.generation import generate, load_model, stream
from colossus.generation.text import TextBuilder
from colossus.interchange import export_model
from tests.data.chatting import families
from tests.data.kinds import KINDS, reference, saved, texts

PROMPTS = ["the cat", "hello to", "def return", "a", "北京", "dogs don't"]
END = 5  # a second end, which the model's configuration names


def published(name: str, folder: Path, vocabulary: int | None = None) -> Path:
    """A Llama with random weights, so large that its predictions are decided, and such a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    saved(name, folder)
    tokenizer = reference(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"max_position_embeddings": 256, "initializer_range": 0.6, "bos_token_id": tokenizer.bos_token_id}
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer), eos_token_id=[tokenizer.eos_token_id, END], **shape, **rest
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(request.param, tmp_path_factory.mktemp("kinds") / request.param)


def theirs(folder: Path, tokenizer: Any, prompt: str, max_tokens: int) -> str:
    """What `transformers` writes, greedily. What its encoding puts behind a text is left out: an end. Where
    bytes that spell none spoil the prompt's last character in the whole text, what is new is by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).float()
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, END}
    read = tokenizer(prompt)["input_ids"]
    while read[-1] == tokenizer.eos_token_id:
        read.pop()
    ids = model.generate(torch.tensor([read]), max_new_tokens=max_tokens, do_sample=False)[0].tolist()
    shown = [[index for index in part if index not in special] for part in (read, ids)]
    before, whole = map(tokenizer.decode, shown)
    if not whole.startswith(before):
        return str(tokenizer.decode(shown[1][len(shown[0]) :]))
    return str(whole[len(before) :])


@pytest.mark.parametrize("exported", [False, True])
def test_greedy_text_is_that_of_transformers(folder: Path, exported: bool, tmp_path: Path) -> None:
    """Also a continuation that begins with a blank, and one that ends at the second of two ends."""
    if exported:
        export_model(folder, tmp_path / "out", say=lambda line: None)
    model, ours = load_model(tmp_path / "out" if exported else folder)
    assert ours is not None
    tokenizer = reference(folder)
    expected = [theirs(folder, tokenizer, prompt, 20) for prompt in PROMPTS]
    assert generate(model, ours, PROMPTS, max_tokens=20) == expected
    assert "".join(stream(model, ours, PROMPTS[0], max_tokens=20)) == expected[0]


def test_pieces_are_what_decoding_at_once_gives(folder: Path) -> None:
    """Of texts, behind any part of them as a prompt; and of any ids, which may spell no text."""
    tokenizer = load_tokenizer(folder)
    draw = random.Random(0)
    for text in texts(200):
        ids = tokenizer.encode(text)
        at = draw.randint(0, len(ids))
        before = tokenizer.decode(ids[:at])
        if "\ufffd" not in before:
            builder = TextBuilder(tokenizer, prompt=ids[:at])
            pieces = [builder.add(index) for index in ids[at:]]
            assert before + "".join(pieces) + builder.finish() == tokenizer.decode(ids), text
    for _ in range(200):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(12)]
        builder = TextBuilder(tokenizer)
        assert "".join(map(builder.add, ids)) + builder.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("stop", ["\n", "t\n", "a", "zz"])
def test_text_ends_before_a_stop_string_that_is_held_back_to_the_end(folder: Path, stop: str) -> None:
    """As a line's end of Llama 2: a token of a single byte is no text until the next one is there."""
    tokenizer = load_tokenizer(folder)
    text = "the cat\n" if "\n" in tokenizer.decode(tokenizer.encode("\n")) else "the cat"
    ids = tokenizer.encode(text)
    for end in range(1, len(ids) + 1):  # wherever `max_tokens` ends it
        builder = TextBuilder(tokenizer, [stop])
        pieces = [builder.add(index) for index in ids[:end] if not builder.done]
        assert "".join(pieces) + builder.finish() == tokenizer.decode(ids[:end]).split(stop)[0]


@pytest.mark.parametrize("name", ["prepend", "metaspace", "unigram"])
def test_an_unfinished_character_leaves_that_of_the_prompt_alone(name: str, tmp_path: Path) -> None:
    """As decoding the continuation by itself; a run of byte tokens that is no text has a mark for each."""
    tokenizer = load_tokenizer(saved(name, tmp_path / name))
    prompt = tokenizer.encode("a 龘")
    first, second, third, letter = tokenizer.encode("a 龘a")[-4:]
    assert prompt[-3:] == [first, second, third] and {*prompt[-3:]} <= tokenizer.byte_ids
    for ids, expected in (
        ([first], "\ufffd"),
        ([first, second], "\ufffd" * 2),
        ([first, second, third], "龘"),
        ([first, letter], "\ufffda"),
    ):
        builder = TextBuilder(tokenizer, prompt=prompt)
        assert "".join(map(builder.add, ids)) + builder.finish() == expected


@pytest.mark.parametrize("name", ["prepend", "metaspace", "unigram"])
def test_a_continuation_keeps_its_blank(name: str, tmp_path: Path) -> None:
    """Decoded by itself, the first token of a text loses it."""
    tokenizer = load_tokenizer(saved(name, tmp_path / name))
    for text in ("a", "the cat"):
        prompt = tokenizer.encode(text)
        builder = TextBuilder(tokenizer, prompt=prompt)
        rest = tokenizer.encode(f"{text} a")[len(prompt) :]
        assert rest and "".join(map(builder.add, rest)) + builder.finish() == " a"


@pytest.mark.parametrize("name", ["prepend", "metaspace", "unigram", "byte_level"])
def test_a_space_at_the_end_belongs_to_the_next_word(name: str, tmp_path: Path) -> None:
    """The first token is one that begins with a space where it stands: any that does, whatever follows."""
    folder = published(name, tmp_path / name)
    model, tokenizer = load_model(folder)
    assert tokenizer is not None
    prompt = [*tokenizer.begins, *tokenizer.encode("the cat")]
    with torch.no_grad():
        logits_V = model(torch.tensor([prompt or [tokenizer.begin_id]]))[0, -1]
    marks = {"byte_level": "Ġ"}.get(name, "▁")
    words = {i for i in range(tokenizer.vocab_size) if tokenizer.name(i).startswith(marks)}  # type: ignore[attr-defined]
    best = max(words, key=lambda index: logits_V[index])
    (found,) = generate(model, tokenizer, ["the cat "], max_tokens=1)
    expected = tokenizer.decode([*prompt, best])[len(tokenizer.decode(prompt)) :]
    assert " " + found == expected and len(words) > 3


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    folder = published("byte_level", tmp_path / "published", vocabulary=200)
    model, tokenizer = load_model(folder)
    assert tokenizer is not None
    with pytest.raises(UserError, match=r"the model has embeddings for 200: the two do not belong together"):
        generate(model, tokenizer, ["the cat"])
    assert isinstance(generate(model, tokenizer, ["a "], max_tokens=2)[0], str)  # of tokens that both have


def test_special_tokens_are_read_as_such_when_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `transformers` reads them always; else in letters, which is said."""
    family = families()["chatml"]
    folder = published("byte_level", tmp_path / "published", vocabulary=family.tokenizer.get_vocab_size())
    family.save(folder)
    model, tokenizer = load_model(folder)
    assert tokenizer is not None
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    expected = theirs(folder, reference(folder), prompt, 12)
    assert generate(model, tokenizer, [prompt], max_tokens=12, special=True) == [expected]
    assert not caplog.records
    letters = [*tokenizer.begins, *tokenizer.encode(prompt)]
    (found,) = generate(model, tokenizer, [prompt], max_tokens=12)
    assert found == generate(model, tokenizer, [letters], max_tokens=12)[0] != expected
    assert [record.getMessage()[:50] for record in caplog.records] == [
        "prompts: <|im_end|>, <|im_start|>: read in letters"
    ]


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_messages_are_answered_as_by_transformers(name: str, tmp_path: Path) -> None:
    """Also amid prompts of other kinds, after an export, and in pieces; the answer ends with its turn."""
    from transformers import AutoModelForCausalLM

    family = families()[name]
    folder = published("byte_level", tmp_path / "published", vocabulary=family.tokenizer.get_vocab_size())
    family.save(folder)
    end = family.tokenizer.token_to_id(family.eos)
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | {"eos_token_id": end}))
    chats = [
        [{"role": "user", "content": "Hello there, who are you?"}],
        [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "Grüße?"},
        ],
    ]
    tokenizer, theirs = reference(folder), AutoModelForCausalLM.from_pretrained(folder).float()
    expected = []
    for messages in chats:
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = theirs.generate(**asked, max_new_tokens=24, do_sample=False)[0].tolist()
        left_out = (tokenizer.bos_token_id, end)
        parts = (ids[: asked["input_ids"].shape[1]], ids)
        before, whole = (tokenizer.decode([i for i in part if i not in left_out]) for part in parts)
        expected.append(whole[len(before) :])
    export_model(folder, tmp_path / "out", say=lambda line: None)
    for place in (folder, tmp_path / "out"):
        model, ours = load_model(place)
        assert ours is not None
        assert generate(model, ours, chats, max_tokens=24) == expected
        mixed = generate(model, ours, ["Hello", chats[0], [3, 4], chats[1]], max_tokens=24)
        assert mixed[1::2] == expected and mixed[::2] == generate(
            model, ours, ["Hello", [3, 4]], max_tokens=24
        )
        assert "".join(stream(model, ours, chats[1], max_tokens=24)) == expected[1]
        assert end in ours.ends


def test_a_begin_that_a_prompt_spells_is_not_put_there_again(tmp_path: Path) -> None:
    folder = published("byte_level_bos", tmp_path / "published")
    model, tokenizer = load_model(folder)
    assert tokenizer is not None
    plain = generate(model, tokenizer, ["the cat"], max_tokens=12)
    assert generate(model, tokenizer, ["<|begin_of_text|>the cat"], max_tokens=12, special=True) == plain
