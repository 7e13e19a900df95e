"""What of a text its tokens do not give back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossus.data.lossless import lost_bytes
from colossus.data.tokenizer import load_tokenizer
from tests.data.building import built, in_memory
from tests.data.kinds import KINDS, saved


@pytest.mark.parametrize(
    ("text", "again", "expected"),
    [
        ("", "", 0),
        ("the cat sat", "the cat sat", 0),
        ("The cat sat. The dog", "the cat sat. the dog", 2),
        ("ein größerer Hund", "ein [UNK] Hund", len("größerer".encode())),
        ("caf\u00e9 au lait, s'il vous", "cafe au lait, s'il vous", 2),
        ("a  blank   and so on", "a blank and so on", 3),
        ("so  be   it and so on", "so be it and so on", len(" be ") + 1),  # near one another: one difference
        ("stop it don't stop", "stop it don' t stop", 1),
        (" the cat sat on", "the cat sat on", 1),
        ("the cat sat on", " the cat sat on", 0),  # what stands before it all takes nothing away
        ("the cat sat on", "the cat sat on ", 0),
        ("the cat sat on \n", "the cat sat on", 2),
        ("the cat sat on a mat", "", 20),
        ("abc", "xyz", 3),
        ("日本語 and more of it", "��� and more of it", 9),
    ],
)
def test_worked_out_by_hand(text: str, again: str, expected: int) -> None:
    assert lost_bytes(text, again) == expected


@given(st.text(), st.text())
def test_never_more_than_all_of_both_and_nothing_of_the_same(text: str, again: str) -> None:
    assert lost_bytes(text, text) == 0
    lost = lost_bytes(text, again)
    assert 0 <= lost <= len((text + again).encode())
    assert bool(lost) or text in again


def plainly(text: str, again: str) -> int:
    """The same, a character at a time, of all pairs of lengths the least."""
    lost = at = there = 0
    while at < len(text):
        if text[at] == again[there : there + 1]:
            missing = added = 1
        else:
            lengths = [(n + m, n, m) for n in range(33) for m in range(33)]
            rest, other = text[at:], again[there:]
            alike = (each for each in lengths if rest[each[1] :][:6] == other[each[2] :][:6])
            _, missing, added = min(alike, default=(64, 32, 32))
            lost += len((rest[:missing] + (other[:added] if at and not missing else "")).encode())
        at, there = at + missing, there + added
    return lost


@given(st.text("ab é", max_size=90), st.text("ab é", max_size=90))
def test_as_plainly_searched(text: str, again: str) -> None:
    for one, other in ((text, again), (text + again, again), (again + text + again, again + again)):
        assert lost_bytes(one, other) == plainly(one, other)


def test_of_a_long_text_all_of_which_is_lost() -> None:
    """Within seconds, as long as a held-out text may be: 2 MiB."""
    began = time.process_time()
    assert (
        lost_bytes("".join(chr(0x4E00 + n % 20000) for n in range(700_000)), "[UNK] " * 700_000) == 2_100_000
    )
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", KINDS)
def test_a_build_notes_what_its_tokenizer_loses(name: str, tmp_path: Path) -> None:
    """Of held-out text; nothing where all comes back."""
    documents = [f"The cat {n} sat on größer {n * n}" for n in range(60)]
    tokenizer = load_tokenizer(saved(name, tmp_path / name))
    _, held_out = built(tmp_path / "out", in_memory(documents), tokenizer=str(tmp_path / name))
    lost = {
        document: lost_bytes(document, tokenizer.decode(tokenizer.encode(document))) for document in documents
    }
    sizes = {int(row["start"]): int(row["num_bytes"]) for row in held_out.documents()}
    assert held_out.num_lost_bytes == 0 or name == "word_piece"
    if name == "word_piece":  # a capital in each, and what it does not know
        assert held_out.num_lost_bytes >= len(sizes) and all(lost.values())
    else:
        assert "lost_bytes" not in held_out.manifest["documents"] and not any(lost.values())
