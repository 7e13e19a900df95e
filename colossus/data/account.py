"""What a tokenizer is, read once from all the files of its folder that say something of it.

`tokenizer.json` says how ids are made, and what its own encoding puts in front of a text. Tokens that only
`tokenizer_config.json`, `special_tokens_map.json` or `added_tokens.json` name are added to it, as
`transformers` adds them. What ends a text stands in `generation_config.json` and `config.json` too. What a
run was taught of all this is kept with it, in `account.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from colossus.data.added import NAMED, Vocabulary, content_of, joined
from colossus.data.chat_template import ChatFormat, chat_format
from colossus.data.named_class import DEFAULTS, SCHEMES, as_llama, class_of, llama_scheme
from colossus.errors import UserError
from colossus.untrusted import MIB, parse_json, read_text

BOS, EOS = "<|bos|>", "<|eos|>"
MAX_BYTES = 512 * MIB  # of a tokenizer.json; the longest that is known has 35
MAX_CONFIG_BYTES = 64 * MIB
TOKENIZER, CONFIG, KEPT = "tokenizer.json", "tokenizer_config.json", "account.json"
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"  # older ones, which say what CONFIG does not
USUAL_BOS = (BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
USUAL_EOS = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "[EOS]")


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
    named: the tokens that there are only because something beside tokenizer.json names them. left_out: those
        that the published model has no room for.
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
    named: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
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
    older = "added_tokens_decoder" not in config  # as in `transformers`: else older files do not count
    settings = joined(config, _object(folder / MAP, files.get(MAP)) if older else {})
    settings |= {ADDED: _object(folder / ADDED, files.get(ADDED))} if older else {}
    model = _object(folder / "config.json", _text(folder / "config.json"))
    published, kept = _ids_of_model(folder), _kept(folder)
    is_old = kept is None and _is_of_an_earlier_build(folder)
    scheme = kept["scheme"] if kept is not None else None if is_old else llama_scheme(config, model)
    vocabulary = Vocabulary.read(text if scheme is None else as_llama(text, scheme), path)
    if not is_old and (kept is None or kept["named"] is not None):  # else it is of before these counted
        settings = _with_defaults(settings, config, model, vocabulary, vocabulary.text != text)
    vocabulary = vocabulary.completed({} if is_old else settings, folder, *_room(kept, model))
    named = {name: _named(name, settings, vocabulary.ids, folder) for name in NAMED}
    names = {index: name for name, index in vocabulary.ids.items()}
    eos = named["eos_token"]
    if eos is None:
        eos = next((index for index in published["eos_token_id"] if index in names), None)
        if eos is not None and not is_old:  # as if it were named
            vocabulary = vocabulary.completed({"eos_token": names[eos]}, folder)
    tokens, special = vocabulary.ids, vocabulary.added
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
        text=vocabulary.text,
        bos_id=bos,
        eos_id=eos,
        usual_bos_id=usual,
        ends=frozenset([*published["eos_token_id"], *(kept["ends"] if kept is not None else ())]),
        pad_id=next((index for index in pads if index is not None), None),
        begins=begins,
        chats=chats,
        scheme=scheme,
        named=vocabulary.named,
        left_out=vocabulary.left_out,
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


def _with_defaults(
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    vocabulary: Vocabulary,
    is_rebuilt: bool,
) -> dict[str, Any]:
    """The settings, and what else has a name: in the class of the tokenizer, and where batches are filled up.

    is_rebuilt: whether LlamaTokenizer splits in its own way; else it is not what reads the file.
    """
    name = class_of(config, model)
    own = DEFAULTS.get(name, {}) if is_rebuilt or name != "LlamaTokenizer" else {}
    found = {key: token for key, token in own.items() if token in vocabulary.ids}
    takes_padding = (
        name == "LlamaTokenizer" or name not in DEFAULTS
    )  # others say what it is, or that there is none
    pad = {"pad_token": vocabulary.padding} if takes_padding and vocabulary.padding is not None else {}
    return {**found, **pad, **settings}


def _room(kept: Mapping[str, Any] | None, model: Mapping[str, Any]) -> tuple[list[str] | None, int | None]:
    """(tokens that may be added because they are named, tokens of the model); None: any, and any number."""
    size = model.get("vocab_size")
    return (kept["named"] or []) if kept is not None else None, size if type(size) is int else None


def _named(key: str, settings: Mapping[str, Any], tokens: Mapping[str, int], folder: Path) -> int | None:
    """The token that plays a part; None where none is named, or the model has no room for it."""
    name = content_of(settings.get(key))
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
    named = kept.get("named")
    if not (named is None or (isinstance(named, list) and all(isinstance(name, str) for name in named))):
        raise UserError(f"data.tokenizer: {folder / KEPT}: named: expected a list of tokens")
    tokens = kept.get("tokens")
    if tokens is not None and not (
        isinstance(tokens, dict) and all(isinstance(name, str) for name in tokens.values())
    ):
        raise UserError(f"data.tokenizer: {folder / KEPT}: tokens: expected names by what they are for")
    return kept | {
        "begins": None if begins is None else tuple(begins),
        "scheme": scheme,
        "tokens": tokens,
        "named": named,
    }


def as_kept(account: Account) -> str:
    """The text of account.json: what no other file says."""
    pad = [] if account.pad_id is None else [account.pad_id]
    kept: dict[str, Any] = {
        "begins": account.begins,
        "ends": sorted(account.ends),
        "pad": pad,
        "scheme": account.scheme,
        "named": account.named,
    }
    if account.chats is not None:  # that its template may name
        kept["tokens"] = dict(account.chats.variables)
    return json.dumps(kept) + "\n"


def _is_of_an_earlier_build(folder: Path) -> bool:
    """Whether a run or token shards lie around the folder, which have kept nothing."""
    return any((folder.parent / name).is_file() for name in ("job.toml", "request.json"))
