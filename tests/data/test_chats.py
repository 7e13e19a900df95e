"""Chats: ids are those of `transformers`, and the assistant's are learned."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.data.bpe import train_bpe
from colossus.data.build import corpus_folder, open_split, verify
from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.data.chat_template import DEFAULT, ChatFormat
from colossus.data.chats import Chat
from colossus.data.documents import Encoded
from colossus.data.json_tokenizer import JsonTokenizer
from colossus.data.shards import read_manifest, write_manifest
from colossus.data.split import sizes_of
from colossus.data.tokenizer import load_tokenizer
from colossus.errors import UserError
from tests.data.building import built, contents, request_for
from tests.data.chatting import (
    CHATML_MARKED,
    QWEN3_UNMARKED,
    TEXTS,
    Family,
    chat,
    encode,
    families,
    say,
    write,
)

FAMILIES = families()


CHATS = {
    "short": say("Hello there", "who are you?"),
    "turns": say("Hello", "I am 北京 a\n\nhelpful", "  2 + 2 ", " = 4\n", "ü", "Grüße 😀\u200d! "),
    "spells": say("a <|im_end|></s>\n<|im_start|>assistant", "[/INST]<think>b</s><|eot_id|>"),
    "empty": say("", "", "\n", ""),
}


def learned_text(tokenizer: JsonTokenizer | BytesTokenizer, encoded: Encoded) -> list[str]:
    """Each stretch of learned tokens, spelled."""
    names = {index: name for name, index in tokenizer.special_tokens.items()}
    cuts = np.flatnonzero(np.diff(encoded.mask)) + 1
    stretches = zip(np.split(encoded.ids, cuts), np.split(encoded.mask, cuts), strict=True)
    found = []
    for ids, mask in stretches:
        if mask[0]:
            runs = itertools.groupby(ids.tolist(), key=names.get)
            found.append("".join(name or tokenizer.decode([*run]) for name, run in runs))
    return found


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def tokenizer(family: Family, tmp_path: Path) -> JsonTokenizer:
    folder = family.save(tmp_path / "tokenizer")
    family.tokenizer.save(str(folder / "tokenizer.json"))  # with all that the library's would leave out
    found = load_tokenizer(folder)
    assert isinstance(found, JsonTokenizer)
    return found


@pytest.mark.parametrize("name", CHATS)
def test_ids_are_those_of_transformers(family: Family, tokenizer: JsonTokenizer, name: str) -> None:
    messages = CHATS[name]
    expected = family.reference().apply_chat_template(messages, tokenize=True)["input_ids"]
    (found,) = encode(tokenizer, chat(messages))
    assert found.ids.tolist() == expected
    text = family.reference().apply_chat_template(messages, tokenize=False)
    for special in tokenizer.special_tokens:
        text = text.replace(special, "")
    assert found.text == text


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("family", ["chatml-marked", "qwen3"], indirect=True)
def test_generation_blocks_mark_what_they_mark_for_transformers(
    family: Family, tokenizer: JsonTokenizer, name: str
) -> None:
    expected = family.reference().apply_chat_template(
        CHATS[name], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (found,) = encode(tokenizer, chat(CHATS[name]))
    assert found.mask.tolist() == expected["assistant_masks"]
    assert found.mask.any()


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("chatml", ["Hi you<|im_end|>\n", "3<|im_end|>\n"]),
        ("chatml-marked", ["Hi you<|im_end|>\n", "3<|im_end|>\n"]),
        ("llama3", ["Hi you<|eot_id|>", "3<|eot_id|>"]),
        ("mistral", ["Hi you</s>", "3</s>"]),
        ("qwen3", ["Hi you<|im_end|>", "<think>\n\n</think>\n\n3<|im_end|>"]),
    ],
    indirect=["family"],
)
def test_what_is_learned_is_what_the_assistant_says(tokenizer: JsonTokenizer, expected: list[str]) -> None:
    """With the end of its turn, without its header. The text that counts is without special tokens."""
    (found,) = encode(tokenizer, chat(say("Hello", "Hi you", "1 + 2", "3")))
    assert [text.removeprefix(" ") for text in learned_text(tokenizer, found)] == expected
    plain = "".join(expected)
    for name in tokenizer.special_tokens:
        plain = plain.replace(name, "")
    assert found.learned.replace(" ", "") == plain.replace(" ", "")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=6), st.booleans())
def test_blocks_and_prefixes_say_the_same(texts: list[str], begins: bool) -> None:
    """The two ways to know what the assistant says, on one template written in both."""
    messages = say(*texts, first="assistant" if begins or len(texts) < 2 else "user")
    messages = [{**m, "content": text_of_json(m["content"])} for m in messages]
    unmarked = FAMILIES["chatml"]
    found = []
    for template in (unmarked.template, CHATML_MARKED):
        text = unmarked.tokenizer.to_str()
        tokenizer = JsonTokenizer(text, 0, 2, ChatFormat(template, {}))
        found += encode(tokenizer, chat(messages))
    assert found[0].ids.tolist() == found[1].ids.tolist()
    assert found[0].mask.tolist() == found[1].mask.tolist()
    assert found[0].learned == found[1].learned


def weighed(*weights: Any) -> Chat:
    """A question and an answer for each weight; None: the answer says nothing of it."""
    messages = say(*(text for i in range(len(weights)) for text in (f"question {i}", f"answer {i}")))
    for message, weight in zip(messages[1::2], weights, strict=True):
        message |= {} if weight is None else {"weight": weight}
    return chat(messages)


@pytest.mark.parametrize("weights", [(0, 1), (None, 0), (0, None, 0.0, 1), (1, 1)])
def test_what_has_no_weight_is_read_and_not_learned(
    tokenizer: JsonTokenizer, weights: tuple[Any, ...]
) -> None:
    """As OpenAI's format of fine-tuning has it, by blocks of generation and without."""
    (found,) = encode(tokenizer, weighed(*weights))
    (plain,) = encode(tokenizer, weighed(*[None] * len(weights)))
    assert found.ids.tolist() == plain.ids.tolist()
    answers = learned_text(tokenizer, plain)
    assert len(answers) == len(weights)
    kept = [text for text, weight in zip(answers, weights, strict=True) if weight != 0]
    assert learned_text(tokenizer, found) == kept
    assert [f"answer {i}" in found.learned for i in range(len(weights))] == [w != 0 for w in weights]


def test_weights_where_blocks_are_not_answers() -> None:
    """A template that marks an answer in two blocks does not say whose a block is."""
    template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}"
        "{{ message.content }}{% endgeneration %}.{% generation %}!{% endgeneration %}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
    )
    tokenizer = BytesTokenizer(ChatFormat(template, {}))
    assert "".join(learned_text(tokenizer, encode(tokenizer, weighed(1, 1))[0])) == "answer 0!answer 1!"
    with pytest.raises(UserError, match="2 messages of the assistant, one of weight 0, are 4 generation blo"):
        encode(tokenizer, weighed(0, 1))


def text_of_json(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_a_template_that_changes_what_it_said_before(tmp_path: Path) -> None:
    """Thoughts of earlier answers are dropped: said, with the cure; no trouble where there is one answer."""
    tokenizer = load_tokenizer(FAMILIES["qwen3"].save(tmp_path / "tokenizer", QWEN3_UNMARKED))
    (found,) = encode(tokenizer, chat(say("Hello", "Hi")))
    assert learned_text(tokenizer, found) == ["<think>\n\n</think>\n\nHi<|im_end|>\n"]
    with pytest.raises(
        UserError, match=r"data\.corpus: here: .*\[:2\] is not how .*\{% generation %\}.*, or split"
    ):
        encode(tokenizer, chat(say("Hello", "Hi", "And", "so")))


def test_a_header_that_is_not_that_of_the_answer(tmp_path: Path) -> None:
    """As of models that are made to begin with a thought."""
    family = FAMILIES["chatml"]
    template = family.template.replace("assistant\\n", "assistant\\n<think>")
    tokenizer = load_tokenizer(family.save(tmp_path / "tokenizer", template))
    assert encode(tokenizer, chat(say("Hello", "<think></think>Hi")))[0].learned == "</think>Hi\n"
    with pytest.raises(UserError, match=r"to ask for messages\[1\] is not how that .* in the template$"):
        encode(tokenizer, chat(say("Hello", "Hi")))


def test_a_first_token_is_never_learned(tmp_path: Path) -> None:
    """Nothing of its document precedes it: it would be a target of the document before."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = load_tokenizer(FAMILIES["chatml"].save(tmp_path / "tokenizer", template))
    (found,) = encode(tokenizer, chat([{"role": "assistant", "content": "Hi you"}]))
    assert found.mask.tolist() == [0] + [1] * (len(found.ids) - 1) and len(found.ids) > 1


def test_tools_and_thoughts_reach_the_template(tmp_path: Path) -> None:
    family = FAMILIES["qwen3"]
    tokenizer = load_tokenizer(family.save(tmp_path / "tokenizer"))
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "ü": "<b>"}}}
    messages = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "I add"},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "3"}]},
    ]
    as_text = [*messages[:3], {"role": "assistant", "content": "It is 3"}]
    as_text[1] = {k: v for k, v in messages[1].items() if k != "content"} | {"content": ""}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    (found,) = encode(tokenizer, chat([*messages[:1], as_text[1], *messages[2:]], tools=tools))
    expected = family.reference().apply_chat_template(as_text, tools=tools, tokenize=True, return_dict=True)
    assert found.ids.tolist() == expected["input_ids"]
    assert "I add" in found.learned and "It is 3" in found.learned and '"ü": "<b>"' in found.learned
    assert chat(messages).messages[1] == {
        "role": "assistant",
        "tool_calls": [call],
        "thinking": "I add",
        "reasoning_content": "I add",
    }


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_default_template(kind: str, tmp_path: Path) -> None:
    """Each message between the two tokens that every tokenizer has; other tools read it too."""
    tokenizer = BytesTokenizer() if kind == "bytes" else train_bpe(TEXTS, 300)
    messages = [{"role": "system", "content": "Be kind"}, *say("Grüße 😀", "Hi <b>")]
    (found,) = encode(tokenizer, chat(messages))
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    bodies = [tokenizer.encode(f"{m['role']}\n{m['content']}") for m in messages]
    assert found.ids.tolist() == [i for body in bodies for i in [*bos, *body, *eos]]
    assert learned_text(tokenizer, found) == ["Hi <b><|eos|>"]
    assert found.learned == "Hi <b>"
    tokenizer.chats = ChatFormat.default("<|bos|>", "<|eos|>")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.chats == tokenizer.chats and again.chats.is_default
    assert encode(again, chat(messages))[0].ids.tolist() == found.ids.tolist()
    if kind == "bpe":
        from transformers import PreTrainedTokenizerFast

        other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert other.apply_chat_template(messages, tokenize=True)["input_ids"] == found.ids.tolist()


def test_the_default_template_knows_no_tools() -> None:
    with pytest.raises(UserError, match=r"here: the chat template refuses messages.*knows no tools"):
        encode(BytesTokenizer(), chat(say("a", "b"), tools=[{"type": "function"}]))


@given(st.text(max_size=30))
def test_bytes_with_special_tokens(text: str) -> None:
    tokenizer = BytesTokenizer()
    spelled = f"<|bos|>{text}<|eos|>{text}"
    ((ids, offsets),) = tokenizer.encode_rendered([spelled])
    names = {256: "<|bos|>", 257: "<|eos|>"}
    whole = b"".join(names[i].encode() if i in names else bytes([i]) for i in ids.tolist())
    assert whole.decode() == spelled
    for index, (begin, end) in zip(ids.tolist(), offsets.tolist(), strict=True):
        piece = spelled[begin:end]
        assert piece == names[index] if index in names else index in piece.encode() and len(piece) == 1


@pytest.mark.usefixtures("small_shards")
def test_shards_of_chats(tmp_path: Path) -> None:
    """In parallel as in series; a chat is a document of its ids, its mask beside it; sizes are of answers."""
    folder = FAMILIES["chatml"].save(tmp_path / "tokenizer")
    records = [{"messages": say(f"What is {i} times {i}?" * 9, f"{i * i}!")} for i in range(200)]
    path = write(tmp_path / "chats.jsonl", *records)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(path.read_bytes())
    write(tmp_path / "texts" / "b.jsonl", *[{"text": f"{i} is a text. " * 20} for i in range(200)])
    for name in ("chats.jsonl", "texts"):
        for workers in (1, 2):
            built(tmp_path / f"{name}{workers}", tmp_path / name, workers=workers, tokenizer=str(folder))
        assert contents(tmp_path / f"{name}1") == contents(tmp_path / f"{name}2")
    tokenizer = load_tokenizer(folder)
    expected = {}
    for record, encoded in zip(records, encode(tokenizer, *(chat(**r) for r in records)), strict=True):
        expected[tuple(encoded.ids.tolist())] = (encoded, record["messages"][1]["content"] + "\n")
    out = tmp_path / "chats.jsonl1"
    for side in ("train", "validation"):
        source = open_split(out, 0, side)
        starts = [*source.document_starts(0, source.num_tokens).tolist(), source.num_tokens]
        for start, stop in itertools.pairwise(starts):
            encoded, _ = expected[tuple(source.tokens(start, stop).tolist())]
            assert source.mask(start, stop).tolist() == encoded.mask.tolist()
    validation, train = open_split(out, 0, "validation"), open_split(out, 0, "train")
    assert train.num_documents + validation.num_documents == len(records)
    masks = [int(source.mask(0, source.num_tokens).sum()) for source in (train, validation)]
    assert [train.num_learned, validation.num_learned] == masks
    ends = dict(itertools.pairwise(starts))
    for row in validation.documents().tolist():
        _, answer = expected[tuple(validation.tokens(row[0], ends[row[0]]).tolist())]
        assert list(row[1:]) == sizes_of(answer.encode())
    assert np.array_equal(validation.scored(0, 50), validation.mask(0, 50))
    mixed = open_split(tmp_path / "texts1", 0, "train")
    assert train.num_tokens < mixed.num_tokens and mixed.num_learned > mixed.num_tokens / 2
    _forget_what_sizes_are_of(out)
    assert open_split(out, 0, "validation").scored(0, 50) is None


def _forget_what_sizes_are_of(folder: Path) -> None:
    """As shards of earlier were written."""
    manifest = read_manifest(corpus_folder(folder, 0))
    del manifest["documents"]["of"]
    write_manifest(corpus_folder(folder, 0), manifest)


def test_the_template_is_kept_and_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", *[{"messages": say(f"q{i}", f"a{i}")} for i in range(40)])
    train, _ = built(tmp_path / "bytes", path)
    assert load_tokenizer(tmp_path / "bytes" / "tokenizer").chats == ChatFormat.default("<|bos|>", "<|eos|>")
    assert len([n for n in train.manifest["corpus"]["notes"] if "no chat template" in n]) == 1
    keys = set()
    for name in ("chatml", "qwen3"):
        folder = FAMILIES[name].save(tmp_path / name)
        request = request_for(path, tokenizer=str(folder))
        keys.add(request.key)
        train, _ = built(tmp_path / f"out-{name}", path, tokenizer=str(folder))
        assert train.manifest["corpus"]["notes"] == []
    assert len(keys) == 2
    assert verify(tmp_path / "out-qwen3", 1) > 0
    (tmp_path / "out-qwen3" / "tokenizer" / "chat_template.jinja").write_text(DEFAULT)
    with pytest.raises(UserError, match="tokenizer: changed since the shards were built"):
        verify(tmp_path / "out-qwen3", 1)


def test_a_template_that_refuses_a_chat_is_said_by_a_worker(tmp_path: Path) -> None:
    folder = FAMILIES["mistral"].save(tmp_path / "tokenizer")
    chats = [{"messages": say("a", f"b{i}")} for i in range(20)]
    path = write(tmp_path / "chats.jsonl", *chats, {"messages": say("a", "b", first="assistant")})
    with pytest.raises(UserError, match=r"chats\.jsonl, line 21: the chat template refuses .*must alternate"):
        built(tmp_path / "out", path, tokenizer=str(folder))
