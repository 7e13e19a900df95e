"""Records that are chats: read from every kind of file, refused with their line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from colossus.data import files
from colossus.data.chats import Chat
from colossus.data.corpus import text_of
from colossus.data.open import open_corpus
from colossus.errors import UserError
from tests.data.chatting import say, write

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
    ({"messages": json.dumps("Hello")}, r"messages=\"Hello\": a list of messages"),
    ({"messages": json.dumps(say("a", 7))}, r"messages\[1\]\.content=7: a text, or a list of parts"),
    ({"messages": [json.dumps(say("a", "b"))]}, r"messages\[0\]=\[.*: a message is an object"),
    (
        {"messages": [*say("a"), {"role": "assistant", "content": "b", "weight": 0.5}]},
        r"messages\[1\]\.weight=0\.5: 0 \(read, and not learned\) or 1",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "weight": "0"}, *say("a", "b")]},
        r"messages\[0\]\.weight=0: 0 \(read, and not learned\) or 1",
    ),
    (
        {"messages": [*say("a"), {"role": "assistant", "content": "b", "weight": 0}]},
        r"messages\.weight=\[0\]: all of the assistant's are 0: nothing to learn",
    ),
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


def test_messages_as_json_text_beside_a_text(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"default": None}}}]
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": None}}}]
    messages = [*say("a", "b"), {"role": "assistant", "content": "", "tool_calls": calls}]
    spelled = [*messages[:2], messages[2] | {"tool_calls": json.dumps(calls)}]
    rows: list[dict[str, Any]] = [
        {"messages": messages, "tools": tools, "text": "a text"},
        {"messages": json.dumps(messages), "tools": json.dumps(tools), "text": "a text"},
        {"messages": [*map(json.dumps, spelled)], "tools": [*map(json.dumps, tools)]},
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    found = [d for d in open_corpus(str(path)).documents() if isinstance(d, Chat)]
    assert [(c.messages, c.tools) for c in found] == [(messages, tools)] * 3
    assert [*open_corpus(str(write(path, rows[1])), "messages").documents()] == [rows[1]["messages"]]
    for none, found in (("", None), ("null", None), (None, None), ("[]", []), ([], [])):
        write(path, {"messages": say("a", "b"), "tools": none})
        assert [d.tools for d in open_corpus(str(path)).documents() if isinstance(d, Chat)] == [found]


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


def test_lone_surrogates_in_chats_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "a\\ud800b"}]}\n')
    (found,) = open_corpus(str(path)).documents()
    assert text_of(found) == "assistant\na\ufffdb"
