"""What a tokenizer is, read once from all the files of its folder that say something of it.

`tokenizer.json` says how ids are made, and what its own encoding puts in front of a text. Tokens that only
`tokenizer_config.json`, `special_tokens_map.json` or `added_tokens.json` name are added to it, as
`transformers` adds them. What ends a text stands in `generation_config.json` and `config.json` too. What a
run was taught of all this is kept with it, in `account.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from colossus.data.chat_template import ChatFormat, chat_format
from colossus.errors import UserError
from colossus.untrusted import MIB, parse_json, read_text

BOS, EOS = "<|bos|>", "<|eos|>"
MAX_BYTES = 512 * MIB  # of a tokenizer.json; the longest that is known has 35
MAX_CONFIG_BYTES = 64 * MIB
TOKENIZER, CONFIG, KEPT = "tokenizer.json", "tokenizer_config.json", "account.json"
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"  # older ones, which say what CONFIG does not
USUAL_BOS = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
USUAL_EOS = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "[EOS]")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SCHEMES = ("first", "always", "never")
# Models whose tokenizer.json `transformers` reads as it is, whatever class the configuration names.
READ_AS_THEY_ARE = ("mistral", "mixtral", "olmo2", "glm4_moe")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of a token that was added


@dataclass(frozen=True)
class Account:
    """What the files of a tokenizer say.

    text: of tokenizer.json, with every token in it that the other files name.
    bos_id, eos_id: the tokens that are named to begin a text and to end a document. Whether the first is put
        in front of texts is another matter.
    usual_bos_id: one that is commonly named so, where none is named.
    ends: other tokens that are said to end a text. pad_id: fills up batches.
    begins: what a run was taught to find in front of a text; None: what the tokenizer's own encoding puts
        there.
    scheme: where a blank is put before words, if `transformers` reads the file as its LlamaTokenizer does.
    cleans_up: decoding takes away blanks before punctuation, as `clean_up_tokenization_spaces` asks.
    files: the tokenizer's own, as they were, by name.
    """

    text: str
    bos_id: int | None = None
    eos_id: int | None = None
    usual_bos_id: int | None = None
    ends: frozenset[int] = frozenset()
    pad_id: int | None = None
    begins: tuple[int, ...] | None = None
    chats: ChatFormat | None = None
    scheme: str | None = None
    cleans_up: bool = False
    files: Mapping[str, str] = field(default_factory=dict)


def read_account(path: Path, root: Path) -> Account:
    """That of a tokenizer.json, which must lie in `root`, and of the files beside it.

    Raises:
        UserError: one of them cannot be read, or names a token that there is not.
    """
    folder = path.parent
    text = _tokenizer_text(path, root)
    found = {name: _text(folder / name) for name in (CONFIG, MAP, ADDED)}
    files = {TOKENIZER: text} | {name: data for name, data in found.items() if data is not None}
    config = _object(folder / CONFIG, files.get(CONFIG))
    settings = dict(config)
    if "added_tokens_decoder" not in config:  # as in `transformers`: else the older files do not count
        settings |= _object(folder / MAP, files.get(MAP))
        settings |= {ADDED: _object(folder / ADDED, files.get(ADDED))}
    published, kept = _ids_of_model(folder), _kept(folder)
    is_old = kept is None and _is_of_an_earlier_build(folder)
    scheme = kept["scheme"] if kept is not None else None if is_old else _scheme(config, folder)
    text = text if scheme is None else _as_llama(text, scheme)
    text, tokens, special = _completed(text, {} if is_old else settings, path)
    names = {index: name for name, index in tokens.items()}
    named = {name: _named(name, settings, tokens, folder) for name in NAMED}
    eos = named["eos_token"]
    if eos is None:
        eos = next((index for index in published["eos_token_id"] if index in names), None)
        if eos is not None and not is_old:  # as if it were named
            text, tokens, special = _completed(text, {"eos_token": names[eos]}, path)
    if eos is None:
        eos = next((tokens[name] for name in USUAL_EOS if name in special), None)
    usual = next((tokens[name] for name in USUAL_BOS if name in special), None)
    bos = named["bos_token"]
    first = next((index for index in (bos, usual, eos) if index is not None), None)
    begins = kept["begins"] if kept is not None else None
    if is_old:  # it put this in front of every text, and read tokenizer.json alone
        begins = () if first is None else (first,)
    chats = chat_format(folder, settings if config else {}, _name(names, first), _name(names, eos))
    if chats is not None and kept is not None and kept["tokens"] is not None:
        chats = replace(chats, variables=kept["tokens"])
    pads = [named["pad_token"], *published["pad_token_id"], *(kept["pad"] if kept is not None else ())]
    return Account(
        text=text,
        bos_id=bos,
        eos_id=eos,
        usual_bos_id=usual,
        ends=frozenset([*published["eos_token_id"], *(kept["ends"] if kept is not None else ())]),
        pad_id=next((index for index in pads if index is not None), None),
        begins=begins,
        chats=chats,
        scheme=scheme,
        cleans_up=config.get("clean_up_tokenization_spaces") is True,
        files=files,
    )


def _name(names: Mapping[int, str], index: int | None) -> str:
    return "" if index is None else names[index]


def _tokenizer_text(path: Path, root: Path) -> str:
    try:
        return read_text(path, MAX_BYTES, root)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.tokenizer={path}: cannot be read ({error}); bpe, bytes or a tokenizer.json"
        ) from None


def _text(path: Path) -> str | None:
    """Of one of the smaller files; None where there is none."""
    if not path.is_file():
        return None
    try:
        return read_text(path, MAX_CONFIG_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.tokenizer: {path}: cannot be read ({error})") from None


def _object(path: Path, text: str | None) -> dict[str, Any]:
    """What such a file holds; nothing where there is none."""
    if text is None:
        return {}
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UserError(f"data.tokenizer: {path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"data.tokenizer: {path}: not a {path.name}")
    return found


def _scheme(config: Mapping[str, Any], folder: Path) -> str | None:
    """Where a blank is put before words, if the files name the LlamaTokenizer of `transformers` and it takes
    that; None where it reads tokenizer.json as it is."""
    model = _object(folder / "config.json", _text(folder / "config.json")).get("model_type")
    if (
        str(config.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer"
        or model in READ_AS_THEY_ARE
    ):
        return None
    prefix = config.get("add_prefix_space")
    if prefix is not None and not prefix:
        return "never"
    return "always" if config.get("legacy") else "first"


def _as_llama(text: str, scheme: str) -> str:
    """tokenizer.json as LlamaTokenizer of `transformers` 5.24 has it: it takes the vocabulary, the merges and
    what is put in front, and splits and decodes in its own way. A text that begins with a blank gets no
    other, and what stands behind a special token none at all."""
    try:
        state = parse_json(text)
        model = state["model"]
        is_byte_level = "ByteLevel" in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])
        if model.get("type", "BPE") != "BPE" or "merges" not in model or is_byte_level:
            return text
    except (ValueError, KeyError, TypeError, AttributeError):
        return text  # which is told where it is used
    blank = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [blank, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if scheme != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    state |= {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": model["vocab"],
            "merges": model["merges"],
        },
    }
    return json.dumps(state, ensure_ascii=False)


def _completed(
    text: str, settings: Mapping[str, Any], path: Path
) -> tuple[str, dict[str, int], frozenset[str]]:
    """(tokenizer.json with all tokens that the settings name, ids of all, names of those that were added)."""
    try:
        state = parse_json(text)
        added = {token["content"]: dict(token) for token in state["added_tokens"]}
        ids = {name: int(token["id"]) for name, token in added.items()}
        vocabulary = dict(state.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # of Unigram: a token and its score each
            vocabulary = {name: index for index, (name, _) in enumerate(vocabulary)}
        tokens = {str(name): int(index) for name, index in vocabulary.items()} | ids
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"data.tokenizer={path}: not a tokenizer.json") from None
    wanted = {token["content"]: token for token in _declared(settings, tokens, added, path.parent)}
    if not wanted:
        return text, tokens, frozenset(added)
    import tokenizers

    try:
        made = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # it raises no narrower type
        raise UserError(f"data.tokenizer: not a tokenizer.json that can be used ({error})") from None
    made.add_tokens([tokenizers.AddedToken(**token) for token in wanted.values()])
    tokens |= {name: made.token_to_id(name) for name in wanted}
    return made.to_str(), tokens, frozenset([*added, *wanted])


def _declared(
    settings: Mapping[str, Any], tokens: Mapping[str, int], added: Mapping[str, Any], folder: Path
) -> Iterator[dict[str, Any]]:
    """The tokens that the settings name and that were not added so: all that are said to be, and of those
    that have a part to play (`eos_token`) the ones that there are."""
    parts = [value for key, value in settings.items() if key.endswith("_token")]  # a model's own, too
    names = {name for value in parts if (name := _content(value)) is not None}
    names |= {
        name for key in ("extra_special_tokens", "additional_special_tokens") for name in _all(settings, key)
    }
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(key.isdecimal() for key in decoder):
        raise UserError(
            f"data.tokenizer: {folder / CONFIG}: added_tokens_decoder: expected tokens by their ids"
        )
    declared = {*added}
    for _, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        content = _content(token)
        if content is None:
            what = f"added_tokens_decoder: {token!r:.60} has no content"
            raise UserError(f"data.tokenizer: {folder / CONFIG}: {what}")
        declared.add(content)
        flags = _flags(token if isinstance(token, dict) else {})
        if content not in added or _flags(added[content]) != flags:
            yield {"content": content} | flags
    older = settings.get(ADDED) or {}
    if not all(type(index) is int for index in older.values()):
        raise UserError(f"data.tokenizer: {folder / ADDED}: expected ids by their tokens")
    for content in sorted(older, key=older.__getitem__):
        if content not in declared:
            declared.add(content)
            yield {"content": content} | _flags({"special": content in names})
    for content in sorted(names - declared):
        if content in tokens:
            yield {"content": content} | _flags({"special": True})


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    """How a token is looked for; where it does not say, as `tokenizers` has it."""
    usual = dict.fromkeys(FLAGS, False) | {"normalized": not token.get("special", False)}
    return {flag: bool(token.get(flag, usual[flag])) for flag in FLAGS}


def _content(value: Any) -> str | None:
    """The name of a token, which is written as such or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _all(settings: Mapping[str, Any], key: str) -> list[str]:
    values = settings.get(key) or []
    values = list(values.values()) if isinstance(values, dict) else values
    return [name for value in values if (name := _content(value))] if isinstance(values, list) else []


def _named(key: str, settings: Mapping[str, Any], tokens: Mapping[str, int], folder: Path) -> int | None:
    """The token that plays a part; None where none is named."""
    name = _content(settings.get(key))
    if name is None:
        return None
    if name not in tokens and key in ("bos_token", "eos_token"):
        raise UserError.field(
            f"data.tokenizer: {folder / CONFIG}: {key}", name, "the tokenizer has no such token", tokens
        )
    return tokens.get(name)


def _ids_of_model(folder: Path) -> dict[str, list[int]]:
    """What a published model says to begin, end and fill up texts; generation_config.json comes first."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    found: dict[str, list[int]] = {key: [] for key in keys}
    for name in ("config.json", "generation_config.json"):
        values = _object(folder / name, _text(folder / name))
        for key in keys:
            value = values.get(key)
            ids = [] if value is None else value if isinstance(value, list) else [value]
            if not all(type(index) is int for index in ids):
                raise UserError.field(f"{folder / name}: {key}", value, "expected a token's id, or several")
            if ids:
                found[key] = [index for index in ids if index >= 0]
    return found


def _kept(folder: Path) -> dict[str, Any] | None:
    """What `as_kept` wrote; None where nothing was kept."""
    text = _text(folder / KEPT)
    if text is None:
        return None
    kept = _object(folder / KEPT, text)
    begins = kept.get("begins")
    lists = [[] if begins is None else begins, kept.get("ends"), kept.get("pad")]
    if not all(isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids) for ids in lists):
        raise UserError(f"data.tokenizer: {folder / KEPT}: expected lists of ids: begins, ends, pad")
    scheme = kept.get("scheme")
    if scheme not in (None, *SCHEMES):
        raise UserError.field(
            f"data.tokenizer: {folder / KEPT}: scheme", scheme, f"one of {', '.join(SCHEMES)}"
        )
    tokens = kept.get("tokens")
    if tokens is not None and not (
        isinstance(tokens, dict) and all(isinstance(name, str) for name in tokens.values())
    ):
        raise UserError(f"data.tokenizer: {folder / KEPT}: tokens: expected names by what they are for")
    return kept | {"begins": None if begins is None else tuple(begins), "scheme": scheme, "tokens": tokens}


def as_kept(account: Account) -> str:
    """The text of account.json: what no other file says."""
    pad = [] if account.pad_id is None else [account.pad_id]
    kept: dict[str, Any] = {
        "begins": account.begins,
        "ends": sorted(account.ends),
        "pad": pad,
        "scheme": account.scheme,
    }
    if account.chats is not None:  # that its template may name
        kept["tokens"] = dict(account.chats.variables)
    return json.dumps(kept) + "\n"


def _is_of_an_earlier_build(folder: Path) -> bool:
    """Whether a run or token shards lie around the folder, which have kept nothing."""
    return any((folder.parent / name).is_file() for name in ("job.toml", "request.json"))
