"""What generation is asked with, checked: an error names the field, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from colossus.data.asked import asked_ids
from colossus.errors import UserError

if TYPE_CHECKING:
    from colossus.data.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
MAX_SEED = 2**63 - 1
PROMPT = "a text, or a list of token ids or of messages"


def check_whole(field: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number; neither a truth value nor one with a point, whatever it is equal to."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        whole = int(value)
        if whole >= least and (most is None or whole <= most):
            return whole
    bound = "or more" if most is None else f"to {most}"
    raise UserError.field(field, repr(value), f"must be a whole number, {least} {bound}")


def check_number(field: str, value: Any, holds: Callable[[float], bool], allowed: str) -> float:
    """A number for which `holds` is true, as it is not of NaN in any comparison."""
    if not isinstance(value, Real) or isinstance(value, bool) or not holds(float(value)):
        raise UserError.field(field, repr(value), allowed)
    return float(value)


def check_prompts(prompts: Any, tokenizer: Tokenizer, context: int, tools: Any) -> list[str | list[int]]:
    """The prompts: texts, or ids of the tokenizer; messages are the ids that its chat template makes of them.

    context: tokens of the model's. tools: what messages may call, or None.

    Raises:
        UserError: they are no list, or one of them is none of these; messages leave no room in the context.
    """
    if isinstance(prompts, str):
        raise UserError.field("prompts", prompts, "expected a list of strings; write [prompt]")
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise UserError.field("prompts", repr(prompts), f"expected a list; each of it {PROMPT}")
    return [
        check_prompt(f"prompts[{index}]", prompt, tokenizer, context, tools)
        for index, prompt in enumerate(prompts)
    ]


def check_prompt(field: str, prompt: Any, tokenizer: Tokenizer, context: int, tools: Any) -> str | list[int]:
    is_messages = _is_messages(prompt)
    if tools is not None and not is_messages:
        raise UserError(f"tools: {field} is no list of messages, and only in a chat are tools called")
    if isinstance(prompt, str):
        return _check_text(field, prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        several = "; messages are one prompt together: a list of them" if isinstance(prompt, Mapping) else ""
        raise UserError.field(field, repr(prompt), f"expected {PROMPT}{several}")
    if not len(prompt):
        allowed = "expected one token id or more, or one message or more; of a text, '' is none"
        raise UserError.field(field, repr(prompt), allowed)
    if is_messages:
        return _check_room(field, asked_ids(prompt, tokenizer, field, tools), context)
    most = tokenizer.vocab_size - 1
    return [check_whole(f"{field}[{index}]", token, 0, most) for index, token in enumerate(prompt)]


def _is_messages(prompt: Any) -> bool:
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return is_list and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _check_room(field: str, ids: list[int], context: int) -> list[int]:
    """A question is never cut, as a text that is continued may be: its begin says who asks whom."""
    if len(ids) >= context:
        raise UserError(
            f"{field}: the messages are {len(ids):,} tokens with what the chat template puts around them; "
            f"the model's context is {context:,}, an answer's first token included"
        )
    return ids


def check_stop(stop: Any) -> tuple[str, ...]:
    """The texts to stop before; one by itself is one of a list."""
    if isinstance(stop, str):
        return (_check_stop("stop", stop),)
    if not isinstance(stop, Sequence) or isinstance(stop, bytes | bytearray):
        raise UserError.field("stop", repr(stop), "expected a list of texts")
    return tuple(_check_stop(f"stop[{index}]", text) for index, text in enumerate(stop))


def _check_stop(field: str, text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise UserError.field(field, repr(text), "expected a text of one character or more")
    return _check_text(field, text)


def _check_text(field: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError.field(
            field,
            ascii(text),
            f"character {error.start} is U+{code:04X}, half of a surrogate pair, which no text holds",
        ) from None
    return text
