"""What is offered in place of a name that there is not."""

from __future__ import annotations

import pytest

from colossus.errors import nearest

MODELS = ["gpt3-2.7b", "gpt2-124m", "gpt2-1.5b", "llama3-8b", "llama3.1-8b", "llama3.1-70b"]


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("gpt2", {"gpt2-124m", "gpt2-1.5b"}),
        ("llama3.1", {"llama3.1-8b", "llama3.1-70b"}),
        ("LLAMA3.1-8B", {"llama3.1-8b"}),
        ("llama3.1-8", {"llama3.1-8b"}),
        ("lama3-8b", {"llama3-8b"}),
        ("", {None}),
        ("zebra", {None}),
    ],
)
def test_what_begins_alike_comes_first(name: str, offered: set[str | None]) -> None:
    assert nearest(name, MODELS) in offered
