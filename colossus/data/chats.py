"""Chats: conversations to fine-tune on. A model reads all of one and learns what the assistant says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from colossus.data.chat_template import ChatTemplate, Span
from colossus.errors import UserError
from colossus.untrusted import parse_json

FIELD = "messages"  # of a record that is a chat
ROLES = ("system", "user", "assistant", "tool")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that `transformers` takes as one


@dataclass(frozen=True)
class Chat:
    """A conversation, checked. tools: descriptions of functions, or None: to a template an empty list is
    another thing. where: `str` of it says the place.

    A message has a role and, but where it only calls tools, a text as content; what else it has is the
    template's to read.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    where: object

    @property
    def text(self) -> str:
        """What stands for the chat where there is no template yet: for a tokenizer to be trained on."""
        return "\n".join(f"{message['role']}\n{message.get('content', '')}" for message in self.messages)


def read_json(row: dict[str, Any], text_field: str) -> dict[str, Any]:
    """The record, its messages and tools read where they are JSON text: all of them, or each. What is asked
    for as a text stays one."""
    names = [name for name in (FIELD, "tools") if row.get(name) is not None and name != text_field]
    found = {name: _read_list(row[name]) for name in names}
    return row | found if found else row


def _read_list(value: Any) -> Any:
    """A list, where the value is one as JSON text, or has items that are objects as JSON text; else the
    value. An empty text is none, as null is."""
    if isinstance(value, str):
        found = _parsed(value or "null")
        value = found if found is None or isinstance(found, list) else value
    if not isinstance(value, list):
        return value
    items = [_parsed(item) if isinstance(item, str) else item for item in value]
    return [new if isinstance(new, dict) else old for new, old in zip(items, value, strict=True)]


def _parsed(text: str) -> Any:
    """What a text spells in JSON; itself where that is nothing."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def is_chat(row: dict[str, Any], text_field: str) -> bool:
    """Whether a record is a chat: it has `messages`, and no other field than the usual one is asked for."""
    if text_field in row and (text_field != "text" or not isinstance(row.get(FIELD), list)):
        return False
    return FIELD in row


def chat_in(row: dict[str, Any], where: object) -> Chat:
    """The chat of a record.

    Raises:
        UserError: a message is not a role and a text, or none is the assistant's.
    """
    messages, tools = row.get(FIELD), row.get("tools")
    if not isinstance(messages, list) or not messages:
        has = "" if FIELD in row else f"; the record has {list(row)}"
        raise _wrong(where, FIELD, messages, f"a list of messages, each with role and content{has}")
    if tools is not None and not isinstance(tools, list):
        raise _wrong(where, "tools", tools, "a list of JSON schemas")
    checked = [_message(message, where, f"{FIELD}[{index}]") for index, message in enumerate(messages)]
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise _wrong(where, f"{FIELD}.role", roles, "none is assistant, so there is nothing to learn")
    weights = [message.get("weight", 1) for message in checked if message["role"] == "assistant"]
    if not any(weights):
        raise _wrong(where, f"{FIELD}.weight", weights, "all of the assistant's are 0: nothing to learn")
    return Chat(checked, tools, where)


def check_messages(messages: Any, field: str) -> list[dict[str, Any]]:
    """Messages that a model is asked with, each checked as those that it learns from.

    field: their name, for errors.

    Raises:
        UserError: they are no list, none, or one is not a role and a text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise UserError.field(field, messages, "expected one message or more, each with role and content")
    return [_message(message, None, f"{field}[{index}]") for index, message in enumerate(messages)]


def check_tools(tools: Any) -> list[Any] | None:
    """Descriptions of the functions that a model may call; None where nothing is said of them.

    Raises:
        UserError: they are no list, or one is no JSON schema.
    """
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise UserError.field("tools", tools, "expected a list of JSON schemas")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise UserError.field(f"tools[{index}]", tool, "expected a JSON schema, an object")
    return [*tools]


def _message(message: Any, where: object, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(where, name, message, "a message is an object with role and content")
    message = {key: value for key, value in message.items() if value is not None}  # of a table's empty cells
    role = message.get("role")
    if role not in ROLES:
        has = "" if "role" in message else f"; it has {list(message)}"
        raise _wrong(where, f"{name}.role", role, f"one of {', '.join(ROLES)}{has}")
    if "content" in message or not (role == "assistant" and message.get("tool_calls")):
        message["content"] = _text(message.get("content"), where, f"{name}.content")
    if (weight := message.get("weight", 1)) not in (0, 1):
        raise _wrong(where, f"{name}.weight", weight, "0 (read, and not learned) or 1")
    if isinstance(message.get("tool_calls"), str):
        message["tool_calls"] = _read_list(message["tool_calls"])
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning} | message | {"reasoning_content": reasoning}
    return message


def _text(content: Any, where: object, name: str) -> str:
    """A text, or a list of parts that are all text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(where, name, content, "a text, or a list of parts of type text")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text":
            can = "asked" if where is None else "learned"
            allowed = f"only text can be {can}, no images, sounds or other parts"
            raise _wrong(where, f"{name}[{index}].type", kind, allowed)
        if not isinstance(part.get("text"), str):
            raise _wrong(where, f"{name}[{index}].text", part.get("text"), "a text")
        texts.append(part["text"])
    return "".join(texts)


def rendered(chat: Chat, template: ChatTemplate) -> tuple[str, list[Span]]:
    """The whole text of a chat, and the stretches of it that the assistant says, ends of turns included.

    They are what `{% generation %}` blocks render, where the template has any. Else each is what the text
    up to a message of the assistant has beyond the text before it with the header of an answer. Those of
    messages whose weight is 0 are left out.

    Raises:
        UserError: the template refuses the chat, does not say what is the assistant's, or a text that goes
            on is not the text before and something more.
    """
    whole = _render(chat, template, len(chat.messages))
    if template.marks_generation(chat.tools):
        with _refusals(chat, FIELD):
            text, spans = template.generated(chat.messages, chat.tools)
        if text != whole or not spans:
            raise UserError(
                f"data.corpus: {chat.where}: the chat template's generation blocks do not say which part of "
                "its text is the assistant's; each must stand around one answer and its end of turn"
            )
        return whole, _weighed(chat, spans)
    spans = []
    for index, message in enumerate(chat.messages):
        if message["role"] == "assistant" and message.get("weight", 1):
            before = _render(chat, template, index, add_generation_prompt=True)
            after = _render(chat, template, index + 1)
            if not whole.startswith(after):
                raise _unstable(chat, f"of {FIELD}[:{index + 1}] is not how the whole chat begins")
            if not after.startswith(before):
                raise _unstable(chat, f"to ask for {FIELD}[{index}] is not how that message begins")
            if len(before) < len(after):
                spans.append((len(before), len(after)))
    if not spans:
        raise UserError(
            f"data.corpus: {chat.where}: the chat template renders nothing of what the assistant says"
        )
    return whole, spans


def _weighed(chat: Chat, spans: list[Span]) -> list[Span]:
    """The spans of messages that count; one belongs to each message of the assistant, where any does not."""
    weights = [message.get("weight", 1) for message in chat.messages if message["role"] == "assistant"]
    if all(weights):
        return spans
    if len(spans) != len(weights):
        raise UserError(
            f"data.corpus: {chat.where}: {len(weights)} messages of the assistant, one of weight 0, are "
            f"{len(spans)} generation blocks of the chat template; which block is whose cannot be told"
        )
    return [span for span, weight in zip(spans, weights, strict=True) if weight]


def _unstable(chat: Chat, what: str) -> UserError:
    several = sum(message["role"] == "assistant" for message in chat.messages) > 1
    split = ", or split the chat so that the assistant speaks once in each" if several else ""
    return UserError(
        f"data.corpus: {chat.where}: what the chat template renders {what}, so what the assistant says "
        "cannot be told apart; put {% generation %} and {% endgeneration %} around it in the template" + split
    )


def _render(chat: Chat, template: ChatTemplate, count: int, add_generation_prompt: bool = False) -> str:
    """The text of the first `count` messages."""
    which = FIELD if count == len(chat.messages) else f"{FIELD}[:{count}]"
    with _refusals(chat, which):
        return template.render(chat.messages[:count], chat.tools, add_generation_prompt)


@contextlib.contextmanager
def _refusals(chat: Chat, which: str) -> Iterator[None]:
    """Says of whatever a template, a program of the user's, raises where that was."""
    try:
        yield
    except Exception as error:
        raise UserError(f"data.corpus: {chat.where}: the chat template refuses {which} ({error})") from None


def learned_tokens(offsets_N2: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """1 for each token, from the second on, with a character in one of `spans` (in order, apart); uint8.

    offsets_N2: the first character of each token, and the one behind its last. A document's first token is
    never learned: nothing precedes it.
    """
    learned = is_within(offsets_N2, spans)
    learned[:1] = 0
    return learned


def is_within(offsets_N2: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """1 for each token with a character in one of `spans` (in order, apart); uint8."""
    begins, ends = np.array([*spans, (np.iinfo(np.int64).max,) * 2], np.int64).T
    span = np.searchsorted(ends, offsets_N2[:, 0], side="right")  # the first that ends behind a token's begin
    return (offsets_N2[:, 1] > begins[span]).astype(np.uint8)


def _wrong(where: object, name: str, value: Any, allowed: str) -> UserError:
    """where: None of what a model is asked with, which is in no corpus."""
    options = ROLES if name.endswith(".role") and isinstance(value, str) else ()
    place = "" if where is None else f"data.corpus: {where}: "
    return UserError.field(f"{place}{name}", value, allowed, options)
