"""Chat templates: a conversation as the text that a chat model reads.

A template is a Jinja program that comes with a tokenizer. It is rendered as `transformers` renders it
(`apply_chat_template`), in a sandbox: it may come from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossus.errors import UserError
from colossus.untrusted import MIB, read_text

if TYPE_CHECKING:
    import jinja2

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
TOOLS_NAME = "tool_use"  # of several templates the one for chats with tools
TOOLS_FILE = f"additional_chat_templates/{TOOLS_NAME}.jinja"
MAX_BYTES = 4 * MIB
MAX_TURNS = 5_000_000  # of all loops of a template together: seconds
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Around what a generation block renders. U+FDD0 is no character of any text (Unicode 16, 23.7).
_BEGIN, _END = "\ufdd0begin\ufdd0", "\ufdd0end\ufdd0"


@dataclass(frozen=True)
class ChatFormat:
    """A chat template as text, and the special tokens that it may name: `bos_token` and the like.

    with_tools: the template of chats with tools, where that is another one.
    """

    template: str
    variables: Mapping[str, str]
    with_tools: str | None = None

    @classmethod
    def default(cls, bos: str, eos: str) -> ChatFormat:
        return cls(DEFAULT, {"bos_token": bos, "eos_token": eos})

    @property
    def is_default(self) -> bool:
        return self.template == DEFAULT

    @property
    def fingerprint(self) -> str:
        """Changes with the template, and with the tokens that it may name."""
        more = [] if self.with_tools is None else [self.with_tools]
        state = json.dumps([self.template, sorted(self.variables.items()), *more])
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    def mentions(self, name: str) -> bool:
        """Whether a template may use what goes by that name."""
        return name in self.template or name in (self.with_tools or "")

    def save(self, folder: Path) -> None:
        """Writes the template where `chat_format` finds it; the variables are tokenizer_config.json's."""
        (folder / FILE).write_text(self.template, encoding="utf-8")
        if self.with_tools is not None:
            (folder / TOOLS_FILE).parent.mkdir(exist_ok=True)
            (folder / TOOLS_FILE).write_text(self.with_tools, encoding="utf-8")


def chat_format(folder: Path, config: Mapping[str, Any], bos: str, eos: str) -> ChatFormat | None:
    """That of the tokenizer in `folder`, whose tokenizer_config.json holds `config`; None where it has none.

    A template may name those special tokens that are configured, as in `transformers`; where nothing is,
    `bos` and `eos`.

    Raises:
        UserError: it cannot be read, or none of several templates is the default.
    """
    found = _templates_in(folder, config)
    if not found:
        return None
    variables = named_tokens(config) if config else ChatFormat.default(bos, eos).variables
    return ChatFormat(found["default"], variables, found.get(TOOLS_NAME))


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json by what they are for, a model's own too."""
    extra = config.get("extra_special_tokens")
    named = {name: token for name, token in config.items() if name.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    values = {name: v.get("content") if isinstance(v, dict) else v for name, v in named.items()}
    return {name: value for name, value in values.items() if isinstance(value, str)}


def _templates_in(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the templates by name, as `transformers` stores them: in files, which come first, or as a
    value of the configuration. Where there is any, one is named "default"."""
    files = {"default": FILE, TOOLS_NAME: TOOLS_FILE}
    texts = {name: _text(folder / file, folder) for name, file in files.items() if (folder / file).is_file()}
    if "default" in texts:
        return texts
    found, where = config.get("chat_template"), folder / "tokenizer_config.json"
    if isinstance(found, list):
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    if isinstance(found, dict):
        if "default" not in found:
            raise UserError(
                f"data.tokenizer: {where}: chat_template has {sorted(map(str, found))}; "
                "one of them must be named default"
            )
        found = {name: found[name] for name in files if found.get(name) is not None}
    elif found is not None:
        found = {"default": found}
    for template in (found or {}).values():
        if not isinstance(template, str):
            said = f"chat_template={template!r:.60}: a text, or texts by name"
            raise UserError(f"data.tokenizer: {where}: {said}")
    return (found or {}) | texts if found else {}


def _text(path: Path, folder: Path) -> str:
    try:
        return read_text(path, MAX_BYTES, folder)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.tokenizer: {path}: cannot be read ({error})") from None


class ChatTemplate:
    """A chat format, compiled.

    Raises:
        UserError: it is no template.
    """

    def __init__(self, chats: ChatFormat) -> None:
        self._chats = chats
        self._environment = _environment()
        self._template = self._compiled(chats.template)
        self._with_tools = self._template if chats.with_tools is None else self._compiled(chats.with_tools)

    def _compiled(self, text: str) -> jinja2.Template:
        import jinja2

        try:
            template: jinja2.Template = self._environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"data.tokenizer: its chat template, line {error.lineno}: {error.message}"
            ) from None
        return template

    def marks_generation(self, tools: Any = None) -> bool:
        """Whether it says itself which of its text is the assistant's."""
        text = self._chats.template if tools is None else self._chats.with_tools or self._chats.template
        return _GENERATION.search(text) is not None

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation.

        Raises:
            Exception: of any kind. A template is a program; `raise_exception` in it raises a TemplateError.
        """
        self._environment.turns = 0
        template = self._template if tools is None else self._with_tools
        return template.render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._chats.variables,
        )

    def generated(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> tuple[str, list[Span]]:
        """The text of a conversation, and what `{% generation %}` blocks rendered of it."""
        self._environment.marking = True
        try:
            marked = self.render(messages, tools)
        finally:
            self._environment.marking = False
        return _unmarked(marked)


def end_of_turn(chats: ChatFormat, tokens: Iterable[str]) -> str | None:
    """The one of `tokens` that ends what the assistant says; None where none does, or it cannot be told."""
    answer = "colossus-answers"
    messages = [{"role": "user", "content": "colossus-asks"}, {"role": "assistant", "content": answer}]
    try:
        text = ChatTemplate(chats).render(messages)
    except Exception:  # a template is a program, which may refuse this chat in its own way
        return None
    _, found, rest = text.rpartition(answer)
    names = sorted(
        (name for name in tokens if name.strip()), key=len, reverse=True
    )  # runs of blanks end nothing
    first = re.search("|".join(map(re.escape, names)), rest) if names and found else None
    return first[0] if first is not None else None


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

    class Bounded(ImmutableSandboxedEnvironment):
        """Counts the turns of all loops: the sandbox bounds each `range`, but not loops in loops."""

        def _parse(self, *source: Any) -> nodes.Template:
            tree = super()._parse(*source)
            for loop in tree.find_all(nodes.For):
                counted = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
                loop.iter = counted.set_environment(self)
            return tree

    class Counted:
        def __init__(self, items: Any) -> None:
            self._items = items

        def __len__(self) -> int:
            return len(self._items)

        def __iter__(self) -> Iterator[Any]:
            for item in self._items:
                environment.turns += 1
                if environment.turns > MAX_TURNS:
                    raise jinja2.TemplateError(f"its loops take more than {MAX_TURNS:,} turns for a chat")
                yield item

    @jinja2.pass_context  # so that nothing is counted when the template is compiled
    def counted(context: Any, items: Any) -> Counted:
        return Counted(items)

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
    environment: Any = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.extend(marking=False, turns=0)
    environment.filters["_counted"] = counted
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": now.strftime}
    return environment
