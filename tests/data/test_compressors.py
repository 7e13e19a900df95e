"""Where a compressor's own frame is most of what it writes, it is nothing to be better than."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random

import pytest

from colossus.data.compressors import have_work


@pytest.mark.parametrize(
    ("num_documents", "num_bytes", "enough"),
    [(1, 256, True), (1, 255, False), (40, 40 * 300, True), (40, 40 * 70, False), (0, 0, True)],
)
def test_short_documents_give_them_nothing_to_do(num_documents: int, num_bytes: int, enough: bool) -> None:
    assert have_work(num_documents, num_bytes) is enough


def test_an_answer_takes_more_with_them_than_without() -> None:
    """70 bytes, of which there are no two alike in a row: what is not enough is so for a reason."""
    draw = random.Random(0)
    answer = bytes(draw.choice(b"abcdefghijklmnopqrstuvwxyz ") for _ in range(70))
    assert not have_work(1, len(answer))
    assert (
        min(len(made) for made in (gzip.compress(answer), bz2.compress(answer), lzma.compress(answer))) > 70
    )
