"""Records of JSON whatever the file is called and however they are laid out; what holds none is a text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.data import json_files
from colossus.data.chats import Chat
from colossus.data.open import open_corpus
from colossus.errors import UserError
from tests.data.building import COMPRESS, texts

# As Dolma's and C4's files are: lines under another name.
RECORDS = [
    {"id": f"doc-{i}", "text": f'Grüße {i}\n{{}}[]\\ "{i}"', "metadata": {"n": [i]}} for i in range(50)
]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


LAYOUTS: dict[str, Callable[[list[Any]], str]] = {
    "lines": lines,
    "lines with blanks between": lambda records: "\n\n" + lines(records).replace("\n", "\n \n"),
    "an array": lambda records: json.dumps(records),
    "an array over lines": lambda records: json.dumps(records, indent=2, ensure_ascii=False),
    "an array with a line each": lambda records: "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n",
    "one after another": lambda records: "\n".join(json.dumps(record, indent=1) for record in records),
    "a mark of UTF-8 in front": lambda records: "\ufeff" + json.dumps(records),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ending", COMPRESS)
def test_records_in_a_file_of_json(tmp_path: Path, layout: str, ending: str) -> None:
    path = tmp_path / f"c4-train.00000-of-00512.json{ending}"
    path.write_bytes(COMPRESS[ending](LAYOUTS[layout](RECORDS).encode()))
    corpus = open_corpus(str(path))
    assert texts(corpus) == [record["text"] for record in RECORDS]
    assert corpus.notes == ()
    assert texts(open_corpus(str(path), "id")) == [record["id"] for record in RECORDS]
    assert texts(open_corpus(str(tmp_path))) == texts(corpus)  # in a folder, too


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chats_in_a_file_of_json(tmp_path: Path, layout: str) -> None:
    (tmp_path / "chats.json").write_text(LAYOUTS[layout]([{"messages": CHAT}] * 3))
    found = [*open_corpus(str(tmp_path)).documents()]
    assert [chat.messages for chat in found if isinstance(chat, Chat)] == [CHAT] * 3


@pytest.mark.parametrize("name", ["a.JSONL", "a.jsonlines", "a.ndjson.GZ", "a.Json", "a.jsonl.v2.json"])
def test_other_spellings_of_an_ending(tmp_path: Path, name: str) -> None:
    data = lines(RECORDS).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    assert texts(open_corpus(str(tmp_path))) == [record["text"] for record in RECORDS]


@pytest.mark.parametrize(
    "text",
    [
        '{\n "name": "a package",\n "version": 1\n}\n',
        '{"name": "a package"}',
        "[1, 2, 3]",
        '["a", {"text": "b"}]',
        '[{"name": "x"}, {"name": "y"}]',
        "[]",
        '"text"',
        "not JSON at all",
        '{"name": ',
        '{// with a remark\n"name": 1}',
        "[" * 100_000,
    ],
)
def test_json_without_records_is_a_text_and_said(tmp_path: Path, text: str) -> None:
    """As the files of programs are, among others."""
    (tmp_path / "settings.json").write_text(text)
    (tmp_path / "main.py").write_text("pass\n")
    corpus = open_corpus(str(tmp_path))
    assert texts(corpus) == ["pass\n", text]
    assert corpus.notes == (
        "files of JSON without records of 'text', learned as they are: 1 (settings.json)",
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_field_that_is_not_there_is_said_of_the_only_file(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(LAYOUTS[layout]([{"content": "a"}, {"content": "b"}]))
    with pytest.raises(UserError, match=r"data\.text_field=text: no text under this name .*\['content'\]"):
        texts(open_corpus(str(path)))


def test_lines_of_other_records_are_no_text_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "rows.json").write_text(lines([{"content": "b"}, {"content": "c"}]))
    with pytest.raises(UserError, match=r"data\.text_field=text: no text .*; it has \['content'\]"):
        texts(open_corpus(str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"text": "a"}, {"text": "b"} {"text": "c"}]', r"behind record 2: not JSON \(neither , nor \]"),
        ('[{"text": "a"}, {"text": "b"', "behind record 1: not JSON"),
        ('[{"text": "a"}] {"text": "b"}', r"behind record 1: not JSON \(something follows the array"),
        ('[{"text": "a"}, 7]', r"data\.text_field=text: no text under this name at .*record 2"),
        ('{\n"text": "a"}\n{"text": ', "behind record 1: not JSON"),
        ('[{"text": "a"}, ' + "[" * 100_000, "behind record 1: not JSON"),
    ],
)
def test_what_is_wrong_behind_the_first_record(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"rows\.json.*{said}|{said}"):
        texts(open_corpus(str(path)))


def test_a_record_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "RECORD_BYTES", 1000)
    monkeypatch.setattr(json_files, "CHUNK_BYTES", 100)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b" * 5000}]))
    with pytest.raises(UserError, match=r"behind record 1: not JSON \(a value of more than 1,000 bytes"):
        texts(open_corpus(str(path)))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=40), max_size=3), min_size=1, max_size=9),
    st.sampled_from(sorted(LAYOUTS)),
    st.integers(1, 40),
)
def test_wherever_the_reading_stops_in_between(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]], layout: str, chunk: int
) -> None:
    given_records = [record | {"text": f"{i} é€😀"} for i, record in enumerate(records)]
    path = tmp_path_factory.mktemp("values") / "rows.json"
    path.write_text(LAYOUTS[layout](given_records), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "CHUNK_BYTES", chunk)
        assert texts(open_corpus(str(path))) == [record["text"] for record in given_records]


def test_the_fingerprint_tells_records_from_the_text_that_they_once_were(tmp_path: Path) -> None:
    """Shards of a file that was learned as a text are not taken for those of its records."""
    path = tmp_path / "rows.json"
    path.write_text(lines(RECORDS))
    before = open_corpus(str(path)).fingerprint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("colossus.data.files.records_in", lambda *_: None)
        patch.setattr("colossus.data.files._reading", lambda *_: ())
        assert open_corpus(str(path)).fingerprint != before
