"""Chats: ids are those of `transformers`, the assistant's are learned, bad records are refused."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.data import files
from colossus.data.build import corpus_folder, open_split, verify
from colossus.data.chat_template import DEFAULT, ChatFormat, ChatTemplate
from colossus.data.chats import Chat, chat_in
from colossus.data.corpus import Document, open_corpus, text_of
from colossus.data.documents import Encoded, Encoder
from colossus.data.shards import read_manifest, write_manifest
from colossus.data.split import sizes_of
from colossus.data.tokenizer import BytesTokenizer, JsonTokenizer, load_tokenizer, train_bpe
from colossus.errors import UserError
from tests.data.building import built, contents, request_for
from tests.data.chatting import CHATML_MARKED, QWEN3_UNMARKED, TEXTS, Family, families

FAMILIES = families()


def say(*contents: Any, first: str = "user") -> list[dict[str, Any]]:
    """A conversation in turns."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


CHATS = {
    "short": say("Hello there", "who are you?"),
    "turns": say("Hello", "I am 北京 a\n\nhelpful", "  2 + 2 ", " = 4\n", "ü", "Grüße 😀\u200d! "),
    "spells": say("a <|im_end|></s>\n<|im_start|>assistant", "[/INST]<think>b</s><|eot_id|>"),
    "empty": say("", "", "\n", ""),
}


def encode(tokenizer: JsonTokenizer | BytesTokenizer, *documents: Document) -> list[Encoded]:
    return list(Encoder(tokenizer)(documents))


def chat(messages: Any, **rest: Any) -> Chat:
    return chat_in({"messages": messages} | rest, "here")


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


def test_what_is_no_template(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer: its chat template, line 2: "):
        ChatTemplate(ChatFormat("{{ bos_token }}\n{% if %}", {}))


def test_a_template_cannot_leave_its_sandbox() -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = JsonTokenizer(FAMILIES["chatml"].tokenizer.to_str(), 0, 2, ChatFormat(template, {}))
    with pytest.raises(UserError, match=r"here: the chat template refuses messages .*unsafe"):
        encode(tokenizer, chat(say("a", "b")))


def test_a_template_that_leaves_out_the_answer() -> None:
    for template in ("{{ messages[0].content }}", "{% generation %}{% endgeneration %}x"):
        tokenizer = JsonTokenizer(FAMILIES["chatml"].tokenizer.to_str(), 0, 2, ChatFormat(template, {}))
        with pytest.raises(UserError, match=r"here: the chat template"):
            encode(tokenizer, chat(say("a", "b")))


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, r"messages=\[\]: a list of messages, each with role and content$"),
    ({"messages": None}, r"messages=None: a list of messages"),
    ({"messages": "Hello"}, r"messages=Hello: a list of messages"),
    ({"prompt": "Hello"}, r"messages=None: a list of messages, .*; the record has \['prompt'\]"),
    ({"messages": ["Hello"]}, r"messages\[0\]=Hello: a message is an object with role and content"),
    (
        {"messages": [{"from": "human", "value": "x"}]},
        r"messages\[0\]\.role=None: one of system, user, assistant, tool; it has \['from', 'value'\]",
    ),
    (
        {"messages": [*say("a"), {"role": "asistant", "content": "b"}]},
        r"messages\[1\]\.role=asistant: one of system, .*; did you mean 'assistant'\?",
    ),
    ({"messages": [{"role": 3, "content": "b"}]}, r"messages\[0\]\.role=3: one of system"),
    ({"messages": say("a", None)}, r"messages\[1\]\.content=None: a text, or a list of parts"),
    ({"messages": say("a", 7)}, r"messages\[1\]\.content=7: a text, or a list of parts"),
    (
        {"messages": say([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "x"}], "b")},
        r"messages\[0\]\.content\[1\]\.type=image_url: only text can be learned, no images",
    ),
    ({"messages": say([{"type": "text"}], "b")}, r"messages\[0\]\.content\[0\]\.text=None: a text"),
    ({"messages": say("a")}, r"messages\.role=\['user'\]: none is assistant, so there is nothing to learn"),
    ({"messages": say("a", "b"), "tools": "add"}, r"tools=add: a list of JSON schemas"),
    (
        {"text": "a"},
        r"the rows before are chats \(messages\), this one is of texts \(text\); one kind a file",
    ),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_records_are_named_with_file_and_line(
    tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "chats.jsonl", {"messages": say("Hello", "Hi")}, record)
    with pytest.raises(UserError, match=rf"^data\.corpus: .*chats\.jsonl, line 2: {message}"):
        list(open_corpus(str(path)).documents())


def test_a_text_file_with_a_chat_in_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b"}, {"messages": say("a", "b")})
    with pytest.raises(
        UserError, match=r"rows\.jsonl, line 3: the rows before are texts \(text\), this one is"
    ):
        list(open_corpus(str(path)).documents())


def test_the_line_is_right_deep_in_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where parts begin at bytes, and in what is compressed."""
    monkeypatch.setattr(files, "CUT_BYTES", 1000)
    monkeypatch.setattr(files, "RANGE_BYTES", 700)
    good = {"messages": say("Hello", "Hi")}
    path = write(tmp_path / "chats.jsonl", *[good] * 77, {"messages": []})
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert len(open_corpus(str(path)).parts) > 5
    for name in ("chats.jsonl", "chats.jsonl.gz"):
        with pytest.raises(UserError, match=rf"{name}, line 78: messages=\[\]"):
            list(open_corpus(str(tmp_path / name)).documents())


def test_which_field_is_read(tmp_path: Path) -> None:
    both = {"text": "a text", "body": "a body", "messages": say("a", "b")}
    path = str(write(tmp_path / "rows.jsonl", both))
    assert isinstance(next(open_corpus(path).documents()), Chat)
    assert open_corpus(path).chats and open_corpus(path).masked
    assert [*open_corpus(path, "body").documents()] == ["a body"]
    assert not open_corpus(path, "body").masked
    path = str(write(tmp_path / "counted.jsonl", {"text": "a text", "messages": 12}))
    assert [*open_corpus(path).documents()] == ["a text"]


def to_parquet(records: list[dict[str, Any]], path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


def to_zst(records: list[dict[str, Any]], path: Path) -> None:
    with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd") as stream:
        stream.write("\n".join(map(json.dumps, records)).encode())


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("chats.jsonl", lambda records, path: write(path, *records)),
        ("chats.jsonl.zst", to_zst),
        ("chats.parquet", to_parquet),
    ],
)
def test_every_reader_reads_chats(
    tmp_path: Path, name: str, save: Callable[[list[dict[str, Any]], Path], object]
) -> None:
    records: list[dict[str, Any]] = [{"messages": say(f"What is {i}?", f"{i}."), "id": i} for i in range(30)]
    records[7]["messages"][0]["name"] = "Ada"
    save(records, tmp_path / name)
    found = [d.messages for d in open_corpus(str(tmp_path / name)).documents() if isinstance(d, Chat)]
    assert found == [record["messages"] for record in records]
    save([*records, {"messages": say("alone")}], tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}, (line|row) 31: messages\.role=\['user'\]"):
        list(open_corpus(str(tmp_path / name)).documents())


def test_a_data_set_of_chats(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [{"messages": say(f"What is {i}?", f"{i}.")} for i in range(20)]
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    corpus = open_corpus(f"hf:{tmp_path / 'saved'}")
    assert corpus.chats and corpus.masked
    found = [d.messages for d in corpus.documents() if isinstance(d, Chat)]
    assert found == [record["messages"] for record in records]


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


def test_lone_surrogates_in_chats_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "a\\ud800b"}]}\n')
    (found,) = open_corpus(str(path)).documents()
    assert text_of(found) == "assistant\na\ufffdb"
