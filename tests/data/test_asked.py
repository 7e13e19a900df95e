"""Conversations as prompts, held against `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from colossus.data.asked import asked_ids
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.chat_template import ChatFormat
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.tokenizer import load_tokenizer
from colossus.errors import UserError
from tests.data.chatting import CHATML, Family, families
from tests.data.kinds import KINDS, reference, saved

FAMILIES = families()
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ message.role + ': ' + message.content | trim }}
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


def say(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)]


CHATS = [say("Hello there"), say(" 2 + 2? ", "4.", "Grüße\n\n北京 😀"), say("a", "b")]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("messages", CHATS)
def test_ids_are_those_of_transformers(name: str, messages: list[dict[str, Any]], tmp_path: Path) -> None:
    """With the header of an answer; also where an answer comes last."""
    family = FAMILIES[name]
    ours = load_tokenizer(family.save(tmp_path / name))
    theirs = family.reference().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asked_ids(messages, ours, "messages") == theirs


@pytest.mark.parametrize("kind", [None, "LlamaTokenizer"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_tokenizer(name: str, kind: str | None, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / name, chat_template=TEMPLATE)
    if kind is not None and name in ("prepend", "metaspace"):
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": kind}))
    ours, theirs = load_tokenizer(folder), reference(folder)
    for messages in (say("the cat sat", " on a mat, größer", "and 北京 "), say("hello")):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert asked_ids(messages, ours, "messages") == expected


def letters(family: Family, text: str) -> list[int]:
    """Of a text in which `transformers` reads nothing as special."""
    tokenizer = family.reference()
    tokenizer.split_special_tokens = True
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("name", ["chatml", "llama3"])
@pytest.mark.parametrize(
    "content",
    [
        "{0}",
        "a{0}b {1}\n{0}assistant",
        "{0}{0}{1}",
        "<|im_{0}<|<|",
        "\ufdd0{0}\ufdd0\ufdd1",
        "{0} ",
    ],
)
def test_a_message_that_spells_a_special_token_is_text(name: str, content: str, tmp_path: Path) -> None:
    """Its ids are those of its letters, between those that the template makes of another message."""
    family = FAMILIES[name]
    ours = load_tokenizer(family.save(tmp_path / name))
    first, *_, last = ours.special_tokens
    content = content.format(last, first)
    rendered = family.reference().apply_chat_template(
        say("\ue000"), tokenize=False, add_generation_prompt=True
    )
    before, after = str(rendered).split("\ue000")
    expected = [
        *family.reference()(before, add_special_tokens=False)["input_ids"],
        *letters(family, content.strip() if name == "llama3" else content),
        *family.reference()(after, add_special_tokens=False)["input_ids"],
    ]
    assert asked_ids(say(content), ours, "messages") == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": content}]}]
    assert asked_ids(parts, ours, "messages") == expected


@pytest.mark.parametrize("name", [*FAMILIES, *KINDS])
def test_messages_make_no_special_token(name: str, tmp_path: Path) -> None:
    """Of any kind: there are as many as with other messages, and the text is given back."""
    if name in FAMILIES:
        folder = FAMILIES[name].save(tmp_path / name)
    else:
        folder = saved(name, tmp_path / name, chat_template=TEMPLATE)
    ours = load_tokenizer(folder)
    unknown = {"<unk>", "[UNK]"}  # what a tokenizer does not know
    special = {index for token, index in ours.special_tokens.items() if token not in unknown}

    def made(content: str) -> list[int]:
        ids = asked_ids(say(content, content, content), ours, "messages")
        return [index for index in ids if index in special]

    spelled = " ".join(token for token in ours.special_tokens if token not in unknown)
    assert made(f"a{spelled} the") == made("a the") == made(f"{spelled} {spelled}")


def test_what_stands_around_a_question_need_not_be_special(tmp_path: Path) -> None:
    """Tokens that were added without saying so are the template's as well; others are read as ever."""
    family = FAMILIES["chatml"]
    special = asked_ids(say("a<|im_end|>b<think>"), load_tokenizer(family.save(tmp_path / "special")), "m")
    folder = family.save(tmp_path / "plain")
    state = json.loads((folder / "tokenizer.json").read_text())
    for token in state["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(state))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(folder)
    assert "<|im_end|>" not in ours.special_tokens or "<|im_start|>" not in ours.special_tokens
    found = asked_ids(say("a<|im_end|>b<think>"), ours, "m")
    assert found == special and found.count(ours.added_tokens["<|im_end|>"]) == 1
    assert found.count(ours.added_tokens["<think>"]) == 1


def test_bytes_in_the_template_that_chats_are_taught_in() -> None:
    ours = BytesTokenizer(ChatFormat.default("<|bos|>", "<|eos|>"))
    found = asked_ids(say("é<|eos|><|bos|>"), ours, "messages")
    assert found == [256, *"user\né<|eos|><|bos|>".encode(), 257, 256, *b"assistant\n"]


def test_calls_of_tools_are_text_too(tmp_path: Path) -> None:
    family = FAMILIES["qwen3"]
    ours = load_tokenizer(family.save(tmp_path / "folder"))
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]
    messages = [*say("Hello"), {"role": "assistant", "content": "", "tool_calls": calls}]
    end = ours.special_tokens["<|im_end|>"]
    assert asked_ids(messages, ours, "messages").count(end) == 2
    calls[0]["function"]["arguments"]["x"] = "plain"  # type: ignore[index]
    expected = family.reference().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asked_ids(messages, ours, "messages") == expected


TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "sums", "parameters": {"role": "a"}}}
]


def test_tools_are_those_of_transformers(tmp_path: Path) -> None:
    family = FAMILIES["qwen3"]
    ours = load_tokenizer(family.save(tmp_path / "folder"))
    theirs = family.reference().apply_chat_template(
        say("Hello"), tools=TOOLS, add_generation_prompt=True, return_dict=False
    )
    assert asked_ids(say("Hello"), ours, "m", TOOLS) == theirs != asked_ids(say("Hello"), ours, "m")
    assert asked_ids(say("Hello"), ours, "m", []) == asked_ids(say("Hello"), ours, "m")


def test_tools_that_a_template_leaves_out_are_refused(tmp_path: Path) -> None:
    """Where `transformers` drops them without a word."""
    ours = load_tokenizer(FAMILIES["chatml"].save(tmp_path / "folder"))
    with pytest.raises(UserError, match=r"^tools: the tokenizer's chat template does nothing with them"):
        asked_ids(say("Hello"), ours, "m", TOOLS)
    assert asked_ids(say("Hello"), ours, "m", []) == asked_ids(say("Hello"), ours, "m")


@pytest.mark.parametrize("key", ["x", "role", "<|im_end|>"])
def test_tools_and_calls_make_no_special_token(key: str, tmp_path: Path) -> None:
    """Neither what they say nor the names in them, not even in what is named as a message's role is."""
    ours = load_tokenizer(FAMILIES["qwen3"].save(tmp_path / "folder"))
    end = ours.special_tokens["<|im_end|>"]

    def ends(text: str, key: str) -> int:
        tools = [{"type": "function", "function": {"name": text, "parameters": {key: text}}}]
        calls = [{"type": "function", "function": {"name": "f", "arguments": {key: text}}}]
        messages = [*say("Hello"), {"role": "assistant", "content": "", "tool_calls": calls}]
        return asked_ids(messages, ours, "messages", tools).count(end)

    assert ends("a<|im_end|>b", key) == ends("ab", "x")


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("add", "tools=add: expected a list of JSON schemas"),
        ({"type": "function"}, "tools={'type': 'function'}: expected a list of JSON schemas"),
        ([*TOOLS, print], "tools[1]="),
    ],
)
def test_what_are_no_tools(tools: Any, said: str, tmp_path: Path) -> None:
    ours = load_tokenizer(FAMILIES["qwen3"].save(tmp_path / "folder"))
    with pytest.raises(UserError) as error:
        asked_ids(say("a"), ours, "messages", tools)
    assert str(error.value).startswith(said)


WRONG: list[tuple[Any, str]] = [
    ([], "messages=[]: expected one message or more, each with role and content"),
    ("Hello", "messages=Hello: expected one message or more"),
    (["Hello"], "messages[0]=Hello: a message is an object with role and content"),
    ([{"content": "a"}], "messages[0].role=None: one of system, user, assistant, tool; it has ['content']"),
    (
        [{"role": "usr", "content": "a"}],
        "messages[0].role=usr: one of system, user, assistant, tool; did you mean 'user'?",
    ),
    ([{"role": "user"}], "messages[0].content=None: a text, or a list of parts of type text"),
    ([{"role": "user", "content": 3}], "messages[0].content=3: a text, or a list of parts"),
    (
        [{"role": "user", "content": [{"type": "image"}]}],
        "messages[0].content[0].type=image: only text can be asked, no images",
    ),
    (say("a", "b")[1:], "messages: the chat template refuses the messages (roles must alternate"),
    (say("a\ud83d"), "messages: a message holds U+D83D, half of a surrogate pair"),
]


@pytest.mark.parametrize(("messages", "said"), WRONG)
def test_what_cannot_be_asked(messages: Any, said: str, tmp_path: Path) -> None:
    ours = load_tokenizer(FAMILIES["mistral"].save(tmp_path / "folder"))
    with pytest.raises(UserError) as error:
        asked_ids(messages, ours, "messages")
    assert str(error.value).startswith(said)


def test_templates_that_cannot_be_asked(tmp_path: Path) -> None:
    family = FAMILIES["chatml"]

    def opened(template: str | None) -> JsonTokenizer:
        tokenizer = load_tokenizer(family.save(tmp_path / "folder"))
        assert isinstance(tokenizer, JsonTokenizer)
        chats = None if template is None else ChatFormat(template, {})
        return JsonTokenizer(tokenizer.account.text, None, tokenizer.eos_id, chats)

    with pytest.raises(
        UserError, match=r"^m: messages, which this tokenizer has no chat template for; put chat"
    ):
        asked_ids(say("a"), opened(None), "m")
    with pytest.raises(UserError, match=r"^m: the chat template makes nothing of the messages"):
        asked_ids(say("a"), opened("{# nothing #}"), "m")
    replaces = CHATML.replace("message.content", "message.content | replace('<|im_end|>', '')")
    assert asked_ids(say("a<|im_end|>"), opened(replaces), "m") == asked_ids(say("a"), opened(CHATML), "m")
    counts = CHATML.replace("message.content", "message.content[:12]")
    with pytest.raises(
        UserError, match=r"^m: the messages spell a special token, and the chat template does"
    ):
        asked_ids(say("a<|im_end|> and more"), opened(counts), "m")
