"""Tokens that only the files beside a tokenizer.json name have the ids that `transformers` gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colossus.architecture import Architecture
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.tokenizer import load_tokenizer
from colossus.errors import UserError
from colossus.interchange.files import open_tokenizer
from tests.data.kinds import reference, saved

LEFT = {"content": "<left>", "lstrip": True, "rstrip": False, "normalized": True, "single_word": False}
CONFIGS: list[dict[str, Any]] = [
    {"pad_token": "<pad>"},
    {"additional_special_tokens": ["<b>", "<a>"]},
    {"extra_special_tokens": ["<b>"], "additional_special_tokens": ["<not>"]},
    {"extra_special_tokens": {"image_token": "<image>"}, "additional_special_tokens": ["<a>"]},
    {
        "extra_special_tokens": ["<z>", "cat"],
        "mask_token": "<mask>",
        "boi_token": "<boi>",
        "pad_token": "<z>",
        "sep_token": "<sep>",
    },
    {"added_tokens_decoder": {"900": LEFT | {"special": True}}, "pad_token": "<pad>", "unk_token": "<left>"},
]
OLDER: list[tuple[dict[str, Any], dict[str, Any], dict[str, int]]] = [
    ({}, {"pad_token": LEFT, "additional_special_tokens": ["<b>", "<a>"]}, {}),
    ({}, {"pad_token": "<pad>"}, {"<later>": 901, "<pad>": 902, "<first>": 900}),
    ({"additional_special_tokens": ["<a>"]}, {"additional_special_tokens": ["<not>"]}, {}),
    ({"extra_special_tokens": ["<b>"]}, {"extra_special_tokens": [LEFT, "<b>", "<a>"]}, {}),
    ({"pad_token": "<not>"}, {"pad_token": "<pad>", "extra_special_tokens": {"boi": "<boi>"}}, {}),
]


def opened(folder: Path) -> JsonTokenizer:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def check_same(folder: Path) -> JsonTokenizer:
    """All tokens, how they are looked for, and texts that spell them."""
    ours, theirs = opened(folder), reference(folder)
    assert ours._tokenizer.get_vocab() == theirs.get_vocab()
    added = ours._tokenizer.get_added_tokens_decoder()
    assert {i: repr(t) for i, t in added.items()} == {
        i: repr(t) for i, t in theirs.added_tokens_decoder.items()
    }
    text = "the  " + "  cat ".join(ours.added_tokens) + " sat"
    assert ours.encode_rendered([text])[0][0].tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.account.pad_id == theirs.pad_token_id
    assert (ours.account.bos_id, ours.account.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    ours.taught(True, ours.chats).save(folder.with_name("run"))
    kept = opened(folder.with_name("run"))
    assert kept.fingerprint == ours.fingerprint and kept.account.named == ours.account.named
    return ours


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "unigram"])
def test_named_tokens_follow_the_last(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "published")
    write(folder / "tokenizer_config.json", **config)
    check_same(folder)


@pytest.mark.parametrize(("said", "tokens", "added"), OLDER)
def test_as_older_files_name_them(
    said: dict[str, Any], tokens: dict[str, Any], added: dict[str, int], tmp_path: Path
) -> None:
    folder = saved("byte_level", tmp_path / "published")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | said))
    write(folder / "special_tokens_map.json", **tokens)
    write(folder / "added_tokens.json", **added)
    check_same(folder)


@pytest.mark.parametrize("name", [None, "GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_the_token_that_fills_up_batches(name: str | None, tmp_path: Path) -> None:
    """Of the settings in tokenizer.json, where nothing else names one, and the class has none of its own."""
    folder = saved("metaspace" if name == "LlamaTokenizer" else "byte_level", tmp_path / "published")
    if name is not None:
        write(folder / "tokenizer_config.json", tokenizer_class=name)
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3}
    write(folder / "tokenizer.json", padding=padding | {"pad_type_id": 0, "pad_token": "cat"})
    check_same(folder)


def test_a_run_of_before_keeps_its_tokens(tmp_path: Path) -> None:
    """It was taught, and its shards were made, when tokens that are only named did not count."""
    folder = saved("byte_level", tmp_path / "published")
    before = opened(folder).fingerprint
    write(folder / "tokenizer_config.json", pad_token="<pad>")
    opened(folder).taught(True, None).save(tmp_path / "run")
    assert opened(tmp_path / "run").fingerprint == opened(folder).fingerprint != before
    kept = json.loads((tmp_path / "run" / "account.json").read_text())
    assert kept.pop("named") == ["<pad>"]
    (tmp_path / "run" / "account.json").write_text(json.dumps(kept))
    assert opened(tmp_path / "run").fingerprint == before


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizer", "GemmaTokenizer"])
@pytest.mark.parametrize("said", [{}, {"bos_token": None, "pad_token": "the"}])
def test_what_a_class_calls_its_tokens(name: str, said: dict[str, Any], tmp_path: Path) -> None:
    """Where it is named, and its tokens are not; those that are there are looked for in texts."""
    kind = "metaspace" if name in ("LlamaTokenizer", "GemmaTokenizer") else "byte_level"
    folder = saved(kind, tmp_path / "published")
    state = json.loads((folder / "tokenizer.json").read_text())
    if name == "GemmaTokenizer":
        state["model"]["vocab"] |= {
            f"<{word}>": 480 + i for i, word in enumerate(("bos", "eos", "pad", "mask"))
        }
    write(folder / "tokenizer.json", model=state["model"], added_tokens=[])
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} | said))
    ours, theirs = opened(folder), reference(folder)
    assert (ours.account.bos_id, ours.account.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.account.pad_id == theirs.pad_token_id and ours.special_tokens == theirs.get_added_vocab()
    assert ours.files()["tokenizer_config.json"] == (folder / "tokenizer_config.json").read_text()


def test_what_the_model_has_no_room_for_is_left_out(tmp_path: Path) -> None:
    """And said; a run that begins with it leaves it out too. What begins and ends texts must be there."""
    folder = saved("byte_level", tmp_path / "published")
    tokens = opened(folder).vocab_size
    write(folder / "tokenizer_config.json", pad_token="<pad>", additional_special_tokens=["<a>", "<b>"])
    write(folder / "config.json", model_type="llama", vocab_size=tokens + 1)
    said: list[str] = []
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 1, "intermediate_size": 16, "max_seq_len": 8}
    found = open_tokenizer(folder, Architecture(vocab_size=tokens + 1, **sizes), said.append)
    assert isinstance(found, JsonTokenizer)
    assert found.account.named == ("<pad>",) and found.account.pad_id == tokens == found.vocab_size - 1
    assert said == [
        f"{folder}: {name}, which is only named, is none of the {tokens + 1} tokens: left out"
        for name in ("<a>", "<b>")
    ]
    found.taught(True, None).save(tmp_path / "run")
    assert opened(tmp_path / "run").fingerprint == found.fingerprint
    write(folder / "tokenizer_config.json", eos_token="<end>")
    with pytest.raises(UserError, match="eos_token=<end>: the tokenizer has no such token"):
        load_tokenizer(folder)
