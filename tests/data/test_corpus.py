"""Where text comes from: local files of every kind, the user's own code, the default corpus."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossus.data import files, python_corpus
from colossus.data.open import check_corpus, open_corpus
from colossus.errors import UserError
from tests.data.building import COMPRESS, texts


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_text_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"text.txt{ending}"
    path.write_bytes(COMPRESS[ending]("Grüße,\nworld\n".encode()))
    assert texts(open_corpus(str(path))) == ["Grüße,\nworld\n"]


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_jsonl_file(tmp_path: Path, ending: str) -> None:
    rows = [{"text": f"document {i}\nsecond line", "id": i} for i in range(100)]
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(COMPRESS[ending]("\n".join(map(json.dumps, rows)).encode()))
    assert texts(open_corpus(str(path))) == [row["text"] for row in rows]


def test_a_parquet_file(tmp_path: Path) -> None:
    column = [f"document {i}" for i in range(700)] + [None, ""]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": column, "n": range(702)}), path)
    assert texts(open_corpus(str(path), "body")) == column[:700]
    with pytest.raises(UserError, match=r"data\.text_field=bodi: .*\['body', 'n'\]; did you mean 'body'\?"):
        texts(open_corpus(str(path), "bodi"))
    with pytest.raises(UserError, match=r"data\.text_field=n: no column of text"):
        texts(open_corpus(str(path), "n"))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_damaged_parquet_file(tmp_path: Path, compression: str) -> None:
    """Wherever a stretch of it was overwritten: what comes out is the text, or an error with the file."""
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": [f"document {i}" for i in range(300)]})
    pyarrow.parquet.write_table(table, path, compression=compression)
    whole, errors = path.read_bytes(), 0
    for at in range(0, len(whole), 16):
        path.write_bytes(whole[:at] + b"\xff" * 16 + whole[at + 16 :])
        try:
            texts(open_corpus(str(path)))
        except UserError as error:
            errors += "rows.parquet" in str(error)
    assert errors > len(whole) // 64


def test_a_folder_is_read_in_the_order_of_names_and_below(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {"b.txt": "b", "a.md": "a", "sub/c": "c", ".git/x": "no", ".hidden": "no"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "d.jsonl").write_text('{"text": "d"}\n\n{"text": ""}\n{"text": null}\n')
    (tmp_path / "empty.txt").touch()
    corpus = open_corpus(str(tmp_path))
    assert texts(corpus) == ["a", "b", "d", "c"]
    assert [part.name for part in corpus.parts] == ["a.md", "b.txt", "d.jsonl", "sub/c"]
    assert corpus.num_bytes == sum(f.stat().st_size for f in tmp_path.rglob("[!.]*.*")) + 1


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    before = open_corpus(str(tmp_path)).fingerprint
    assert open_corpus(str(tmp_path)).fingerprint == before
    assert open_corpus(str(tmp_path), "body").fingerprint != before
    (tmp_path / "a.txt").write_text("two")
    changed = open_corpus(str(tmp_path)).fingerprint
    assert changed != before
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert open_corpus(str(tmp_path)).fingerprint != changed


@pytest.fixture
def small_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large means 400 bytes here, and a piece at most 100."""
    for name, value in {"CUT_BYTES": 400, "CUT_TO_BYTES": 100, "RANGE_BYTES": 150}.items():
        monkeypatch.setattr(files, name, value)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.usefixtures("small_cuts")
def test_a_large_text_file_is_cut_at_line_ends(tmp_path: Path, ending: str) -> None:
    text = "".join(f"line {i} {'äö' * (i % 9)}\n" for i in range(300))
    path = tmp_path / f"large.txt{ending}"
    path.write_bytes(COMPRESS[ending](text.encode()))
    corpus = open_corpus(str(path))
    found = texts(corpus)
    assert "".join(found) == text
    assert all(piece.endswith("\n") for piece in found)
    assert max(len(piece.encode()) for piece in found) <= 100
    assert len(found) > 40
    assert (len(corpus.parts) > 20) == (ending == "")  # which several processes read at once


@pytest.mark.parametrize("ending", ["", ".gz"])
@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="a€😀 \n", min_size=150, max_size=900))
def test_whatever_is_cut_comes_back_whole(
    tmp_path_factory: pytest.TempPathFactory, ending: str, text: str
) -> None:
    """Also where lines are longer than a piece, or there are none, and characters take several bytes."""
    path = tmp_path_factory.mktemp("cut") / f"large.txt{ending}"
    path.write_bytes(COMPRESS[ending](text.encode()))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"CUT_BYTES": 400, "CUT_TO_BYTES": 100, "RANGE_BYTES": 150}.items():
            patch.setattr(files, name, value)
        assert "".join(texts(open_corpus(str(path)))) == text


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 300), min_size=20, max_size=60))
def test_ranges_of_a_jsonl_file_share_its_lines(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "rows.jsonl"
    rows = [f"{i} {'x' * length}" for i, length in enumerate(lengths)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CUT_BYTES", 200)
        patch.setattr(files, "RANGE_BYTES", 150)
        corpus = open_corpus(str(path))
        assert len(corpus.parts) == -(-path.stat().st_size // 150)
        assert texts(corpus) == rows


def test_a_missing_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"data\.corpus=.*corpsu\.txt: no such file.*did you mean '.*corpus\.txt'"
    ):
        open_corpus(str(tmp_path / "corpsu.txt"))
    with pytest.raises(UserError, match="did you mean 'python'"):
        open_corpus("pyhton")
    with pytest.raises(UserError, match="no such file or folder; python, a path, hf:NAME"):
        open_corpus("/nowhere/at/all")


def test_a_name_that_no_file_can_have() -> None:
    for name in (300 * "x", f"{300 * 'x'}/y", f"/{300 * 'x'}/y"):
        with pytest.raises(UserError, match="no such file or folder"):
            open_corpus(name)


@pytest.mark.usefixtures("own")
def test_checked_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "junk.txt").write_bytes(b"\xff")
    for name in (
        "python",
        "hf:any/name",
        str(tmp_path / "junk.txt"),
        str(tmp_path),
        "kept_corpora.corpora:Wrong",
    ):
        check_corpus(name)
    for name in (
        "pyhton",
        str(tmp_path / "jnuk.txt"),
        "kept_corpora.corpora:Plian",
        "kept_corpora.nothing:Plain",
    ):
        with pytest.raises(UserError) as checked:
            check_corpus(name)
        with pytest.raises(UserError) as opened:
            open_corpus(name)
        assert str(checked.value) == str(opened.value)


def test_what_is_no_regular_file_is_said_to_be_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=rf"data\.corpus={path}: no regular file; python, the path"):
            check_corpus(str(path))


def test_an_empty_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty; it holds no file with text"):
        open_corpus(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    for path in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(UserError, match="empty; it holds no file with text"):
            open_corpus(str(path))


@pytest.mark.parametrize(
    ("data", "byte"), [(b"abc\0def", 3), (b"abc\xffdef", 3), (b"caf\xe9", 3), (b"\x89PNG\r\n", 0)]
)
def test_binary_junk(tmp_path: Path, data: bytes, byte: int) -> None:
    """Refused as the only file; left out, and said, among others."""
    path = tmp_path / "junk.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"junk\.txt: not text \(byte {byte} is not UTF-8\)"):
        open_corpus(str(path))
    (tmp_path / "good.txt").write_text("good")
    corpus = open_corpus(str(tmp_path))
    assert texts(corpus) == ["good"]
    assert corpus.notes == ("files that are not text, left out: 1 (junk.txt)",)


def test_binary_junk_deep_in_a_file(tmp_path: Path) -> None:
    """Behind what is looked at first, it stops the reading, with its place."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"good line\n" * 200_000 + b"\xff\xfe")
    with pytest.raises(UserError, match=r"text\.txt: byte 2000000 is not UTF-8 text"):
        texts(open_corpus(str(path)))


def test_a_character_across_the_end_of_the_first_look(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"x" * (files.HEAD_BYTES - 1) + "€uro".encode())
    assert texts(open_corpus(str(path)))[0].endswith("x€uro")


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_is_none_or_ends_early(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"text.txt{ending}"
    path.write_bytes(b"plain text, really")
    with pytest.raises(UserError, match=rf"text\.txt\{ending}: cannot be read"):
        texts(open_corpus(str(path)))
    data = "".join(f"line {i * i}\n" for i in range(150_000)).encode()
    path.write_bytes(COMPRESS[ending](data)[:-9_000])
    with pytest.raises(UserError, match=rf"text\.txt\{ending}: cannot be read"):
        texts(open_corpus(str(path)))


SKIPPED = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"  # a frame of zstandard that holds no text


@pytest.mark.parametrize(
    ("ending", "between"),
    [
        (".gz", b""),
        (".gz", bytes(5)),
        (".bz2", b""),
        (".xz", b""),
        (".xz", bytes(4)),
        (".xz", bytes(2**20)),
        (".zst", b""),
        (".zst", SKIPPED),
    ],
)
def test_a_file_of_several_compressed_ones_is_read_whole(tmp_path: Path, ending: str, between: bytes) -> None:
    """As `cat`, `pigz`, `pbzip2` and `pzstd` make them; and a damaged one is not taken for the end."""
    pieces = ["".join(f"line {i * n}\n" for i in range(40_000)) for n in (1, 2, 3)]
    compressed = [COMPRESS[ending](piece.encode()) for piece in pieces]
    path = tmp_path / f"text.txt{ending}"
    path.write_bytes(between.join([*compressed, b""]))
    assert "".join(texts(open_corpus(str(path)))) == "".join(pieces)
    path.write_bytes(between.join([compressed[0], b"\x01" + compressed[1][1:], compressed[2]]))
    with pytest.raises(UserError, match=rf"text\.txt\{ending}: cannot be read"):
        texts(open_corpus(str(path)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"data\.text_field=text: no text under this name at .*byte 16; it has \['body'\]"),
        (
            '{"text": 3, "a": ""}',
            r"no text under this name at .*; there is a number; texts are under \['a'\]",
        ),
        ('["text"]', r"data\.text_field=text: no text under this name"),
        ('{"text": ', r"rows\.jsonl, byte 16: not a JSON line"),
    ],
)
def test_rows_without_text(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "goo"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        texts(open_corpus(str(path)))


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    """JSON can spell what UTF-8 cannot; one such row must not end a build of millions."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts(open_corpus(str(path))) == ["a\ufffdb", "😀"]


OWN = """
def Plain():
    yield "one"
    yield "two"

class Chat:
    def __iter__(self):
        yield [("question", False), ("answer", True)]

def Wrong():
    yield 7

def Uneven():
    yield ["just", "texts"]

not_callable = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the user in the current folder, which is not on the path."""
    (tmp_path / "kept_corpora").mkdir()
    (tmp_path / "kept_corpora" / "__init__.py").touch()
    (tmp_path / "kept_corpora" / "corpora.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    for name in ("kept_corpora", "kept_corpora.corpora"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_the_users_own(own: Path) -> None:
    assert texts(open_corpus("kept_corpora.corpora:Plain")) == ["one", "two"]
    chat = open_corpus("kept_corpora.corpora:Chat")
    assert chat.masked
    assert texts(chat) == [[("question", False), ("answer", True)]]


@pytest.mark.usefixtures("own")
def test_the_users_own_goes_wrong() -> None:
    with pytest.raises(UserError, match=r"has no such callable; did you mean 'kept_corpora\.corpora:Plain'"):
        open_corpus("kept_corpora.corpora:Plian")
    with pytest.raises(UserError, match="has no such callable"):
        open_corpus("kept_corpora.corpora:not_callable")
    with pytest.raises(UserError, match=r"cannot be imported \(No module named 'kept_corpora\.nothing'\)"):
        open_corpus("kept_corpora.nothing:Plain")
    with pytest.raises(UserError, match="yields int 7; text, or a list of"):
        texts(open_corpus("kept_corpora.corpora:Wrong"))
    with pytest.raises(UserError, match=r"yields list .*; text, or a list of"):
        texts(open_corpus("kept_corpora.corpora:Uneven"))


def test_the_users_own_has_the_fingerprint_of_its_code(own: Path) -> None:
    before = open_corpus("kept_corpora.corpora:Plain").fingerprint
    assert open_corpus("kept_corpora.corpora:Chat").fingerprint != before
    (own / "kept_corpora" / "corpora.py").write_text(OWN.replace('"two"', '"three"'))
    assert open_corpus("kept_corpora.corpora:Plain").fingerprint != before


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library."""
    body = [f"def function_{i}(x): return x * {i}\n" for i in range(40)]
    sources = {
        "a.py": "".join(body),
        "b.py": "".join(body[:36]) + "".join(f"# changed {i}\n" for i in range(4)),  # 36 of 44 lines
        "c.py": "".join(body[:20]) + "".join(f"other = {i}\n" for i in range(20)),  # 20 of 60
        "copy.py": "# moved\n" + "".join(body),
        "empty.py": "\n",
        "latin.py": "# caf\xe9\n",
        "test/test_a.py": "import a\nassert a.function_3(2) == 6\n",
        "site-packages/installed.py": "not = ours\n",
        "notes.txt": "no source",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="latin-1")
    monkeypatch.setattr(python_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_the_standard_library_without_what_repeats(library: Path) -> None:
    corpus = open_corpus("python")
    assert [part.name for part in corpus.parts] == ["a.py", "c.py", "test/test_a.py"]
    assert texts(corpus) == [(library / part.name).read_text() for part in corpus.parts]
    version = ".".join(map(str, sys.version_info[:3]))
    (note,) = corpus.notes
    assert note.startswith(
        f"Python {version}'s standard library: 3 files, 0.0 MB, fingerprint {corpus.fingerprint}"
    )
    assert note.endswith("left out: 2 that repeat another, 1 that are not UTF-8")


def test_the_fingerprint_of_the_standard_library_follows_its_bytes(library: Path) -> None:
    before = open_corpus("python").fingerprint
    assert open_corpus("python").fingerprint == before
    path = library / "c.py"
    path.write_text(path.read_text().replace("other = 3", "other = 4"))
    assert open_corpus("python").fingerprint != before


@pytest.mark.parametrize("character", ["é", "€", "𝄞"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_long_line_is_cut_between_characters(tmp_path: Path, character: str, ending: str) -> None:
    """Wherever its characters lie, of 2 to 4 bytes each, and without any end of line."""
    for before in range(len(character.encode())):
        text = "x" * before + character * (3 * 2**20 // len(character.encode()))
        path = tmp_path / f"{before}.txt{ending}"
        path.write_bytes(gzip.compress(text.encode(), 1) if ending else text.encode())
        documents = list(open_corpus(str(path)).documents())
        assert len(documents) > 2 and "".join(map(str, documents)) == text


def test_a_file_that_is_a_small_part_of_another_repeats_it_not() -> None:
    """Although all its lines stand there, those by which files are found too; nearly all of it does."""
    lines = frozenset(range(100))
    for part, repeats in ((10, False), (79, False), (81, True), (100, True)):
        seen = python_corpus._Seen()
        assert not seen.repeats(lines)
        assert seen.repeats(frozenset(range(part))) is repeats
