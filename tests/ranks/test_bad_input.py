"""What is wrong with a layout or with the ranks that came is said once, within seconds, by real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, colossus

SMALL = ["data.tokenizer=bytes", "data.seq_len=32", "model.hidden_size=32", "model.num_layers=4",
         "model.num_heads=4", "run.steps=2", "run.global_batch=8", "layout.compile=false"]  # fmt: skip
IMPATIENT = """
import sys

from colossus.parallel import meeting
meeting.PATIENCE_SECONDS = float(sys.argv.pop(1))
from colossus.cli import main
sys.exit(main())
"""


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"line {n} of a short corpus\n" for n in range(2000)))
    return [*SMALL, f"data.corpus={corpus}", f"run.folder={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (["layout.tp=3"], "layout.tp=3: must divide the 4 attention heads; 2"),
        (["layout.dp_shard=2", "layout.ep=2"], "layout.ep=2: the model has no experts; 1"),
    ],
)
def test_an_illegal_layout_is_refused_before_ranks_start(
    layout: list[str], message: str, job: list[str], tmp_path: Path
) -> None:
    done = colossus("train", *job, *layout, folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count(message) == 1
    assert not (tmp_path / "run").exists()


def start(rank: int, size: int, port: int, words: list[str], patience: int) -> subprocess.Popen[str]:
    """One rank in torchrun's environment. patience: seconds that it waits, and one more a rank."""
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-c", IMPATIENT, str(patience), "train", *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(ranks: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and errors of each."""
    end = time.monotonic() + 120
    try:
        said = [rank.communicate(timeout=max(1.0, end - time.monotonic()))[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_world_of_the_wrong_size(job: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    words = [*job, "layout.dp_shard=2"]
    codes, texts = zip(*ended([start(rank, 3, port, words, 60) for rank in range(3)]), strict=True)
    assert codes == (2, 2, 2)
    assert texts[0].startswith("error: layout: needs 2 ranks") and "but 3 were started" in texts[0]
    assert texts[1:] == ("", "")


def test_a_missing_rank(job: list[str]) -> None:
    port = free_port()
    words = [*job, "layout.dp_shard=3"]
    (code, said), (other_code, other_said) = ended([start(rank, 3, port, words, 5) for rank in (0, 1)])
    assert code == other_code == 3
    assert said.splitlines()[-1] == "error: rank 2 of 3 did not come in 5 s; is each process started?"
    assert "Traceback" not in other_said


def test_a_missing_first_rank(job: list[str]) -> None:
    port = free_port()
    ((code, said),) = ended([start(1, 2, port, [*job, "layout.dp_shard=2"], 1)])
    assert code == 3
    assert said.splitlines()[-1] == (
        f"error: rank 1: rank 0 does not answer at 127.0.0.1:{port}; is its process started?"
    )
