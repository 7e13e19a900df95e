"""Chat templates: a conversation as the text that a chat model reads.

A template is a Jinja program that comes with a tokenizer. It is rendered as `transformers` renders it
(`apply_chat_template`), in a sandbox: it may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from colossus.errors import UserError

Span = tuple[int, int]  # from the first character to behind the last one

# Where a tokenizer has no template. It takes no token that a byte-level vocabulary lacks, and the names of
# the roles soon become tokens of one that is trained on chats.
DEFAULT = """\
{%- for message in messages %}
    {%- if tools or message.tool_calls %}
        {{- raise_exception("the default template knows no tools; a tokenizer with a template of its own") }}
    {%- endif %}
    {{- bos_token + message.role + '\\n' + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- bos_token + 'assistant\\n' }}
{%- endif %}
"""
FILE = "chat_template.jinja"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Around what a generation block renders. U+FDD0 is no character of any text (Unicode 16, 23.7).
_BEGIN, _END = "\ufdd0begin\ufdd0", "\ufdd0end\ufdd0"


@dataclass(frozen=True)
class ChatFormat:
    """A chat template as text, and the special tokens that it may name: `bos_token` and the like."""

    template: str
    variables: Mapping[str, str]

    @classmethod
    def default(cls, bos: str, eos: str) -> ChatFormat:
        return cls(DEFAULT, {"bos_token": bos, "eos_token": eos})

    @property
    def is_default(self) -> bool:
        return self.template == DEFAULT

    @property
    def fingerprint(self) -> str:
        """Changes with the template, and with the tokens that it may name."""
        state = json.dumps([self.template, sorted(self.variables.items())])
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Writes the template where `chat_format` finds it; the variables are tokenizer_config.json's."""
        (folder / FILE).write_text(self.template, encoding="utf-8")


def chat_format(folder: Path, config: Mapping[str, Any], bos: str, eos: str) -> ChatFormat | None:
    """That of the tokenizer in `folder`, whose tokenizer_config.json holds `config`; None where it has none.

    A template may name those special tokens that are configured, as in `transformers`; where nothing is,
    `bos` and `eos`.

    Raises:
        UserError: it cannot be read, or none of several templates is the default.
    """
    template = _template_in(folder, config)
    if template is None:
        return None
    values = {k: v.get("content") if isinstance(v, dict) else v for k, v in config.items()}
    variables = {k: v for k, v in values.items() if k.endswith("_token") and isinstance(v, str)}
    return ChatFormat(template, variables if config else ChatFormat.default(bos, eos).variables)


def _template_in(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The text of the template, as `transformers` stores it: a file, which comes first, or a value of the
    configuration; of several the one that is named "default"."""
    if (path := folder / FILE).is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.tokenizer: {path}: cannot be read ({error})") from None
    found, where = config.get("chat_template"), folder / "tokenizer_config.json"
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    if isinstance(found, dict):
        if "default" not in found:
            raise UserError(
                f"data.tokenizer: {where}: chat_template has {sorted(map(str, found))}; "
                "one of them must be named default"
            )
        found = found["default"]
    if found is not None and not isinstance(found, str):
        raise UserError(f"data.tokenizer: {where}: chat_template={found!r:.60}: a text, or texts by name")
    return found


class ChatTemplate:
    """A chat format, compiled.

    Raises:
        UserError: it is no template.
    """

    def __init__(self, chats: ChatFormat) -> None:
        import jinja2

        self.marks_generation = _GENERATION.search(chats.template) is not None
        self._variables = chats.variables
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(chats.template)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"data.tokenizer: its chat template, line {error.lineno}: {error.message}"
            ) from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation.

        Raises:
            Exception: of any kind. A template is a program; `raise_exception` in it raises a TemplateError.
        """
        return self._template.render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )

    def generated(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> tuple[str, list[Span]]:
        """The text of a conversation, and what `{% generation %}` blocks rendered of it."""
        self._environment.marking = True
        try:
            marked = self.render(messages, tools)
        finally:
            self._environment.marking = False
        return _unmarked(marked)


def _unmarked(marked: str) -> tuple[str, list[Span]]:
    pieces: list[str] = []
    spans: list[Span] = []
    begin = length = 0
    for piece in re.split(f"({_BEGIN}|{_END})", marked):
        if piece == _BEGIN:
            begin = length
        elif piece == _END:
            spans += [(begin, length)] if begin < length else []
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def _environment() -> Any:
    """What templates are written for: see `transformers/utils/chat_template_utils.py`."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}`: what the assistant says, its end of turn included."""

        tags = {"generation"}  # noqa: RUF012  # as the base class declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_rendered"), [], [], body).set_lineno(line)

        def _rendered(self, caller: Any) -> str:
            text: str = caller()
            marking: bool = self.environment.marking  # type: ignore[attr-defined]
            return f"{_BEGIN}{text}{_END}" if marking else text

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Jinja's own escapes what HTML would misread."""
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    now = datetime.now()  # once: else a chat across midnight would have two dates
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.extend(marking=False)
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": now.strftime}
    return environment
