"""`colossus data build` and `colossus data show`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from colossus.cli import main
from colossus.data.build import open_split
from colossus.words import percent, plural, size
from tests.data.building import write_corpus

CHAT = """
def Chat():
    for i in range(60):
        yield [(f"question {i}? ", False), (f"answer {i}.", True)]
"""
SMALL = [
    "data.tokenizer=bytes",
    "data.seq_len=64",
    "model.hidden_size=32",
    "model.num_layers=1",
    "run.global_batch=3",
    "run.steps=10",
    "run.threads=1",
    "precision.type=fp32",
    "layout.compile=false",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "text")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    code = main(["data", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_build_says_what_it_built(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "junk").write_bytes(b"\xff\xfe\0")
    words = (f"data.corpus={corpus}", "data.tokenizer=bytes", f"data.folder={tmp_path / 'out'}")
    code, out, err = run(capsys, "build", *words, "--verify")
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith((" ", "held")))
    assert lines["shards"] == str(tmp_path / "out")
    assert lines["tokenizer"] == "bytes, 258 tokens"
    assert lines["corpus"] == str(corpus)
    assert "files that are not text, left out: 1 (junk)" in out
    total = sum(path.stat().st_size for path in corpus.glob("*.txt"))
    assert f"{total / (total + 2 * 60):.2f} bytes a token" in lines["learned"]
    assert lines["verified"].startswith("every byte of")
    assert run(capsys, "build", *words)[1] == out.rpartition("verified")[0]  # at once, and the same


def test_build_says_which_share_is_held_out(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (f"data.corpus={corpus}", "data.tokenizer=bytes", f"data.folder={tmp_path / 'out'}")
    code, out, _ = run(capsys, "build", *words, "data.validation_fraction=0.4")
    assert code == 0
    total = sum(path.stat().st_size for path in corpus.glob("*.txt"))
    splits = [open_split(tmp_path / "out", 0, side) for side in ("train", "validation")]
    assert sum(split.num_bytes for split in splits) == total
    share = percent(splits[1].num_bytes / total)
    documents = (
        f"{plural(splits[1].num_documents, 'document')}, {size(splits[1].num_bytes)} of text ({share})"
    )
    assert f"held out  {documents}\n" in out


def test_build_sees_a_flipped_bit(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (f"data.corpus={corpus}", "data.tokenizer=bpe", f"data.folder={tmp_path / 'out'}")
    assert run(capsys, "build", *words)[0] == 0
    for path, message in (
        (tmp_path / "out" / "corpus-0" / "train-00000.bin", "train-00000.bin: its bytes changed"),
        (tmp_path / "out" / "tokenizer" / "tokenizer.json", "tokenizer: changed since the shards were built"),
    ):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"Q", b"q", 1) if path.suffix == ".json" else b"\1" + whole[1:])
        code, _, err = run(capsys, "build", *words, "--verify")
        assert code == 2
        assert message in err
        path.write_bytes(whole)
    assert run(capsys, "build", *words, "--verify")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.corpus=/nowhere/at/all"], "data.corpus=/nowhere/at/all: no such file or folder"),
        (["data.corpsu=x"], "did you mean 'data.corpus'"),
        (["data.tokenizer=/no/tokenizer.json"], "data.tokenizer=/no/tokenizer.json: cannot be read"),
        (["data.validation_fraction=1.5"], "data.validation_fraction=1.5"),
        (["data.weights=[1,2]"], "data.weights=[1.0, 2.0]: 2, and 1 in data.corpus=['python']; one for each"),
    ],
)
def test_build_of_what_cannot_be(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "build", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_show_tells_what_a_step_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text in its documents; what is not learned stands in brackets."""
    (tmp_path / "chats.py").write_text(CHAT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = [*SMALL, "data.corpus=chats:Chat", f"data.folder={tmp_path / 'out'}"]
    code, out, err = run(capsys, "show", *words, "--step", "4", "--rows", "2")
    assert (code, err) == (0, "")
    assert out.startswith("step 4: 3 samples of 64 tokens\n")
    assert "sample 12: chats:Chat, epoch 0, window " in out
    assert "sample 13: chats:Chat" in out
    assert "sample 14" not in out
    assert out.rstrip().endswith("and 1 more sample: --rows 3")
    assert "── document ──\n⟪question " in out
    shown = out.partition("window")[2]
    assert "? ⟫answer " in shown
    learned = "".join(part.partition("⟫")[2] for part in shown.split("⟪"))
    assert "question" not in learned
    assert run(capsys, "show", *words, "--step", "4", "--rows", "2")[1] == out
    assert run(capsys, "show", *words, "--step", "5", "--rows", "2")[1] != out


def test_show_without_a_mask(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, f"data.corpus={corpus}", f"data.folder={tmp_path / 'out'}"]
    code, out, _ = run(capsys, "show", *words)
    assert code == 0
    assert out.count("every next token learned") == 3
    assert "⟪" not in out
    text = out.split("learned\n")[1].partition("\n\nsample")[0]
    assert len(text.replace("── document ──\n", "")) >= 60
    assert "line " in text


def test_show_of_a_later_phase(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, f"data.corpus={corpus}", f"data.folder={tmp_path / 'out'}"]
    words.append("data.phases=[{from_step=2, seq_len=32}]")
    for step, tokens in ((1, 64), (2, 32), (3, 32)):
        code, out, err = run(capsys, "show", *words, "--step", str(step))
        assert (code, err) == (0, "")
        assert out.startswith(f"step {step}: 3 samples of {tokens} tokens\n")
        text = out.split("learned\n")[1].partition("\n\nsample")[0].replace("── document ──\n", "")
        assert tokens - 4 <= len(text) <= tokens + 1


def test_show_of_no_such_step(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "show", "--step", "-1")
    assert code == 2
    assert "--step" in err


def test_chats_are_shown_with_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The end of an answer too, though it is the token that ends documents."""
    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for i in range(60):
            turns = [("user", f"question {i}?"), ("assistant", f"answer {i}.")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    words = [*SMALL, f"data.corpus={path}", f"data.folder={tmp_path / 'out'}"]
    code, out, err = run(capsys, "build", *words, "--verify")
    assert (code, err) == (0, "")
    assert out.count("no chat template with the tokenizer") == 1
    assert re.search(r"learned .* tokens \(\d+% of them learned\)", out)
    code, out, err = run(capsys, "show", *words, "--rows", "3")
    assert (code, err) == (0, "")
    shown = "── document ──\n⟪<|bos|>user\nquestion 7?<|eos|><|bos|>assistant\n⟫answer 7.<|eos|>"
    assert re.sub(r"\d+", "7", shown) in re.sub(r"\d+", "7", out)
