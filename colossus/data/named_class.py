"""The class that a folder names for its tokenizer, and what `transformers` makes of tokenizer.json by it.

Most classes read the file as it stands. Some of version 5 take vocabulary, merges and what is put in front of
texts, and split in their own way whatever the file says; and they have names of their own for tokens that the
folder leaves unnamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from colossus.data.chat_template import named_tokens
from colossus.untrusted import parse_json

AS_IT_STANDS = "PreTrainedTokenizerFast"  # reads any tokenizer.json so, in version 4 as well
_OTHER_NAMES = ("PreTrainedTokenizer", "TokenizersBackend")  # of the same
# Models whose tokenizer.json is read as it stands, whatever class is named; those among ours, and others that
# name LlamaTokenizer.
READ_AS_THEY_ARE = (
    *("mistral", "mixtral", "olmo2", "glm4_moe"),
    *("ministral", "phi3", "phimoe", "minicpm3", "jamba", "persimmon"),
)
OF_MODEL = {"gpt2": "GPT2Tokenizer", "qwen3": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer"}
"""The class of a model where none is named, if that does not read the file as it stands."""
_END = "<|endoftext|>"
DEFAULTS = {
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "GPTNeoXTokenizer": {
        "bos_token": _END,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": "<|padding|>",
    },
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
}
"""What a class calls its tokens, where the folder does not say."""
SCHEMES = ("first", "always", "never")
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def class_of(config: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The class, without the `Fast` of earlier names, that `transformers` 5 takes.

    config, model: what tokenizer_config.json and config.json hold.
    """
    kind = model.get("model_type")
    named = config.get("tokenizer_class") or model.get("tokenizer_class") or OF_MODEL.get(str(kind))
    name = str(named or AS_IT_STANDS).removesuffix("Fast")
    return AS_IT_STANDS if kind in READ_AS_THEY_ARE or name in _OTHER_NAMES else name


def names_in(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json by what they are for, those that it leaves to its class
    too."""
    return _unsaid(class_of(config, {}), config) | named_tokens(config)


def _unsaid(name: str, config: Mapping[str, Any]) -> dict[str, str]:
    return {key: token for key, token in DEFAULTS.get(name, {}).items() if key not in config}


def llama_scheme(config: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """Where a blank is put before words, if the class is LlamaTokenizer; None where it is another."""
    if class_of(config, model) != "LlamaTokenizer":
        return None
    prefix = config.get("add_prefix_space")
    if prefix is not None and not prefix:
        return "never"
    return "always" if config.get("legacy") else "first"


def as_llama(text: str, scheme: str) -> str:
    """tokenizer.json as LlamaTokenizer of `transformers` 5.24 has it. A text that begins with a blank gets no
    other, and what stands behind a special token none at all. The same text, where that class reads the file
    as it stands, or cannot be made of it."""
    try:
        state = parse_json(text)
        if not _is_llamas(state):
            return text
    except (ValueError, KeyError, TypeError, AttributeError):
        return text  # which is told where it is used
    blank = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [blank, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if scheme != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    pre_tokenizer = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    made = _made(state, None, pre_tokenizer, {"type": "Sequence", "decoders": decoders}, byte_fallback=True)
    return json.dumps(made, ensure_ascii=False)


def _is_llamas(state: Mapping[str, Any]) -> bool:
    return _is_bpe(state) and not _is_byte_level(state)


def _is_bpe(state: Mapping[str, Any]) -> bool:
    return state["model"].get("type", "BPE") == "BPE" and {"vocab", "merges"} <= {*state["model"]}


def _is_byte_level(state: Mapping[str, Any]) -> bool:
    return "ByteLevel" in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])


def _made(
    state: Mapping[str, Any], normalizer: Any, pre_tokenizer: Any, decoder: Any, byte_fallback: bool = False
) -> dict[str, Any]:
    """With another split around the same vocabulary and merges."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": state["model"]["vocab"],
        "merges": state["model"]["merges"],
    }
    parts = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder, "model": model}
    return {**state, **parts}


def reads_alike(meant: str, given: str, config: Mapping[str, Any], model: Mapping[str, Any]) -> bool:
    """Whether `transformers` 5 reads of a folder the tokenizer that is meant, as far as that is known here: a
    class that this file does not describe counts as one that reads otherwise.

    meant: tokenizer.json as it is used here. given: as it lies in the folder; config, model: what lies beside
        it, as in `class_of`.
    """
    name, ours, state = class_of(config, model), json.loads(meant), json.loads(given)
    theirs = _as_class(name, state, config, model)
    is_program = bool(config.get("auto_map"))  # one of the folder's own, which is not carried along
    if is_program or theirs is None or _split(theirs) != _split(ours):
        return False
    if _unsaid(class_of(config, {}), config).items() - _unsaid(name, config).items():
        return False  # it leaves names to a class that another is taken for
    added = {token["content"] for token in ours["added_tokens"]}
    own = _unsaid(name, config) if theirs is not state else {}
    return added >= {*own.values()}  # else the class adds them


def _as_class(
    name: str, state: dict[str, Any], config: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any] | None:
    """tokenizer.json as the class has it; itself where that reads it as it stands, None where that is not
    known. `transformers` is not asked: only the tests have it, and in one version."""
    prefix = bool(config.get("add_prefix_space"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True}
    if name == AS_IT_STANDS:
        return state
    if not _is_bpe(state):
        return None
    if name == "LlamaTokenizer":
        scheme = llama_scheme(config, model)
        is_llamas = scheme is not None and _is_llamas(state)
        return json.loads(as_llama(json.dumps(state), str(scheme))) if is_llamas else state
    if name == "GPT2Tokenizer":
        return _made(state, None, byte_level | {"use_regex": True}, byte_level)
    if name == "Qwen2Tokenizer":
        split = {"type": "Split", "pattern": {"Regex": _QWEN}, "behavior": "Isolated", "invert": False}
        parts = [split, byte_level | {"use_regex": False}]
        return _made(state, {"type": "NFC"}, {"type": "Sequence", "pretokenizers": parts}, byte_level)
    return None


def _split(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a tokenizer.json makes ids and texts but vocabulary, merges and added tokens, in one spelling:
    as `tokenizers` writes it, without what has no effect on them."""
    import tokenizers

    kept = ("normalizer", "pre_tokenizer", "decoder")
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    text = json.dumps({**empty, **{part: state.get(part) for part in kept}})
    written = json.loads(tokenizers.Tokenizer.from_str(text).to_str())
    model = {key: value or None for key, value in state["model"].items() if key not in ("vocab", "merges")}
    flags = {key: value for key, value in model.items() if value is not None and key != "type"}
    return {part: _effective(written[part], part == "decoder") for part in kept} | {"model": flags}


def _effective(part: Any, decodes: bool) -> Any:
    if isinstance(part, list):
        return [_effective(each, decodes) for each in part]
    if not isinstance(part, dict):
        return part
    if decodes and part.get("type") == "ByteLevel":  # its settings are for encoding
        return {"type": "ByteLevel"}
    return {key: _effective(value, decodes) for key, value in part.items() if key != "trim_offsets"}
