"""How much of a text a tokenizer loses: what decoding its ids does not give back.

A model cannot be charged for what its tokens do not hold. Where that is more than a little, its bits per byte
say nothing: a tokenizer that knows no word has one token, and a model of it needs no bits.
"""

from __future__ import annotations

LIMIT = 0.001  # of the bytes: from here on bits per byte are withheld
_REACH = 32  # characters within which the two texts are brought together again
_ENOUGH = 6  # characters that must be the same for that


def lost_bytes(text: str, again: str) -> int:
    """Bytes of `text` that are missing in `again` or other there; where none is missing, the bytes that were
    put between. What was put before the first character or behind the last takes nothing away.

    Differences with fewer than six characters between count as one, with what stands between.
    """
    lost = at = there = 0
    while at < len(text):
        num_same = _num_same(text, at, again, there)
        at, there = at + num_same, there + num_same
        if at < len(text):
            missing, added = _difference(text, at, again, there)
            between = again[there : there + added] if not missing and at else ""
            lost += len((text[at : at + missing] + between).encode())
            at, there = at + missing, there + added
    return lost


def _num_same(text: str, at: int, again: str, there: int) -> int:
    """Characters that are the same from there on."""
    most = min(len(text) - at, len(again) - there)
    size = 1
    num_same = 0
    while num_same < most:
        stop = min(most, num_same + size)
        if text[at + num_same : at + stop] == again[there + num_same : there + stop]:
            num_same, size = stop, 2 * size
        elif size == 1:
            break
        else:
            size = max(1, size // 4)
    return num_same


def _difference(text: str, at: int, again: str, there: int) -> tuple[int, int]:
    """The fewest characters of both behind which the texts go on alike."""
    added_before: dict[str, int] = {}  # what follows; the fewest
    for added in range(_REACH + 1):
        added_before.setdefault(again[there + added : there + added + _ENOUGH], added)
    found = (
        (missing + added_before[rest], missing, added_before[rest])
        for missing in range(_REACH + 1)
        if (rest := text[at + missing : at + missing + _ENOUGH]) in added_before
    )
    _, missing, added = min(found, default=(0, _REACH, _REACH))
    return missing, added
