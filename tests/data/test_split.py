"""What is held out: by document, by the text alone, something on each side, sized as compressors do."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.data import split as splitting
from colossus.data.corpus import Corpus, Part
from colossus.data.open import open_corpus
from colossus.data.split import HELD_OUT_BYTES, LITTLE, NEAR, WHOLE, divide, key_of, sizes_of
from colossus.errors import UserError
from tests.data.building import built, decoded, in_memory, write_corpus


def sides(corpus: Corpus, fraction: float) -> tuple[list[str], list[str]]:
    """Documents that are learned, and that are held out."""
    corpus, split = divide(corpus, fraction)
    found: tuple[list[str], list[str]] = ([], [])
    for document in corpus.documents():
        found[split.holds_out(document)].append(document)
    return found


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=40), st.floats(0.001, 0.999))
def test_something_on_each_side_and_nothing_on_both(documents: list[str], fraction: float) -> None:
    corpus = in_memory(documents)
    if len(set(documents)) == 1 and (len(documents[0]) < 2 or documents[0] == 2 * documents[0][0]):
        with pytest.raises(UserError, match="one document that cannot be cut"):
            sides(corpus, fraction)
        return
    learned, held_out = sides(corpus, fraction)
    assert learned
    assert held_out
    if len(set(documents)) > 1:
        assert sorted(learned + held_out) == sorted(documents)
        assert not {*learned} & {*held_out}
    else:
        assert learned[0] + held_out[0] == documents[0]


def test_the_share_is_as_asked_for() -> None:
    documents = [f"document {i}" for i in range(5000)]
    learned, held_out = sides(in_memory(documents), 0.1)
    assert 0.08 < len(held_out) / 5000 < 0.12
    assert [d for d in documents if d in {*held_out}] == held_out  # nothing else decides but the text
    reversed_learned, _ = sides(in_memory(documents[::-1]), 0.1)
    assert sorted(reversed_learned) == sorted(learned)


def test_of_a_large_corpus_little_is_held_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(splitting, "HELD_OUT_BYTES", 3000)
    corpus = open_corpus(str(write_corpus(tmp_path, num=200, size=500)))
    _, held_out = sides(corpus, 0.5)
    assert 1000 < sum(map(len, held_out)) < 6000


@pytest.mark.parametrize("fraction", [0.001, 0.2, 0.9999])
def test_what_was_not_looked_at_has_its_share_too(monkeypatch: pytest.MonkeyPatch, fraction: float) -> None:
    """Also where all that was looked at is on one side."""
    monkeypatch.setattr(splitting, "LOOK_AT_BYTES", 100)
    documents = [f"document {i} of many" for i in range(20_000)]
    learned, held_out = sides(in_memory(documents), fraction)
    assert {*learned} & {*documents[:10]}
    assert {*held_out} & {*documents[:10]} or fraction == 0.2
    assert len(held_out) / 20_000 == pytest.approx(fraction, rel=0.5)


def test_two_documents() -> None:
    """The one whose size comes nearer to the share is held out, and it is said."""
    corpus, split = divide(in_memory(["long " * 1000, "short"]), 0.001)
    assert split.holds_out("short")
    assert not split.holds_out("long " * 1000)
    assert corpus.notes == ("few documents: one of 5 characters is held out",)
    learned, held_out = sides(in_memory(["long " * 1000, "short"]), 0.999999)
    assert [len(learned), len(held_out)] == [1, 1]


@pytest.mark.parametrize("copies", [1, 3])
def test_one_document_is_cut_at_a_line(tmp_path: Path, copies: int) -> None:
    """Also where files repeat it: what is held out is not learned in the copy."""
    text = "".join(f"line {i}\n" for i in range(1000))
    for i in range(copies):
        (tmp_path / f"{i}.txt").write_text(text)
    train, validation = built(tmp_path / "out", open_corpus(str(tmp_path)), held_out=0.05)
    ((head,), (tail,)) = decoded(train), decoded(validation)
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.03 < len(tail) / len(text) < 0.07
    note = f"one document: its last {len(tail):,} characters are held out"
    assert note in train.manifest["corpus"]["notes"]
    assert validation.documents()["num_bytes"].tolist() == [len(tail)]


def prose(num_bytes: int) -> str:
    """Paragraphs of some lines, of about so many bytes in all."""
    lines = (f"The {i} of {i * 7919 % 10007} lines.\n" + "\n" * (i % 9 == 0) for i in range(num_bytes // 24))
    return "".join(lines)


@pytest.mark.parametrize("fraction", [0.003, 0.02, 0.1])
@pytest.mark.parametrize("num_bytes", [600_000, 2_100_000, 5_000_000, 17_000_000])
def test_of_one_large_text_file_the_share_is_held_out(
    tmp_path: Path, num_bytes: int, fraction: float
) -> None:
    path = tmp_path / "book.txt"
    path.write_text(text := prose(num_bytes))
    learned, held_out = sides(open_corpus(str(path)), fraction)
    assert sum(map(len, learned + held_out)) == len(text)
    wanted = min(fraction * len(text), HELD_OUT_BYTES)
    assert wanted / NEAR <= sum(map(len, held_out)) <= wanted * NEAR


@pytest.mark.parametrize("fraction", [0.02, 0.3])
def test_of_few_large_documents_the_share_is_held_out(tmp_path: Path, fraction: float) -> None:
    """Of books, a part of one, or as many as come nearest."""
    for i in range(7):
        (tmp_path / f"{i}.txt").write_text(f"Book {i}\n" + prose(100_000 + 3000 * i))
    corpus, _ = divide(open_corpus(str(tmp_path)), fraction)
    learned, held_out = sides(open_corpus(str(tmp_path)), fraction)
    text = "".join(p.read_text() for p in tmp_path.iterdir())
    assert sorted("".join(learned + held_out)) == sorted(text)
    assert fraction / NEAR <= sum(map(len, held_out)) / len(text) <= fraction * NEAR
    assert [len(learned), len(held_out)] == ([7, 1] if fraction == 0.02 else [5, 2])
    if fraction == 0.02:
        assert corpus.notes == (
            f"few documents: of one the last {len(held_out[0]):,} characters are held out",
        )


def test_a_copy_of_the_document_that_is_cut_is_cut_too() -> None:
    """What is held out of one is not learned in the other."""
    books = ["".join(f"{name} {i}\n" for i in range(2000)) for name in ("one", "two", "three")]
    learned, held_out = sides(in_memory([*books, *books], parts=2), 0.01)
    assert len(held_out) == 2 and held_out[0] == held_out[1]
    assert 0.01 / NEAR < len("".join(held_out)) / len("".join(books)) / 2 < 0.01 * NEAR
    assert not any(text.endswith(held_out[0]) for text in learned)


@pytest.mark.parametrize(
    "sizes", [[9000, 400, 80, 2000, 500, 30, 7000] * 90, [90, 4, 80] * 12, [50] * 100, [10**5, *[10] * 500]]
)
def test_of_some_documents_the_share_is_held_out(sizes: list[int]) -> None:
    """Of so few that chance would make it another; of little text, about."""
    documents = [f"{i} " * (size // 2) for i, size in enumerate(sizes)]
    for fraction in (0.02, 0.1, 0.5):
        learned, held_out = sides(in_memory(documents), fraction)
        assert sorted("".join(learned + held_out)) == sorted("".join(documents))
        share = len("".join(held_out)) / len("".join(documents))
        near = NEAR if len("".join(documents)) > LITTLE else 2
        assert fraction / near <= share <= fraction * near


def test_one_document_without_lines() -> None:
    learned, held_out = sides(in_memory(["word " * 100]), 0.1)
    assert held_out == ["word " * 10]
    learned, held_out = sides(in_memory(["x" * 100]), 0.1)
    assert [len(learned[0]), len(held_out[0])] == [90, 10]


@pytest.mark.parametrize("text", ["abab", "one\n" * 2, "to be " * 2, "line\nto be \n" * 2, "x" * 1000, "aaa"])
def test_one_document_of_two_equal_halves(tmp_path: Path, text: str) -> None:
    """Equal documents lie on one side: halves would leave nothing to learn."""
    train, validation = built(tmp_path, in_memory([text]), held_out=0.5)
    ((head,), (tail,)) = decoded(train), decoded(validation)
    assert head + tail == text
    assert head != tail


def test_one_document_of_one_character_twice() -> None:
    with pytest.raises(UserError, match="one document that cannot be cut"):
        divide(in_memory(["aa"]), 0.5)


def test_a_corpus_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    readings = [["one", "two", "three"], ["one"], ["one"], ["one"]]
    corpus = Corpus("given", (Part("part", 0, lambda: iter(readings.pop(0))),), "fingerprint")
    with pytest.raises(UserError, match="given: changed while it was read; build again"):
        built(tmp_path, corpus, held_out=0.5)


def test_no_text_at_all() -> None:
    with pytest.raises(UserError, match=r"data\.corpus=given: empty; it holds no text"):
        divide(in_memory(["", ""]), 0.1)


def test_keys_are_spread() -> None:
    keys = [key_of(f"document {i}") for i in range(2000)]
    assert len({*keys}) == 2000
    assert abs(sum(keys) / len(keys) / WHOLE - 0.5) < 0.03


@pytest.mark.parametrize("size", [1, 2, 100, 4096, 5000, 300_000])
def test_sizes_are_those_of_the_commands(tmp_path: Path, size: int) -> None:
    text = "".join(f"{i * i} and {i % 37}\n" for i in range(size // 8 + 1))[:size]
    path = tmp_path / "text"
    path.write_text(text)
    sizes = sizes_of(text.encode())
    assert sizes[0] == size
    for column, command in ((1, "gzip -9n"), (2, "bzip2 -9"), (3, "xz -9e")):
        if shutil.which(command.split()[0]):
            command_line = [*command.split(), "-c", str(path)]
            packed = subprocess.run(command_line, capture_output=True, check=True).stdout
            assert sizes[column] == pytest.approx(
                len(packed), rel=1e-4
            )  # gzip's own deflate differs a little
    assert sizes[3] == len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def test_held_out_documents_have_their_sizes(tmp_path: Path) -> None:
    corpus = open_corpus(str(write_corpus(tmp_path / "text")))
    _, validation = built(tmp_path / "out", corpus)
    table = validation.documents()
    documents = dict(
        zip(validation.document_starts(0, validation.num_tokens).tolist(), decoded(validation), strict=True)
    )
    assert len(table) == len(documents) > 2
    for row in table.tolist():
        assert [*row[1:]] == sizes_of(documents[row[0]].encode())
    starts = table["start"].tolist()
    assert starts != sorted(starts)  # shuffled, so that the first n are a fair part


def test_the_tokenizer_never_sees_what_is_held_out(tmp_path: Path) -> None:
    """A word that only one document has, often: a token of its own if, and only if, it is learned."""
    from colossus.data.sample import tokenizer_sample

    corpus = open_corpus(str(write_corpus(tmp_path)))
    divided = divide(corpus, 0.2)
    sample = "".join(tokenizer_sample([divided], [1.0]))
    for document in corpus.documents():
        assert (document in sample) is not divided[1].holds_out(document)
