"""A conversation as a prompt: its ids, up to where the assistant answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from colossus.data.chat_template import ChatTemplate, Span
from colossus.data.chats import check_messages, check_tools
from colossus.errors import UserError

if TYPE_CHECKING:
    from colossus.data.tokenizer import Tokenizer

MARKS = range(0xFDD0, 0xFDF0)  # no characters of any text (Unicode 16, 23.7)


@dataclass(frozen=True)
class _Asked:
    """What a template renders; field: the name of the messages, for errors."""

    template: ChatTemplate
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    field: str

    def render(self) -> str:
        try:
            return self.template.render(self.messages, self.tools, add_generation_prompt=True)
        except Exception as error:  # a template is a program, which may raise anything
            raise UserError(f"{self.field}: the chat template refuses the messages ({error})") from None

    def mapped(self, change: Callable[[str], str]) -> _Asked:
        """With all texts changed, but for the role of each message."""
        messages = [
            {name: value if name == "role" else _mapped(value, change) for name, value in message.items()}
            for message in self.messages
        ]
        return replace(self, messages=messages, tools=_mapped(self.tools, change))


def asked_ids(messages: Any, tokenizer: Tokenizer, field: str, tools: Any = None) -> list[int]:
    """Ids of messages as the tokenizer's chat template renders them, with the header of an answer.

    They are those of `apply_chat_template(messages, tools, add_generation_prompt=True)` in `transformers`,
    but that only the template makes special tokens: a message or a tool that spells one has its letters.

    field: the name of the messages, for errors. tools: JSON schemas of the functions that may be called.

    Raises:
        UserError: they are no messages, or the tokenizer has no template; the template refuses them, or does
            nothing with the tools.
    """
    if tokenizer.chats is None:
        raise UserError(
            f"{field}: messages, which this tokenizer has no chat template for; put chat_template.jinja "
            "beside its tokenizer.json, train on chats (which brings one), or give a text"
        )
    template = ChatTemplate(tokenizer.chats)
    asked = _Asked(template, check_messages(messages, field), check_tools(tools), field)
    text = asked.render()
    if asked.tools and text == replace(asked, tools=None).render():
        raise UserError("tools: the tokenizer's chat template does nothing with them; leave them out")
    _check_characters(text, field)
    tokens = _tokens(template, tokenizer)
    marked, mark = _marked(asked, text, tokens, tokenizer)
    parts = marked.split(mark)
    if "".join(parts) != text or len(parts) % 2 == 0:
        raise UserError(
            f"{field}: the messages spell a special token, and the chat template does something with it, so "
            "that it cannot be told from the template's own; leave it out"
        )
    ends = list(accumulate(map(len, parts)))
    spelled = list(zip(ends[:-1:2], ends[1::2], strict=True))
    if spelled:
        ids = _ids(text, spelled, mark, tokens, tokenizer)
    else:
        ids = tokenizer.encode_rendered([text])[0][0].tolist()
    if not ids:
        raise UserError(f"{field}: the chat template makes nothing of the messages")
    return ids


def _tokens(template: ChatTemplate, tokenizer: Tokenizer) -> dict[int, str]:
    """What only the template makes: special tokens, and those that stand around a question whatever they are
    said to be."""
    found = {index: name for name, index in tokenizer.special_tokens.items()}
    try:
        text = template.render([{"role": "user", "content": "a"}])
    except Exception:  # a program, which may refuse this chat in its own way
        return found
    around = {*tokenizer.encode_rendered([text])[0][0].tolist()}
    return found | {index: name for name, index in tokenizer.added_tokens.items() if index in around}


def _check_characters(text: str, field: str) -> None:
    if half := re.search("[\ud800-\udfff]", text):
        raise UserError(
            f"{field}: a message holds U+{ord(half[0]):04X}, half of a surrogate pair, which no text holds"
        )


def _marked(asked: _Asked, text: str, tokens: Mapping[int, str], tokenizer: Tokenizer) -> tuple[str, str]:
    """(the text, with a mark before and behind each special token that a message spells; the mark)."""
    held = f"{text}{json.dumps([asked.messages, asked.tools], ensure_ascii=False, default=str)}"
    mark = next((chr(code) for code in MARKS if chr(code) not in held), None)
    if mark is None:
        raise UserError(f"{asked.field}: the messages hold all of U+FDD0 to U+FDEF, which are no characters")

    def marking(words: str) -> str:
        ((ids, offsets_N2),) = tokenizer.encode_rendered([words])
        found = [span for index, span in zip(ids, offsets_N2.tolist(), strict=True) if index in tokens]
        cuts = [0, *(cut for span in found for cut in span), len(words)]
        return mark.join(words[a:b] for a, b in pairwise(cuts))

    marked = asked.mapped(marking)
    return (text if marked == asked else marked.render()), mark


def _ids(
    text: str, spelled: Sequence[Span], mark: str, names: Mapping[int, str], tokenizer: Tokenizer
) -> list[int]:
    """Of a rendered text, in which messages spell the special tokens at `spelled`.

    The template's own are given other names, which no message knows, so that all others are letters.
    """
    ((ids, offsets_N2),) = tokenizer.encode_rendered([text])
    renamed, at = [], 0
    for index, (begin, end) in zip(ids.tolist(), offsets_N2.tolist(), strict=True):
        is_its_own = names.get(index, mark) in text[begin:end]
        if is_its_own and not any(begin < last and first < end for first, last in spelled):
            renamed += [text[at:begin], f"{mark}{names[index]}{mark}"]
            at = end
    renamed.append(text[at:])
    return tokenizer.encode_named(
        "".join(renamed), {f"{mark}{name}{mark}": index for index, name in names.items()}
    )


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with all texts in it changed, names too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(name, change): _mapped(inner, change) for name, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list | tuple) else value
