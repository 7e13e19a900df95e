"""The tokens of a tokenizer.json, and those that the files beside it add, as `transformers` adds them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossus.errors import UserError
from colossus.untrusted import parse_json

ADDED = "added_tokens.json"  # among the settings: what the file of that name holds
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _LISTED = "extra_special_tokens", "additional_special_tokens"  # the second in earlier times
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of a token that was added


@dataclass(frozen=True)
class Vocabulary:
    """text: of tokenizer.json. ids: of all its tokens. added: those that are looked for before anything else.

    padding: the token that its own settings of batches name.
    named: tokens that it has only because something beside it names them. left_out: those that found no room.
    """

    text: str
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    padding: str | None = None
    named: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str, path: Path) -> Vocabulary:
        """path: for errors. Raises UserError where the text is no tokenizer.json."""
        try:
            state = parse_json(text)
            added = {token["content"]: dict(token) for token in state["added_tokens"]}
            ids = {name: int(token["id"]) for name, token in added.items()}
            vocabulary = dict(state.get("model") or {}).get("vocab") or {}
            if isinstance(vocabulary, list):  # of Unigram: a token and its score each
                vocabulary = {name: index for index, (name, _) in enumerate(vocabulary)}
            ids = {str(name): int(index) for name, index in vocabulary.items()} | ids
            padding = content_of(dict(state.get("padding") or {}).get("pad_token"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"data.tokenizer={path}: not a tokenizer.json") from None
        return cls(text, ids, added, padding)

    def completed(
        self,
        settings: Mapping[str, Any],
        folder: Path,
        allowed: Collection[str] | None = None,
        size: int | None = None,
    ) -> Vocabulary:
        """With all tokens that the settings name; ids of new ones follow the last.

        allowed: of those that are only named; None: all but what begins and ends texts, which must be there.
        size: tokens of the model; what is only named and would have an id beyond them is left out.
        """
        declared = {token["content"]: token for token in self._declared(settings, folder)}
        named = {token["content"]: token for token in self._named(settings, {*declared, *self.added})}
        if allowed is None:
            needed = {content_of(settings.get(key)) for key in ("bos_token", "eos_token")}
            new = [name for name in named if name not in self.ids and name not in needed]
        else:
            new = [name for name in named if name not in self.ids and name in allowed]
        wanted = declared | {name: token for name, token in named.items() if name in self.ids or name in new}
        if not wanted:
            return self
        text, ids = self._with(wanted)
        left_out = tuple(name for name in new if size is not None and ids[name] >= size)
        if left_out:  # the last ones: others keep their ids
            wanted = {name: token for name, token in wanted.items() if name not in left_out}
            text, ids = self._with(wanted)
        kept = (*self.named, *(name for name in new if name not in left_out))
        left_out = (*self.left_out, *left_out)
        return Vocabulary(text, ids, {**self.added, **wanted}, self.padding, kept, left_out)

    def _with(self, tokens: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, int]]:
        import tokenizers

        try:
            made = tokenizers.Tokenizer.from_str(self.text)
        except Exception as error:  # it raises no narrower type
            raise UserError(f"data.tokenizer: not a tokenizer.json that can be used ({error})") from None
        made.add_tokens([tokenizers.AddedToken(**token) for token in tokens.values()])
        return made.to_str(), {**self.ids, **{name: int(made.token_to_id(name) or 0) for name in tokens}}

    def _declared(self, settings: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
        """The tokens that are said to be added and that were not added so."""
        decoder = settings.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict) or not all(key.isdecimal() for key in decoder):
            where = folder / "tokenizer_config.json"
            raise UserError(f"data.tokenizer: {where}: added_tokens_decoder: expected tokens by their ids")
        declared = {*self.added}
        for _, token in sorted(decoder.items(), key=lambda item: int(item[0])):
            content = content_of(token)
            if content is None:
                what = f"added_tokens_decoder: {token!r:.60} has no content"
                raise UserError(f"data.tokenizer: {folder / 'tokenizer_config.json'}: {what}")
            declared.add(content)
            flags = _flags(token if isinstance(token, dict) else {})
            if content not in self.added or _flags(self.added[content]) != flags:
                yield {"content": content} | flags
        older = settings.get(ADDED) or {}
        if not all(type(index) is int for index in older.values()):
            raise UserError(f"data.tokenizer: {folder / ADDED}: expected ids by their tokens")
        names = {content_of(value) for value, _ in _parts(settings)}
        for content in sorted(older, key=older.__getitem__):
            if content not in declared:
                yield {"content": content} | _flags({"special": content in names})

    def _named(self, settings: Mapping[str, Any], declared: Collection[str]) -> Iterator[dict[str, Any]]:
        """The tokens that play a part (`eos_token`) and were not added: whether they are there or not."""
        for value, has_name in _parts(settings):
            content = content_of(value)
            if content is not None and content not in declared:
                said = value if isinstance(value, dict) else {}
                yield {"content": content} | _flags(said | {"special": has_name or said.get("special", True)})


def joined(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of tokenizer_config.json and special_tokens_map.json together, as `transformers` has them:
    what stands in the second counts, but for lists of tokens."""
    settings = dict(config)
    if _LISTED in settings and not settings.get(_EXTRA):
        settings[_EXTRA] = settings.pop(_LISTED)
    extra, more = settings.get(_EXTRA), older.get(_EXTRA)
    both = {_EXTRA: [*extra, *more]} if isinstance(extra, list) and isinstance(more, list) else {}
    return settings | dict(older) | both


def _parts(settings: Mapping[str, Any]) -> Iterator[tuple[Any, bool]]:
    """(value, whether it has a name) of the settings that name tokens, in the order in which `transformers`
    adds them: those that all models may have, a model's own, and a list of others."""
    yield from ((settings.get(key), True) for key in NAMED)
    yield from ((v, True) for key, v in settings.items() if key.endswith("_token") and key not in NAMED)
    extra = settings.get(_EXTRA)
    if isinstance(extra, dict):
        yield from ((value, True) for value in extra.values())
    listed = extra if isinstance(extra, list) else settings.get(_LISTED)
    if isinstance(listed, list):
        yield from ((value, False) for value in listed)


def content_of(value: Any) -> str | None:
    """The name of a token, which is written as such or as an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def _flags(token: Mapping[str, Any]) -> dict[str, bool]:
    """How a token is looked for; where it does not say, as `tokenizers` has it."""
    usual = dict.fromkeys(FLAGS, False) | {"normalized": not token.get("special", False)}
    return {flag: bool(token.get(flag, usual[flag])) for flag in FLAGS}
