"""`colossus eval` as a person runs it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from colossus import api
from colossus.cli import main
from colossus.trainer.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLOSSUS_CACHE", str(folder / "cache"))
        for name in ("texts", "others"):
            (folder / name).mkdir()
            for n in range(6):
                (folder / name / f"{n}.txt").write_text(f"{name} of number {n}\n" * (n + 3))
        settings = (
            "data.tokenizer=bytes data.seq_len=64 model.hidden_size=32 run.steps=3 layout.compile=false"
        )
        places = [f"data.corpus={folder / 'texts'}", f"run.folder={folder / 'run'}"]
        api.train(api.load_job(None, [*settings.split(), *places, "precision.type=fp32"]))
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLOSSUS_CACHE", str(folder / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # the verb takes what the machine is quickest with


def test_what_the_run_held_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "run", "--type", "fp32"]) == 0
    out, err = capsys.readouterr()
    last = Run(folder / "run").events("validation")[-1]
    heads, row = out.splitlines()[2:4]
    assert err == "" and heads.split()[:6] == ["corpus", "documents", "text", "window", "loss", "bits/byte"]
    assert row.startswith(f"held out of {folder / 'texts'}")
    assert f"{last['loss']:.4f}  {last['bits_per_byte']:>9.3f}" in row


def test_corpora_and_their_figures_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--corpus", "others", "--corpus", "texts", "--documents", "2", "--type", "fp32"]
    assert main(["eval", "run", *words, "--json", "out.json"]) == 0
    out, _ = capsys.readouterr()
    rows = [line for line in out.splitlines() if line.startswith(("others", "texts"))]
    assert len(rows) == 2 and all("  2, a part  " in row for row in rows)
    report = json.loads(Path("out.json").read_text())
    model, tokenizer = api.load_model("run")
    for found, name in zip(report["corpora"], ["others", "texts"], strict=True):
        expected = api.evaluate(model, tokenizer, name, documents=2)
        assert found["corpus"] == name and found["loss"] == pytest.approx(expected.result.loss, rel=1e-5)
        assert found["num_documents"] == 2 and not found["whole"]
        assert f"{found['bits_per_byte']:.3f}" in out
    assert (report["type"], report["tasks"], report["path"]) == ("fp32", [], "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-run"], "did you mean"),
        (["texts"], "neither a run"),
        (["run", "--corpus", "othrs"], "did you mean 'others'?"),
        (["run", "--limit", "3"], "--limit: is for tasks"),
        (["run", "--tasks", ","], "--tasks: names no task"),
        (["run", "--json", "none/out.json"], "--json=none/out.json: no such folder"),
        (["run", "--type", "fp61"], "precision.type=fp61: must be one of fp32, bf16; did you mean 'fp32'?"),
        (["run", "--seq-len", "65"], "seq_len=65: must be from 2 to 64"),
        (["run", "--sql-len", "65"], "No such option: --sql-len"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the extra is installed")
def test_without_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "run", "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err == "error: --tasks: needs the extra: pip install 'colossus-train[eval]'\n"
