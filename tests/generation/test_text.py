import pytest

from colossus.data.bytes_tokenizer import BytesTokenizer
from colossus.generation.text import TextBuilder


def pieces(text, stop=()):
    tokenizer = BytesTokenizer()
    builder, out = TextBuilder(tokenizer, stop), []
    for token in tokenizer.encode(text):
        out.append(builder.add(token))
        if builder.done:
            break
    return [*out, builder.finish()]


def test_characters_come_whole():
    assert pieces("aé中😀b") == ["a", "", "é", "", "", "中", "", "", "", "😀", "b", ""]


def test_what_may_begin_a_stop_string_is_held_back():
    assert pieces("abcabd", ["abd"]) == ["", "", "abc", "", "", "", ""]
    assert "".join(pieces("abcabd", ["abx"])) == "abcabd"


@pytest.mark.parametrize(
    ("stop", "expected"), [(["c"], "ab"), (["b", "c"], "a"), (["zz"], "abcabc"), ([""], "abcabc")]
)
def test_text_ends_before_the_first_stop(stop, expected):
    assert "".join(pieces("abcabc", stop)) == expected


def test_an_unfinished_character_at_the_end_is_not_lost():
    builder = TextBuilder(BytesTokenizer())
    assert builder.add(0xC3) == "" and builder.finish() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("text", ["中", "中é", "中a😀"])
def test_a_prompt_may_end_inside_a_character(text):
    """The continuation has that character, once."""
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(f"a{text}b")
    for end in (2, 3):
        builder = TextBuilder(tokenizer, prompt=ids[:end])
        assert "".join(map(builder.add, ids[end:])) + builder.finish() == f"{text}b"
