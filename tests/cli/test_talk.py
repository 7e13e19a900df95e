"""`colossus generate --chat`: a question at once, and a conversation turn by turn, as a person has it."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colossus import api
from colossus.cli import main
from colossus.data.asked import asked_ids
from colossus.data.tokenizer import Tokenizer
from colossus.errors import UserError
from tests.generation.test_kinds import published

TEMPLATE = """\
{% for message in messages %}{{ message.role + ':' + message.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
SHORT = ("--max-tokens", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a context of 256 tokens, and a tokenizer with a chat template."""
    folder = published("byte_level", tmp_path_factory.mktemp("talk") / "published")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def answer(folder: Path, *said: tuple[str, str], type: str = "quickest") -> str:
    """What Python answers to (role, content) each."""
    model, tokenizer = api.load_model(folder, type)
    messages = [{"role": role, "content": content} for role, content in said]
    return api.generate(model, tokenizer, [messages], max_tokens=6)[0]


def typed(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_questions_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(folder), "the cat", "dogs <|endoftext|>", "--chat", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out == f"{answer(folder, ('user', 'the cat'))}\n{answer(folder, ('user', 'dogs <|endoftext|>'))}\n"
    assert err == ""
    assert main(["generate", str(folder), "--chat", "the cat", "--system", "hello", *SHORT]) == 0
    out = capsys.readouterr().out
    assert out == f"{answer(folder, ('system', 'hello'), ('user', 'the cat'))}\n"


def test_a_question_that_does_not_fit_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The most that fits is answered; a text of any length is continued as ever."""
    model, tokenizer = api.load_model(folder)
    context = model.arch.max_seq_len
    [asked] = [n for n in range(context) if len(asked_of("a" * n, tokenizer)) == context - 1][:1]
    assert main(["generate", str(folder), "--chat", "a" * asked, *SHORT]) == 0
    assert main(["generate", str(folder), "--chat", "hello", "a" * asked + "a", *SHORT]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: prompts[1]: the messages are {context} tokens with what the chat template")
    assert f"the model's context is {context}, " in err
    assert main(["generate", str(folder), "a" * asked + "a", *SHORT]) == 0


def asked_of(question: str, tokenizer: Tokenizer | None) -> list[int]:
    return asked_ids([{"role": "user", "content": question}], api.there(tokenizer), "messages")


def test_tools_belong_to_messages(folder: Path) -> None:
    model, tokenizer = api.load_model(folder)
    tools = [{"type": "function", "function": {"name": "add"}}]
    with pytest.raises(UserError, match=r"^tools: prompts\[0\] is no list of messages"):
        api.generate(model, tokenizer, ["a"], tools=tools)
    with pytest.raises(UserError, match=r"^tools: the tokenizer's chat template does nothing with them"):
        api.generate(model, tokenizer, [[{"role": "user", "content": "a"}]], tools=tools)


def test_turn_by_turn(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line is answered with what was said before; blank ones are none."""
    typed(monkeypatch, "the cat\n\n  \r\nand dogs")
    assert main(["generate", str(folder), "--chat", "--system", "hello", *SHORT]) == 0
    begin = ("system", "hello"), ("user", "the cat")
    first = answer(folder, *begin)
    second = answer(folder, *begin, ("assistant", first), ("user", "and dogs"))
    assert capsys.readouterr().out == f"{first}\n{second}\n" and second != answer(
        folder, ("user", "and dogs")
    )


def test_a_full_context_forgets_the_oldest_turns(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["Q" * 80, "R" * 80, "S" * 80]
    typed(monkeypatch, "\n".join(lines))
    assert main(["generate", str(folder), "--chat", "--system", "hello", *SHORT]) == 0
    out, err = capsys.readouterr()
    system, (one, two, three) = ("system", "hello"), [("user", line) for line in lines]
    first = answer(folder, system, one)
    second = answer(folder, system, one, ("assistant", first), two)
    third = answer(folder, system, two, ("assistant", second), three)
    assert out == f"{first}\n{second}\n{third}\n"
    assert err == "the context of 256 tokens is full: the oldest turn is forgotten\n"
    typed(monkeypatch, "the cat\n" + "Q" * 300)
    assert main(["generate", str(folder), "--chat", *SHORT]) == 2
    out, err = capsys.readouterr()
    assert out == f"{answer(folder, ('user', 'the cat'))}\n"
    assert "tokens; the model's context of 256 has room for 250 beside an answer" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "PROMPT is missing: a text to continue, or --chat to talk line by line"),
        (["a", "--system", "b"], "--system: the begin of a chat; give --chat, too"),
        (["a", "--special", "--chat"], "--special: with --chat the template makes all special tokens"),
    ],
)
def test_options_that_do_not_go_together(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["generate", str(folder), *words]) == 2
    assert said in capsys.readouterr().err


def test_what_is_no_text_and_what_has_no_template(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, b"a\xff\n")
    assert main(["generate", str(folder), "--chat"]) == 2
    assert "standard input: it is no text in utf-8 (invalid start byte)" in capsys.readouterr().err
    plain = published("byte_level", tmp_path / "plain")
    typed(monkeypatch, "a\n")
    for words in (["--chat"], ["--chat", "a"]):
        assert main(["generate", str(plain), *words]) == 2
        assert "messages, which this tokenizer has no chat template for" in capsys.readouterr().err


@pytest.mark.parametrize("leave", ["\x04", "\x03"])
def test_on_a_terminal(folder: Path, leave: str) -> None:
    """It asks for each line, says what is wrong with one, and Ctrl-D and Ctrl-C end it as they should."""
    ours, theirs = pty.openpty()
    words = ["-m", "colossus", "generate", str(folder), "--chat", *SHORT]
    process = subprocess.Popen(
        [sys.executable, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    shown = ""

    def wait_for(text: str) -> str:
        """Reads on, to behind the text; what stood before it."""
        nonlocal shown
        while text not in shown:
            assert select.select([ours], [], [], 120)[0], shown
            shown += os.read(ours, 4096).decode()
        before, _, shown = shown.partition(text)
        return before

    wait_for("> ")
    os.write(ours, ("Q" * 300 + "\n").encode())
    wait_for("beside an answer")
    wait_for("> ")
    os.write(ours, b"the cat\n")
    said = wait_for("> ")  # in the type that is the quickest as the other process measured it
    answers = [answer(folder, ("user", "the cat"), type=type) for type in ("fp32", "bf16")]
    assert any(text.splitlines()[0] in said for text in answers), (said, answers)
    if leave == "\x03":  # without a controlling terminal no signal is made of it
        time.sleep(1)  # a signal between the prompt and readline's wait is seen with the next key alone
        process.send_signal(signal.SIGINT)
    else:
        os.write(ours, leave.encode())
    assert process.wait(60) == 0
    os.close(ours)
