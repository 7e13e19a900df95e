"""Small real runs: a corpus of bytes, a model of a few thousand weights, processes that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from colossus import api
from colossus.job import Job, load_job
from colossus.trainer.hooks import Hook
from colossus.trainer.run import Run

SMALL = [
    "data.tokenizer=bytes",
    "data.seq_len=32",
    "data.validation_fraction=0.2",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=16",
    "model.intermediate_size=64",
    "run.global_batch=4",
    "run.steps=12",
    "run.threads=1",
    "run.validate_every=5",
    "checkpoint.steps=4",
    "checkpoint.keep=2",
    "precision.type=fp32",
    "layout.compile=false",
    "optimizer.warmup_steps=2",
    "optimizer.lr=0.003",
]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["torch", "colossus.trainer.loop", "torch.distributed.fsdp", "colossus.launcher.local"]
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some forty documents of words in an order that can be learned."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [
        "the",
        "run",
        "goes",
        "on",
        "from",
        "the",
        "last",
        "whole",
        "checkpoint",
        "and",
        "no",
        "step",
        "is",
        "lost",
    ]
    for n in range(40):
        text = " ".join(words[(n * 3 + i * i) % len(words)] for i in range(60 + n))
        (folder / f"{n:02}.txt").write_text(text)
    return folder


@pytest.fixture
def small_job(corpus: Path, tmp_path: Path) -> Callable[..., Job]:
    """Resolves a small job in `tmp_path / name` with overrides on top."""

    def make(name: str, *overrides: str) -> Job:
        places = [
            f"data.corpus={corpus}",
            f"data.folder={tmp_path / 'shards'}",
            f"run.folder={tmp_path / name}",
        ]
        names = {o.partition("=")[0] for o in overrides}
        base = [o for o in SMALL if o.partition("=")[0] not in names]
        if names & {"run.minutes", "run.tokens"}:
            base.remove("run.steps=12")
        return api.resolve(load_job(None, [*base, *places, *overrides]))

    return make


def train_in_processes(job: Job, hooks: Sequence[Hook] = ()) -> list[int]:
    """Trains in one real process a rank; returns their exit codes (-9: killed)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = job.layout.num_ranks
    started = [
        _processes.Process(target=_rank, args=(job, list(hooks), rank, ranks, port), daemon=True)
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=120)
        if process.exitcode not in (0, None):  # a rank fell: the others wait for it in vain
            for other in started:
                other.kill()
        if process.is_alive():
            process.kill()
            process.join()
    return [p.exitcode if p.exitcode is not None else -9 for p in started]


def _rank(job: Job, hooks: list[Hook], rank: int, ranks: int, port: int) -> None:
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    api.train(job, hooks)


def losses(job: Job) -> dict[int, float]:
    """Step -> loss of the run that `job` describes."""
    return Run(Path(job.run.folder)).loss
