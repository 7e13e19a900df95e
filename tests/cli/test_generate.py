"""`colossus generate` as a person runs it: every option reaches what writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colossus import api
from colossus.cli import main
from tests.cli.test_train import small_words
from tests.trainer.running import kept_machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLOSSUS_CACHE", kept_machine())
        api.train(api.resolve(api.load_job(None, small_words(folder)[1:])))
    return folder / "run"


def written(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    assert main(["generate", str(folder), *words]) == 0
    return capsys.readouterr().out


def test_prompts_are_continued_in_their_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = written(capsys, folder, "def f1", "return", "--max-tokens", "5")
    first, second = (written(capsys, folder, prompt, "--max-tokens", "5") for prompt in ("def f1", "return"))
    assert out == first + second and first.startswith("def f1") and second.startswith("return")


@pytest.mark.parametrize(
    ("option", "strong", "none"),
    [
        ("max_tokens", "3", "24"),
        ("temperature", "5", "0"),
        ("top_k", "1", "258"),
        ("top_p", "0.001", "1"),
        ("min_p", "1", "0"),
        ("repetition_penalty", "1e9", "1"),
        ("seed", "7", "0"),
    ],
)
def test_options(
    option: str, strong: str, none: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `colossus.generate` takes them; what each does is tested there."""
    drawn = option in ("top_k", "top_p", "min_p", "seed")
    usual = {"max_tokens": "24", "temperature": "3" if drawn else "0", "seed": "0"}
    model, tokenizer = api.load_model(folder, "quickest")
    found = []
    for value in (strong, none):
        asked = usual | {option: value}
        words = [word for name, text in asked.items() for word in (f"--{name.replace('_', '-')}", text)]
        whole = ("max_tokens", "top_k", "seed")
        sampling = {name: int(text) if name in whole else float(text) for name, text in asked.items()}
        (expected,) = api.generate(model, tokenizer, ["def "], **sampling)
        assert written(capsys, folder, "def ", *words) == f"def {expected}\n"
        found.append(expected)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"\n\n", "\n\n"), (r"a\tb", "a\tb"), (r"\\n", r"\n"), (r"\d+\n", "\\d+\n"), ("\n", "\n"), ("\\", "\\")],
)
def test_a_line_s_end_to_stop_before_as_it_is_typed(
    typed: str, meant: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(api, "generate", lambda *_, **given: (asked.append(given["stop"]), ["x"])[1])
    written(capsys, folder, "def ", "--stop", typed, "--stop", "plain")
    assert asked == [[meant, "plain"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "nan"], "temperature=nan: must be a number, 0 (the likeliest token) or more"),
        (["--seed", "-1"], "seed=-1: must be a whole number, 0 to 9223372036854775807"),
        (["--seed", str(2**64)], "seed=18446744073709551616: must be a whole number"),
        (["--max-tokens", "-1"], "max_tokens=-1: must be a whole number, 0 or more"),
        (["--stop", ""], "stop[0]='': expected a text of one character or more"),
        (["a\udcff"], "character 1 is U+DCFF, half of a surrogate pair"),
    ],
)
def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["generate", str(folder), "def ", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_text_to_stop_before(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = written(capsys, folder, "def ", "--max-tokens", "24").removeprefix("def ").removesuffix("\n")
    stop = whole[4:7]
    before = whole[: whole.index(stop)]
    assert written(capsys, folder, "def ", "--max-tokens", "24", "--stop", stop) == f"def {before}\n"
