"""The processes of a build: how they begin and end, and what they share."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from colossus.data import build as building
from colossus.data import encode, prepare
from colossus.data.build import build, corpus_folder, open_split
from colossus.data.open import open_corpus
from colossus.data.split import Split
from colossus.data.workers import encode_in_worker
from colossus.errors import MachineError, UserError
from colossus.hardware import machine
from colossus.job import load_job
from tests.data.building import BUILDER, built, contents, in_memory, request_for, start_build, write_corpus


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_in_parallel_as_in_series(tmp_path: Path, tokenizer: str) -> None:
    text = write_corpus(tmp_path / "text")
    for workers in (1, 3):
        built(tmp_path / str(workers), text, workers=workers, tokenizer=tokenizer)
    assert len(open_split(tmp_path / "1", 0, "train").shards) > 5
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.usefixtures("small_shards")
def test_the_tokenizer_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each process, however many shards it makes; of each build its own, also in the place of another."""
    text = write_corpus(tmp_path / "text")
    loaded: list[Path] = []
    load = encode.load_tokenizer
    monkeypatch.setattr(encode, "load_tokenizer", lambda folder: loaded.append(folder) or load(folder))
    num_tokens = []
    for tokenizer in ("bpe", "bytes"):
        train, _ = built(tmp_path / "out", text, tokenizer=tokenizer)
        num_tokens.append(train.num_tokens)
        assert len(train.shards) > 5
        assert len(loaded) == len(num_tokens)
        (tmp_path / "out").rename(tmp_path / tokenizer)
    assert num_tokens[0] < num_tokens[1] / 2

    parts = open_corpus(str(text)).parts[:3]
    (tmp_path / "shards").mkdir()
    folders = (tmp_path / "shards", tmp_path / "bpe" / "tokenizer")
    for n, part in enumerate(parts):  # as a worker does
        encode_in_worker(encode.Task(n, (part,), *folders, Split(0), "uint16", False, False, False))
    assert len(loaded) == 3


def test_workers_end_with_the_build_that_started_them(tmp_path: Path) -> None:
    """They do not go on to write beside the next build."""
    text = write_corpus(tmp_path / "text", num=400, size=20_000)
    builder = start_build(text, tmp_path / "out", "bytes", 2)
    while not [*corpus_folder(tmp_path / "out", 0).glob("part-*.json")]:
        assert builder.poll() is None
        time.sleep(0.005)
    workers = Path(f"/proc/{builder.pid}/task/{builder.pid}/children")
    if not workers.exists():
        builder.kill()
        pytest.skip("the system does not tell who has which children")
    children = [int(pid) for pid in workers.read_text().split()]
    assert len(children) >= 2
    builder.kill()
    builder.wait()
    deadline = time.monotonic() + 5
    while any(_lives(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker outlives its build"
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.usefixtures("small_shards")
def test_a_worker_that_is_killed_is_said_and_the_next_build_goes_on(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text", num=40)
    corpus = open_corpus(str(text))
    victim = dataclasses.replace(corpus.parts[20], read=KillsOnce(str(tmp_path / "killed"), corpus.parts[20]))
    parts = (*corpus.parts[:20], victim, *corpus.parts[21:])
    request = request_for(dataclasses.replace(corpus, parts=parts), workers=2)
    with pytest.raises(MachineError, match=r"a process of the build was killed .*run it again to go on"):
        build(request, tmp_path / "out")
    build(request, tmp_path / "out")
    built(tmp_path / "whole", text)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@dataclasses.dataclass(frozen=True)
class KillsOnce:
    """Reads a part, but kills the worker that does so first."""

    flag: str
    part: building.Part

    def __call__(self) -> Iterator[object]:
        import multiprocessing

        if multiprocessing.parent_process() is not None and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.part.read()


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """What calls for a build at its top is not run once more in every worker."""
    text = write_corpus(tmp_path / "text")
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; print('here'); sys.argv[1:] = {[str(text), str(tmp_path / 'out'), 'bytes', '2']}\n"
        + BUILDER
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=_with_path())
    assert done.returncode == 0, done.stderr
    assert done.stdout == "here\n"
    assert len(open_split(tmp_path / "out", 0, "train").shards) > 1


def _with_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_no_worker_loads_torch(tmp_path: Path) -> None:
    program = (
        "import sys; import colossus.data.build, colossus.data.workers, colossus.data.encode; "
        "assert not {'torch', 'datasets', 'pyarrow', 'rich'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_bad_text_in_a_worker_is_said_as_it_is(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.jsonl").write_text('{"text": "good"}\n' * 3 + ('{"text": 3}\n' if i == 2 else ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "SHARD_BYTES", 10)
        with pytest.raises(UserError, match=r"data\.text_field=text: no text under this name at .*2\.jsonl"):
            built(tmp_path / "out", text, workers=2)


def test_a_container_s_share_of_the_cores_bounds_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "text.txt").write_text("text")
    asked: list[int] = []

    def stop_here(request: building.Request, *_: object) -> None:
        asked.append(request.workers)
        raise UserError("enough")

    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(prepare, "build", stop_here)
    values = [f"data.corpus={tmp_path / 'text.txt'}", "data.weights=1", "data.tokenizer=bytes"]
    values += ["data.text_field=text", "data.validation_fraction=0.1", "model.vocab_size=258"]
    with pytest.raises(UserError, match="enough"):
        prepare.prepare_data(load_job(None, values))
    assert asked == [1]


@dataclasses.dataclass(frozen=True)
class Late:
    """The documents of a part, after a while."""

    seconds: float
    text: str

    def __call__(self) -> Iterator[str]:
        time.sleep(self.seconds)
        yield self.text


def test_shards_lie_in_the_order_of_the_text_whichever_worker_is_done_first(tmp_path: Path) -> None:
    """The second part is read last: all others are done before it."""
    texts = [f"document {i}" for i in range(8)]
    parts = tuple(building.Part(text, 0, Late(2.0 if i == 1 else 0.0, text)) for i, text in enumerate(texts))
    corpus = dataclasses.replace(in_memory(texts), parts=parts)
    built(tmp_path / "out", corpus, workers=2)
    quick = tuple(building.Part(text, 0, Late(0.0, text)) for text in texts)
    built(tmp_path / "whole", dataclasses.replace(corpus, parts=quick))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
