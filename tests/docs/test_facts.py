"""Numbers and lists that the pages repeat are those of the code."""

from __future__ import annotations

import re

from colossus.data.files import CUT_BYTES, CUT_TO_BYTES
from colossus.trainer.going_on import MAY_CHANGE
from tests.docs.pages import ROOT


def page(name: str) -> str:
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


def test_where_a_text_file_is_cut() -> None:
    cut, to = CUT_BYTES // 2**20, CUT_TO_BYTES // 2**10
    assert f"one beyond {cut} MiB is cut into documents of {to} KiB at most" in page("data.md")


def test_what_may_change_between_attempts() -> None:
    said = re.search(r"may change, and on which device it runs \((.*?)\)", page("train.md"))
    assert said is not None
    assert said[1] == ", ".join(f"`{name.rstrip('.')}`" for name in MAY_CHANGE)
