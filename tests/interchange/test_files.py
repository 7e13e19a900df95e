"""The tokenizer's files beside exported weights: `transformers` reads of them what was trained with here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.named_class import AS_IT_STANDS
from colossus.data.tokenizer import load_tokenizer
from colossus.interchange.files import files_of
from tests.data.kinds import reference, saved, texts

TEXTS = [*texts(300), "a   1 22  333", "E\u0301a\u030a", "don't  WE'LL\r\n\r\n x"]
GPT2 = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
}  # as older files have it: what is left out is so
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]}
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_SPLIT = {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False}
QWENS = {
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [QWEN_SPLIT, BYTES]},
    "normalizer": {"type": "NFC"},
}

ITS = {"auto_map": {"AutoTokenizer": ["its.Its", None]}}  # code of the folder's own

NAMES = {"bos_token": "<|endoftext|>", "unk_token": None}


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def exported(folder: Path, out: Path, model: dict[str, Any]) -> JsonTokenizer:
    """The tokenizer of a run that began with `folder`, and its files beside such a config.json in `out`."""
    published = load_tokenizer(folder)
    assert isinstance(published, JsonTokenizer)
    published.taught(True, published.chats).save(out.with_name("run"))
    kept = load_tokenizer(out.with_name("run"))
    assert isinstance(kept, JsonTokenizer)
    out.mkdir()
    for name, data in files_of(out.with_name("run"), kept, model).items():
        (out / name).write_bytes(data)
    (out / "config.json").write_text(json.dumps(model))
    return kept


CASES = [  # kind, tokenizer.json, tokenizer_config.json, model_type, whether the class is kept
    ("byte_level", {"pre_tokenizer": GPT2}, {"tokenizer_class": "GPT2Tokenizer"}, "gpt2", True),
    ("byte_level", {"pre_tokenizer": GPT2}, {"tokenizer_class": "GPT2TokenizerFast"}, "llama", True),
    ("byte_level", {"pre_tokenizer": DIGITS}, {"tokenizer_class": "GPT2Tokenizer"}, "llama", False),
    ("byte_level", {"normalizer": {"type": "NFC"}}, {"tokenizer_class": "GPT2Tokenizer"}, "llama", False),
    ("byte_level", {}, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, "llama", False),
    ("byte_level", QWENS, {"tokenizer_class": "Qwen2Tokenizer"}, "qwen3", True),
    ("byte_level", QWENS, {"tokenizer_class": "GPT2Tokenizer"}, "olmo2", False),  # does not take its names
    ("byte_level", QWENS, {"tokenizer_class": "GPT2Tokenizer"} | NAMES, "olmo2", True),
    ("byte_level", {"pre_tokenizer": DIGITS}, {"tokenizer_class": "Qwen2Tokenizer"}, "llama", False),
    ("byte_level", {"pre_tokenizer": DIGITS}, {"tokenizer_class": None}, "qwen3_moe", False),
    ("byte_level", {"pre_tokenizer": DIGITS}, {"tokenizer_class": None}, "gpt2", False),
    ("byte_level", {"pre_tokenizer": DIGITS}, {"tokenizer_class": None}, "gpt_oss", True),
    ("byte_level", {"pre_tokenizer": DIGITS}, {"tokenizer_class": AS_IT_STANDS}, "qwen3", True),
    ("byte_level", {}, {"tokenizer_class": "Its"} | ITS, "qwen3", False),
    ("byte_level_bos", {}, {"tokenizer_class": "GPTNeoXTokenizer"}, "llama", False),
    ("byte_level_bos", {}, {"tokenizer_class": "GPT2Tokenizer"}, "llama", False),  # adds its own
    ("byte_level_bos", {}, {"tokenizer_class": "LlamaTokenizer"}, "llama", True),
    ("ignore_merges", {}, {"tokenizer_class": "Qwen2Tokenizer", "unk_token": None}, "llama", False),
    ("metaspace", {}, {"tokenizer_class": "GemmaTokenizer"}, "llama", False),
    ("metaspace", {}, {"tokenizer_class": "LlamaTokenizer"}, "llama", True),
    ("prepend", {}, {"tokenizer_class": "LlamaTokenizer", "legacy": True}, "deepseek_v3", True),
    ("prepend", {}, {"tokenizer_class": "LlamaTokenizer"}, "mistral", False),
    ("unigram", {}, {"tokenizer_class": "T5Tokenizer"}, "llama", False),
    ("unigram", {}, {"tokenizer_class": "LlamaTokenizer"}, "llama", False),
    ("word_piece", {}, {"tokenizer_class": "BertTokenizer"}, "llama", False),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "file", "config", "model", "is_kept"), CASES)
def test_the_class_reads_what_was_trained_with(
    kind: str, file: dict[str, Any], config: dict[str, Any], model: str, is_kept: bool, tmp_path: Path
) -> None:
    folder = saved(kind, tmp_path / "published")
    changed(folder / "tokenizer.json", **file)
    changed(folder / "tokenizer_config.json", **config)
    ours = exported(folder, tmp_path / "out", {"model_type": model})
    named = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert named["tokenizer_class"] == (config["tokenizer_class"] if is_kept else AS_IT_STANDS)
    theirs = reference(tmp_path / "out")
    spelled = list(ours.special_tokens)
    for text in [*TEXTS, f"a {spelled[0]}b {spelled[-1]} c"]:
        ids = ours.encode_rendered([text])[0][0].tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        whole = [*ours.begins, *ids]
        assert theirs(text)["input_ids"][: len(whole)] == whole
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.begin_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size
    again = load_tokenizer(tmp_path / "out")
    assert again.begins == ours.begins and again.encode(TEXTS[-1]) == ours.encode(TEXTS[-1])
