"""A window of a stream as tokens, targets and documents."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from colossus.architecture import IGNORED
from colossus.data.packing import fill_window
from tests.data.streams import Stream, counting


def window(source: Stream, index: int, seq_len: int, documents: bool) -> list[list[int]]:
    """Tokens, targets and (where asked for) documents; the arrays hold junk before."""
    arrays = [np.full(seq_len, 77_777, np.int64) for _ in range(3 if documents else 2)]
    fill_window(source, index, *arrays)
    return [array.tolist() for array in arrays]


def test_targets_are_the_next_tokens_over_all_borders() -> None:
    source = counting(100, document=5)
    assert window(source, 2, 8, documents=False) == [[*range(16, 24)], [*range(17, 25)]]


def test_documents_kept_apart() -> None:
    """No target in another document; documents are numbered within the window."""
    source = Stream(np.arange(30, dtype=np.uint16), np.array([0, 10, 13, 17, 18, 25]))
    tokens, targets, documents = window(source, 1, 8, documents=True)
    assert tokens == [8, 9, 10, 11, 12, 13, 14, 15]
    assert targets == [9, IGNORED, 11, 12, IGNORED, 14, 15, 16]
    assert documents == [0, 0, 1, 1, 1, 2, 2, 2]


def test_documents_with_one_token_between_them() -> None:
    """It is the target of the one that it ends, and the first that is read of the one that it begins."""
    source = Stream(np.arange(30, dtype=np.uint16), np.array([0, 10, 13, 17, 25]), separated_once=True)
    tokens, targets, documents = window(source, 1, 8, documents=True)
    assert tokens == [8, 9, 10, 11, 12, 13, 14, 15]
    assert targets == [9, 10, 11, 12, 13, 14, 15, 16]  # none is lost
    assert documents == [0, 1, 1, 1, 2, 2, 2, 2]
    assert window(source, 2, 8, documents=True)[2] == [0] * 8  # begins with the token before the 17th


def test_a_document_that_begins_right_behind_the_window() -> None:
    source = Stream(np.arange(30, dtype=np.uint16), np.array([0, 16]))
    _, targets, documents = window(source, 1, 8, documents=True)
    assert targets == [9, 10, 11, 12, 13, 14, 15, IGNORED]
    assert documents == [0] * 8


def test_masked_tokens_are_no_targets() -> None:
    learned = np.ones(30, np.uint8)
    learned[[9, 12, 16]] = 0
    source = Stream(np.arange(30, dtype=np.uint16), np.array([0]), learned)
    _, targets = window(source, 1, 8, documents=False)
    assert targets == [IGNORED, 10, 11, IGNORED, 13, 14, 15, IGNORED]


@given(st.data(), st.integers(1, 12), st.integers(13, 80))
def test_as_a_loop_over_tokens_would_have_it(data: st.DataObject, seq_len: int, num_tokens: int) -> None:
    starts = np.array(sorted({0, *data.draw(st.sets(st.integers(0, num_tokens - 1)))}))
    learned = np.array(data.draw(st.lists(st.integers(0, 1), min_size=num_tokens, max_size=num_tokens)))
    source = Stream(np.arange(num_tokens, dtype=np.uint32), starts, learned.astype(np.uint8))
    index = data.draw(st.integers(0, (num_tokens - 1) // seq_len - 1))
    document_of = np.searchsorted(starts, np.arange(num_tokens), side="right")
    places = range(index * seq_len, (index + 1) * seq_len)
    tokens, targets, documents = window(source, index, seq_len, documents=True)
    assert tokens == [*places]
    same = [document_of[p] == document_of[p + 1] and learned[p + 1] for p in places]
    assert targets == [p + 1 if ok else IGNORED for p, ok in zip(places, same, strict=True)]
    assert documents == [document_of[p] - document_of[places[0]] for p in places]
