"""Chat templates: where they are found, and what they may do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from colossus.data.chat_template import ChatFormat, ChatTemplate
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.tokenizer import load_tokenizer
from colossus.errors import UserError
from colossus.interchange.files import files_of
from tests.data.chatting import byte_level, chat, encode, families, say

FAMILIES = families()


def config_of(folder: Path, **values: Any) -> Path:
    folder.mkdir()
    FAMILIES["chatml"].tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"} | values))
    return folder


def test_where_a_template_is_found(tmp_path: Path) -> None:
    """As `transformers` looks: a file, then the configuration; of several the default."""
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    cases: list[tuple[Any, str]] = [("plain", "plain"), (named, "d"), ({"default": "d", "rag": "r"}, "d")]
    for index, (value, expected) in enumerate(cases):
        folder = config_of(tmp_path / str(index), chat_template=value, pad_token={"content": "<|endoftext|>"})
        chats = load_tokenizer(folder).chats
        variables = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        assert chats == ChatFormat(expected, variables)
        (folder / "chat_template.jinja").write_text("file")
        assert load_tokenizer(folder / "tokenizer.json").chats == ChatFormat("file", variables)
        load_tokenizer(folder).save(tmp_path / f"kept-{index}")
        assert load_tokenizer(tmp_path / f"kept-{index}").chats == ChatFormat("file", variables)
    assert load_tokenizer(config_of(tmp_path / "none")).chats is None
    for name, value, message in (
        ("a", [{"name": "rag", "template": "r"}], r"chat_template has \['rag'\]; one of them must be named"),
        ("b", 7, r"tokenizer_config\.json: chat_template=7: a text"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer(config_of(tmp_path / name, chat_template=value))


@pytest.mark.parametrize("where", ["list", "names", "files", "file and names"])
def test_chats_with_tools_have_the_template_named_so(tmp_path: Path, where: str) -> None:
    """As in `transformers`, from what is published, what a run keeps and what is given out again; also those
    with an empty list of tools."""
    plain = "{{ 'none' if tools is none }}"
    plain += "{% for m in messages %}{{ m.role + m.content }}<|im_end|>{% endfor %}"
    texts = {
        "default": plain,
        "tool_use": "{{ tools | tojson }}<|im_start|>" + plain,
        "rag": "{{ documents }}",
    }
    in_config = [{"name": n, "template": t} for n, t in texts.items()] if where == "list" else texts
    folder = config_of(tmp_path / "it", **({} if where == "files" else {"chat_template": in_config}))
    if "file" in where:
        texts = {name: f"file{text}" for name, text in texts.items()}
        (folder / "chat_template.jinja").write_text(texts["default"])
        if where == "files":
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(texts["tool_use"])
    messages, tools = say("Hello", "who are you?"), [{"name": "add", "parameters": {}}]
    published = load_tokenizer(folder)
    assert isinstance(published, JsonTokenizer)
    kept = tmp_path / "kept"
    published.taught(texts=False, chats=published.chats).save(kept)
    out = tmp_path / "out"
    for name, data in files_of(kept, load_tokenizer(kept), {}).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    reference = AutoTokenizer.from_pretrained(folder)
    for rest in ({"tools": tools}, {"tools": []}, {}):
        expected = reference.apply_chat_template(messages, **rest)["input_ids"]
        again = AutoTokenizer.from_pretrained(out)
        assert again.apply_chat_template(messages, **rest)["input_ids"] == expected
        for place in (folder, kept, out):
            (found,) = encode(load_tokenizer(place), chat(messages, **rest))
            assert found.ids.tolist() == expected
    with_tools = None if where == "file and names" else texts["tool_use"]
    assert published.chats == ChatFormat(texts["default"], {"eos_token": "<|im_end|>"}, with_tools)


@pytest.mark.parametrize("config", [{"image_token": "you"}, {"extra_special_tokens": {"image_token": "you"}}])
def test_a_model_may_have_special_tokens_of_its_own(tmp_path: Path, config: dict[str, Any]) -> None:
    tokenizer = byte_level(["<|im_end|>"])
    tokenizer.add_tokens(["you"])
    state = json.loads(tokenizer.to_str())  # a token that only the configuration says is looked for
    state["model"]["vocab"]["you"] = state["added_tokens"].pop()["id"]
    folder = config_of(
        tmp_path / "it", chat_template="[{{ image_token }}]{{ messages[0].content }}", **config
    )
    (folder / "tokenizer.json").write_text(json.dumps(state))
    found = load_tokenizer(folder)
    assert isinstance(found, JsonTokenizer)
    for messages in (say("Hello", "a"), say("a you b", "a")):
        expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages)["input_ids"]
        assert found.encode_rendered([ChatTemplate(found.chats).render(messages)])[0][0].tolist() == expected
        assert found.special_tokens["you"] in expected
    assert json.loads(found.files()["tokenizer_config.json"]) == json.loads(
        (folder / "tokenizer_config.json").read_text()
    )


def test_what_is_no_template(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: its chat template, line 2: "):
        ChatTemplate(ChatFormat("{{ bos_token }}\n{% if %}", {}))


def test_a_template_cannot_leave_its_sandbox() -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = JsonTokenizer(FAMILIES["chatml"].tokenizer.to_str(), 0, 2, ChatFormat(template, {}))
    with pytest.raises(UserError, match=r"here: the chat template refuses messages .*unsafe"):
        encode(tokenizer, chat(say("a", "b")))


LONG = {
    "loops in a loop": "{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "a loop for each message": "{% for m in messages %}{% for b in r %}{% endfor %}{% endfor %}" * 30,
    "a loop of ranges": "{% for a in r %}{% for b in range(40) if b %}{% endfor %}{% endfor %}",
    "a macro": "{% macro f() %}{% for b in r %}.{% endfor %}{% endmacro %}"
    "{% for a in r %}{{ f() }}{% endfor %}",
}


@pytest.mark.parametrize("kind", LONG)
def test_a_template_that_computes_for_long(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colossus.data.chat_template.MAX_TURNS", 1000)
    template = ChatTemplate(ChatFormat("{% set r = range(40) %}" + LONG[kind], {}))
    with pytest.raises(jinja2.TemplateError, match="its loops take more than 1,000 turns for a chat"):
        template.render([{"role": "user", "content": "a"}])


def test_what_loops_say_of_themselves_is_right_and_each_chat_is_counted_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("colossus.data.chat_template.MAX_TURNS", 10)
    text = (
        "{% for m in messages[1:] if m.content != 'c' %}{{ loop.index }}/{{ loop.length }}{{ m.content }}"
        "{{ ',' if not loop.last }}{% endfor %}{% for a in nothing %}{% else %};{% endfor %}"
        "{% for k, v in messages[0] | items %}{{ k }}{{ loop.revindex }}{% endfor %}"
    )
    template = ChatTemplate(ChatFormat(text, {}))
    for _ in range(3):
        rendered = template.render([{"role": "user", "content": content} for content in "abcd"])
        assert rendered == "1/2b,2/2d;role2content1"


def test_a_template_that_leaves_out_the_answer() -> None:
    for template in ("{{ messages[0].content }}", "{% generation %}{% endgeneration %}x"):
        tokenizer = JsonTokenizer(FAMILIES["chatml"].tokenizer.to_str(), 0, 2, ChatFormat(template, {}))
        with pytest.raises(UserError, match=r"here: the chat template"):
            encode(tokenizer, chat(say("a", "b")))


def test_the_fingerprint_of_a_format_follows_the_template_and_every_token_that_it_may_name() -> None:
    formats = [
        ChatFormat("{{ eos_token }}", {"bos_token": "<s>", "eos_token": "</s>"}),
        ChatFormat("{{ eos_token }}", {"bos_token": "<s>", "eos_token": "<|im_end|>"}),
        ChatFormat("{{ eos_token }}", {"bos_token": "</s>", "eos_token": "<s>"}),
        ChatFormat("{{ eos_token }}", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}),
        ChatFormat("{{ eos_token }}", {}),
        ChatFormat("{{ bos_token }}", {"bos_token": "<s>", "eos_token": "</s>"}),
        ChatFormat("{{ bos_token }}", {"bos_token": "<s>", "eos_token": "</s>"}, "{{ tools }}"),
    ]
    assert len({chats.fingerprint for chats in formats}) == len(formats)
    assert ChatFormat("{{ eos_token }}", {"eos_token": "</s>", "bos_token": "<s>"}).fingerprint == (
        formats[0].fingerprint
    )
