"""Small real runs: a corpus of bytes, a model of a few thousand weights."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from colossus import api
from colossus.job import Job, load_job
from tests.trainer.running import kept_machine

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


class Reached(BaseException):
    """A signal that nothing caught before."""


@pytest.fixture
def signals() -> Iterator[None]:
    """For a test that sends signals to pytest: one that isn't caught fails the test, no more."""

    def fail(number: int, frame: object) -> None:
        raise Reached(signal.Signals(number).name)

    before = {number: signal.signal(number, fail) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def one_machine() -> Iterator[None]:
    """This process and the ranks that it starts know the machine from one table: kernels that were timed
    apart may differ, and with them the bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLOSSUS_CACHE", kept_machine())
        yield


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
        "no",
        "step",
        "is",
        "lost",
    ]
    for n in range(40):
        text = " ".join(words[(n * 3 + i * i) % len(words)] for i in range(60 + n))
        (folder / f"{n:02}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first run of all builds the shards that the others read."""
    return tmp_path_factory.mktemp("shards") / "data"


@pytest.fixture
def small_job(corpus: Path, shards: Path, tmp_path: Path) -> Callable[..., Job]:
    """Resolves a small job in `tmp_path / name` with overrides on top."""

    def make(name: str, *overrides: str) -> Job:
        places = [
            f"data.corpus={corpus}",
            f"data.folder={shards}",
            f"run.folder={tmp_path / name}",
        ]
        names = {o.partition("=")[0] for o in overrides}
        base = [o for o in [*SMALL, *places] if o.partition("=")[0] not in names]
        if names & {"run.minutes", "run.tokens"}:
            base.remove("run.steps=12")
        return api.resolve(load_job(None, [*base, *overrides]))

    return make
