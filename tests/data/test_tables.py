"""Rows of Arrow tables are the records that were stored, whatever the columns are stored as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from colossus.data.chats import Chat
from colossus.data.open import open_corpus
from colossus.data.tables import rows_of
from colossus.errors import UserError


def turns(**arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def tool(**properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": "look", "parameters": parameters}}


# No two calls, and no two tools, have the same fields: a table fills up each with nulls of the others'.
RECORDS = [
    {
        "messages": turns(city="Bonn", days=3),
        "tools": [tool(city={"type": "string", "enum": ["Bonn", None]})],
    },
    {"messages": turns(deep={"a": [1, None], "b": {"c": "x"}}), "tools": None},
    {"messages": turns(deep={"b": {"d": 2.5}}), "tools": [tool(days={"type": "integer"}), tool()]},
    {"messages": turns(), "tools": [tool(city={"description": "where"}, deep={"type": "object"})]},
]


def chats_of(name: object) -> list[tuple[Any, Any]]:
    chats = [d for d in open_corpus(str(name)).documents() if isinstance(d, Chat)]
    return [(chat.messages, chat.tools) for chat in chats]


TOOL = tool(days={"type": "integer"})
EXPECTED = [(record["messages"], record["tools"]) for record in RECORDS]


def save(path: Path, records: Any, **columns: Any) -> Path:
    table = pyarrow.Table.from_pylist(records) if records else pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path)
    return path


def test_nulls_that_only_fill_a_table_reach_no_tool_and_no_argument(tmp_path: Path) -> None:
    path = save(tmp_path / "chats.parquet", RECORDS)
    assert "city" in json.dumps(pyarrow.parquet.read_table(path).to_pylist()[1])  # the table has them
    assert chats_of(path) == EXPECTED


@pytest.mark.parametrize("extra", [False, True], ids=["records", "json"])
def test_what_datasets_writes_is_what_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: bool
) -> None:
    """With one message of another form it stores each as JSON text."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = json.loads(json.dumps(RECORDS))
    if extra:
        records[2]["messages"][0]["name"] = "Ada"
    (tmp_path / "rows").mkdir()
    lines = tmp_path / "rows" / "chats.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    read = datasets.load_dataset("json", data_files=str(lines), split="train")
    read.to_parquet(str(tmp_path / "chats.parquet"))
    read.save_to_disk(str(tmp_path / "saved"))
    if extra:
        assert isinstance(
            pyarrow.parquet.read_table(tmp_path / "chats.parquet").to_pylist()[0]["messages"][0], str
        )
    expected = [(record["messages"], record["tools"]) for record in records]
    for name in (lines, f"hf:{tmp_path / 'rows'}", tmp_path / "chats.parquet", tmp_path / "saved"):
        assert chats_of(name) == expected, name


def test_nulls_of_json_text_stay(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Json"):
        pytest.skip("this datasets has no JSON text")
    messages = turns(given=None)
    features = datasets.Features({"messages": datasets.Json(), "tools": datasets.List(datasets.Json())})
    rows = {"messages": [messages], "tools": [[tool(city={"default": None})]]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(str(tmp_path / "chats.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    for name in ("chats.parquet", "saved"):
        assert chats_of(tmp_path / name) == [(messages, rows["tools"][0])]


@pytest.mark.parametrize("each", [False, True])
def test_messages_and_tools_that_are_json_text(tmp_path: Path, each: bool) -> None:
    """In a plain column of texts, or of lists of texts, as many data sets of tools have them."""

    def spelled(value: Any) -> Any:
        if each:
            return None if value is None else [json.dumps(item) for item in value]
        return json.dumps(value)

    columns = {name: [spelled(record[name]) for record in RECORDS] for name in ("messages", "tools")}
    path = save(tmp_path / "chats.parquet", None, **columns)
    assert chats_of(path) == EXPECTED
    # Also where there are texts: a column of messages is seen only by what it holds.
    path = save(tmp_path / "both.parquet", None, **columns, text=["a", "b", "c", "d"])
    assert chats_of(path) == EXPECTED


def test_a_column_of_messages_that_are_none(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.parquet", None, messages=["12 new", "[none]"], text=["one", "two"])
    assert [*open_corpus(str(path)).documents()] == ["one", "two"]


TEXTS = ["Grüße", "", None, "two\nlines", "Grüße"]
COLUMNS = {
    "dictionary": pyarrow.array(TEXTS).dictionary_encode(),
    "dictionary of large": pyarrow.array(TEXTS, pyarrow.large_string()).dictionary_encode(),
    "view": pyarrow.array(TEXTS, pyarrow.string_view()),
    "large": pyarrow.array(TEXTS, pyarrow.large_string()),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_of_text_however_it_is_stored(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "rows.parquet", None, body=COLUMNS[kind], n=range(5))
    assert type(pyarrow.parquet.read_schema(path).field("body").type) is type(COLUMNS[kind].type)
    assert [*open_corpus(str(path), "body").documents()] == ["Grüße", "two\nlines", "Grüße"]


def test_a_column_that_holds_nothing_holds_no_text(tmp_path: Path) -> None:
    """As one file of many may."""
    save(tmp_path / "a.parquet", None, text=pyarrow.nulls(3))
    save(tmp_path / "b.parquet", None, text=["b"])
    assert [*open_corpus(str(tmp_path)).documents()] == ["b"]


@pytest.mark.parametrize("kind", [pyarrow.list_, pyarrow.large_list, pyarrow.list_view])
def test_messages_in_lists_of_any_form(tmp_path: Path, kind: Any) -> None:
    message = pyarrow.struct(
        {"role": pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), "content": "string"}
    )
    messages = [turns()[0], {"role": "assistant", "content": "Hello"}]
    table = pyarrow.table({"messages": pyarrow.array([messages] * 3, kind(message))})
    assert [row["messages"] for row in rows_of(table)] == [messages] * 3
    if kind is not pyarrow.list_view:  # which Parquet does not hold
        pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
        assert chats_of(tmp_path / "chats.parquet") == [(messages, None)] * 3


def test_a_map_is_an_object() -> None:
    kind = pyarrow.map_("string", pyarrow.struct({"a": "int64", "b": "int64"}))
    column = pyarrow.array([[("x", {"a": 1}), ("y", None)], None, []], kind)
    rows = [row["column"] for row in rows_of(pyarrow.table({"column": column}))]
    assert rows == [{"x": {"a": 1}, "y": None}, None, {}]


@pytest.mark.parametrize("name", ["text", "messages", "tools"])
@pytest.mark.parametrize("as_json", [False, True])
def test_two_columns_of_one_name(tmp_path: Path, name: str, as_json: bool) -> None:
    """Are an error where they are asked for, and none of ours where they are not."""
    columns: dict[str, Any] = {"body": ["a", "b"], "messages": [turns(days=1)] * 2, "tools": [[TOOL]] * 2}
    if as_json:
        columns |= {key: [json.dumps(v) for v in columns[key]] for key in ("messages", "tools")}
    chosen = columns if name != "text" else {"body": ["a", "b"], "text": ["c", "d"]}
    pairs = [*chosen.items(), (name, chosen[name])]
    table = pyarrow.Table.from_arrays([pyarrow.array(v) for _, v in pairs], [key for key, _ in pairs])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=rf"rows\.parquet: 2 columns are named {name}; it cannot be told"):
        list(open_corpus(str(tmp_path / "rows.parquet")).documents())
    assert [*open_corpus(str(tmp_path / "rows.parquet"), "body").documents()] == ["a", "b"]


def test_a_column_of_bytes_is_no_text(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.parquet", None, text=[b"a"], body=["b"])
    with pytest.raises(UserError, match=r"data\.text_field=text: no column of text in .*\['text', 'body'\]"):
        list(open_corpus(str(path)).documents())
