"""`colossus train --dry` refuses what `train` would before its first step, in the same words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from colossus.cli import main
from colossus.derive.machine import RANK_BYTES, check_ranks
from colossus.errors import UserError
from colossus.hardware.machine import Gpu
from colossus.job import load_job
from colossus.measure.machine import memory_bytes
from tests.derive.machines import machine
from tests.trainer.conftest import SMALL
from tests.trainer.running import kept_machine


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLOSSUS_CACHE", kept_machine())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for n in range(20):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"def f{n}(x): return x + {n}\n" * 10)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to("nowhere/at/all")
    return tmp_path


def contents(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


REFUSED = [
    (["data.weights=[0]"], "data.weights=[0]: must be numbers of at least 0, one above 0"),
    (['data.corpus=["texts","texts"]', "data.weights=[0,0.0]"], "data.weights=[0, 0.0]: must be numbers"),
    (["data.phases=[{from_step=2,weights=[0]}]"], "data.phases.0.weights=[0]: must be numbers"),
    (["run.folder=/dev/null"], "run.folder=/dev/null: a part of this path is a file"),
    (["run.folder=file/run"], "run.folder=file/run: a part of this path is a file"),
    (["run.folder=/proc/run"], "run.folder=/proc/run: cannot be written"),
    (["run.folder=mine"], "run.folder=mine: not empty, and not the folder of a run"),
    (["run.folder=" + "n" * 300], "cannot be written (File name too long)"),
    (["data.folder=/dev/null"], "data.folder=/dev/null: cannot be written (Not a directory)"),
    (["data.folder=file/data"], "data.folder=file/data: cannot be written"),
    (["data.folder=/proc/data"], "data.folder=/proc/data: cannot be written"),
    (["data.folder=mine"], "data.folder=mine: not empty, and holds no token shards but thesis.tex"),
    (["data.folder=gone"], "data.folder=gone: cannot be written"),
    (["data.corpus=nothing"], "data.corpus=nothing: empty"),
    (["data.tokenizer=file", "model.vocab_size=300"], "data.tokenizer=file: not a tokenizer.json"),
    (["model.vocab_size=2"], "model.vocab_size=2: the tokenizer bytes has 258 tokens; at least 258"),
    (["model.vocab_size=257", "data.tokenizer=bpe"], "the tokenizer bpe has at least 258 tokens"),
    (["layout.dp_shard=100000"], f"at most {memory_bytes() // RANK_BYTES}"),
    (["layout.pp=70000", "layout.dp_shard=2"], f"at most {memory_bytes() // RANK_BYTES // 2}"),
    (["layout.micro_batch=64", "run.global_batch=4"], "layout.micro_batch=64: more than a rank's share"),
    (["layout.tp=3"], "layout.tp=3: must divide the "),
    (["run.threads=4096"], "run.threads=4096: more than this machine's cores"),
    (["run.hooks=no_such_module:Hook"], "cannot be imported (No module named 'no_such_module')"),
    (["run.hooks=nameless"], "run.hooks=nameless: must be package.module:Name"),
    (["data.corpus=no_such_module:documents"], "cannot be imported (No module named 'no_such_module')"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_train_refuses(
    words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(here)
    job = [*SMALL, "data.corpus=texts", "data.folder=data", "run.folder=run", *words]
    code = main(["train", "--dry", *job])
    dry = capsys.readouterr()
    assert code in (2, 3) and dry.out == "" and said in dry.err and dry.err.count("\n") == 1
    assert contents(here) == before
    assert main(["train", *job]) == code
    assert capsys.readouterr().err == dry.err


def test_nothing_is_built_and_what_is_there_is_looked_at(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = [*SMALL, "data.corpus=texts", "data.folder=data", "run.folder=run"]
    before = contents(here)
    assert main(["train", "--dry", *job]) == 0
    assert contents(here) == before
    assert main(["data", "build", *job]) == 0
    capsys.readouterr()
    long = [*job, "data.seq_len=100000", "model.max_seq_len=100000", "run.steps=1"]
    assert main(["train", "--dry", *long]) == 2
    dry = capsys.readouterr().err
    assert "data.seq_len=100000: the corpus has only" in dry
    assert main(["train", *long]) == 2 and capsys.readouterr().err.endswith(dry)


def test_a_gpu_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine with two of them, as it may be measured."""
    two = dataclasses.replace(machine(), gpus=(Gpu("made up", 2**34, 1e14),) * 2)
    job = load_job(None, ["layout.dp_shard=3", "fleet.device=cuda"])
    job = job.derive(**{f"layout.{axis}": 1 for axis in ("dp_replicate", "tp", "pp", "cp")})
    with pytest.raises(UserError, match=r"layout\.dp_shard=3: 3 ranks .* 2 GPUs, .* takes one; at most 2"):
        check_ranks(job, two)
    check_ranks(job.put({"layout.dp_shard": 2}, "argument"), two)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the third is on another machine
    check_ranks(job, two)
