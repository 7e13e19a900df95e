"""Builds: the same bytes however they come about, nothing that loads before the end, clear errors."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from colossus.data import build as building
from colossus.data import prepare
from colossus.data.build import build, corpus_folder, is_built, open_split
from colossus.data.corpus import open_corpus
from colossus.errors import MachineError, UserError
from colossus.hardware import machine
from colossus.job import load_job
from tests.data.building import built, contents, in_memory, request_for, write_corpus

BUILDER = """
import sys
from pathlib import Path
from colossus.data import build as building
from tests.data.building import request_for
building.SHARD_BYTES = 10_000
text, out, tokenizer, workers = sys.argv[1:]
building.build(request_for(text, workers=int(workers), tokenizer=tokenizer), Path(out))
"""


def start(text: Path, out: Path, tokenizer: str, workers: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", BUILDER, str(text), str(out), tokenizer, str(workers)]
    return subprocess.Popen(words, stderr=subprocess.PIPE)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_in_parallel_as_in_series(tmp_path: Path, tokenizer: str) -> None:
    text = write_corpus(tmp_path / "text")
    for workers in (1, 3):
        built(tmp_path / str(workers), text, workers=workers, tokenizer=tokenizer)
    assert len(open_split(tmp_path / "1", 0, "train").shards) > 5
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def wait_for_corpus(folder: Path, patience_seconds: float = 60.0) -> None:
    """Until a build has begun to write a corpus."""
    deadline = time.monotonic() + patience_seconds
    while not corpus_folder(folder, 0).is_dir():
        assert time.monotonic() < deadline, "the build never began"
        time.sleep(0.001)


@pytest.mark.parametrize(("tokenizer", "workers"), [("bytes", 1), ("bpe", 2)])
def test_killed_at_any_instant(tmp_path: Path, tokenizer: str, workers: int) -> None:
    """Nothing loads; and the build that follows takes up what was finished and ends with the same bytes."""
    text = write_corpus(tmp_path / "text", num=80)
    undisturbed = start(text, tmp_path / "whole", tokenizer, workers)
    wait_for_corpus(tmp_path / "whole")
    began = time.perf_counter()
    assert undisturbed.wait() == 0
    usual = (
        time.perf_counter() - began
    )  # of encoding: imports come before, and take most of a build this small
    whole = contents(tmp_path / "whole")
    draw = random.Random(f"{tokenizer} {workers}")
    unfinished = 0
    for life in range(2):
        out = tmp_path / f"life-{life}"
        for _ in range(2):
            builder = start(text, out, tokenizer, workers)
            wait_for_corpus(out)
            time.sleep(draw.random() * usual * 0.6)
            builder.kill()
            builder.wait()
            manifest = corpus_folder(out, 0) / "manifest.json"
            if not manifest.exists():
                unfinished += 1
                with pytest.raises(UserError, match="no token shards here"):
                    open_split(out, 0, "train")
        assert start(text, out, tokenizer, workers).wait() == 0
        assert contents(out) == whole
    assert unfinished >= 2, "every kill came too late to show anything"


@pytest.mark.usefixtures("small_shards")
def test_what_was_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from colossus.data import workers

    text = write_corpus(tmp_path / "text")
    built(tmp_path / "whole", text)
    done: list[int] = []
    encode = workers.encode_task

    def encode_five(task: building.Task) -> object:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(task.index)
        return encode(task)

    monkeypatch.setattr(workers, "encode_task", encode_five)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "out", text)
    assert done == [0, 1, 2, 3, 4]
    done.clear()
    monkeypatch.setattr(workers, "encode_task", lambda task: done.append(task.index) or encode(task))
    progress: list[tuple[int, int]] = []
    request = request_for(text)
    build(request, tmp_path / "out", lambda at, total: progress.append((at, total)))
    assert min(done) == 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    total = request.corpora[0].num_bytes
    assert progress == sorted(progress)
    assert {all_bytes for _, all_bytes in progress} == {total}
    assert progress[-1] == (total, total)
    done.clear()
    build(request, tmp_path / "out")
    assert not done


def test_workers_end_with_the_build_that_started_them(tmp_path: Path) -> None:
    """They do not go on to write beside the next build."""
    text = write_corpus(tmp_path / "text", num=400, size=20_000)
    builder = start(text, tmp_path / "out", "bytes", 2)
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


def test_a_folder_of_another_request_is_refused(tmp_path: Path) -> None:
    one, other = write_corpus(tmp_path / "one", num=5), write_corpus(tmp_path / "other", num=6)
    built(tmp_path / "out", one)
    before = contents(tmp_path / "out")
    message = r"data\.folder=.*out: holds other data .*one.*; name another folder"
    for request in (
        request_for(other),
        request_for(one, tokenizer="bpe"),
        request_for(one, held_out=0.3),
        request_for(one, other),
    ):
        with pytest.raises(UserError, match=message):
            build(request, tmp_path / "out")
    (one / "000.txt").write_text("changed")
    with pytest.raises(UserError, match=message):
        build(request_for(one), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_claim_that_cannot_be_read(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text", num=5)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "request.json").write_text("{")
    with pytest.raises(UserError, match=r"request\.json: cannot be read"):
        built(tmp_path / "out", text)


def test_several_corpora_share_a_tokenizer(tmp_path: Path) -> None:
    one, other = write_corpus(tmp_path / "one", num=9), write_corpus(tmp_path / "other", num=7)
    request = request_for(one, other, tokenizer="bpe")
    build(request, tmp_path / "out")
    assert is_built(request, tmp_path / "out")
    manifests = [open_split(tmp_path / "out", i, "train").manifest for i in range(2)]
    assert [m["corpus"]["name"] for m in manifests] == [str(one), str(other)]
    assert manifests[0]["tokenizer"] == manifests[1]["tokenizer"]


def test_the_key_names_the_result(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text", num=5)
    request = request_for(text)
    assert dataclasses.replace(request, workers=7, vocab_size=999).key == request.key  # of plain bytes
    bpe = dataclasses.replace(request, tokenizer="bpe")
    assert len({request.key, bpe.key, dataclasses.replace(bpe, vocab_size=999).key}) == 3
    assert dataclasses.replace(request, held_out=0.2).key != request.key


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(small_disk: Path, tmp_path: Path, workers: int) -> None:
    """Said with the path; with more room, the build goes on."""
    text = write_corpus(tmp_path / "text", num=150)
    with pytest.raises(MachineError, match=r"disk/.*cannot be written \(No space left on device\)"):
        built(small_disk / "out", text, workers=workers)
    with pytest.raises(UserError, match="no token shards here"):
        open_split(small_disk / "out", 0, "train")
    finished = len([*corpus_folder(small_disk / "out", 0).glob("part-*.json")])
    assert finished > 5
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    built(small_disk / "out", text, workers=workers)
    built(tmp_path / "whole", text)
    assert contents(small_disk / "out") == contents(tmp_path / "whole")


def test_a_disk_that_cannot_be_written(small_disk: Path, tmp_path: Path) -> None:
    """Whole shards on it are read nevertheless."""
    text = write_corpus(tmp_path / "text", num=5)
    built(small_disk / "out", text)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(MachineError, match=r"data\.folder=.*disk/new: cannot be written \(Read-only file"):
        built(small_disk / "new", text)
    train, _ = built(small_disk / "out", text)
    train.verify()


def test_no_permission(tmp_path: Path) -> None:
    """As a user who may not write there."""
    text = write_corpus(tmp_path / "text", num=5)
    (tmp_path / "closed").mkdir(mode=0o555)
    program = f"""
import os, sys
from pathlib import Path
from colossus.data.build import build
from colossus.errors import MachineError
from tests.data.building import request_for
request = request_for({str(text)!r})
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
try:
    build(request, Path({str(tmp_path / "closed" / "out")!r}))
except MachineError as error:
    print(error)
"""
    for folder in (tmp_path, *tmp_path.parents):  # which others may enter
        if folder.stat().st_uid == os.geteuid() and folder.is_relative_to(tmp_path.parents[1]):
            folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = f"data.folder={tmp_path / 'closed' / 'out'}: cannot be written (Permission denied)\n"
    assert done.stdout == expected


def test_a_file_below_which_nothing_can_lie(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text", num=5)
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"data\.folder=.*file/out: cannot be written"):
        built(tmp_path / "file" / "out", text)


def test_bad_text_in_a_worker_is_said_as_it_is(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.jsonl").write_text('{"text": "good"}\n' * 3 + ('{"text": 3}\n' if i == 2 else ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "SHARD_BYTES", 10)
        with pytest.raises(UserError, match=r"data\.text_field=text: no text under this name at .*2\.jsonl"):
            built(tmp_path / "out", text, workers=2)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Much more text, in large documents, takes a little more (benchmarks/data_speed.py has 1 GB)."""
    program = """
import sys, resource
from pathlib import Path
from tests.data.building import built, open_corpus
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
built(Path(sys.argv[1]) / "first", Path(sys.argv[2]), tokenizer="bpe")
first = peak()
built(Path(sys.argv[1]) / "second", Path(sys.argv[3]), tokenizer="bpe")
print(peak() - first)
"""
    small, large = write_corpus(tmp_path / "small", num=2, size=5 * 10**5), tmp_path / "large"
    large.mkdir()
    text = (small / "000.txt").read_text()
    (large / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"{i}\n" + text * 6}) + "\n" for i in range(4))
    )
    words = [sys.executable, "-c", program, str(tmp_path), str(small), str(large)]
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell the peak")
    grown = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert grown < 120 * 1024


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


def test_the_journal_is_gone_at_the_end(tmp_path: Path) -> None:
    built(tmp_path / "out", in_memory([f"document {i}" for i in range(50)], parts=5))
    names = {path.name for path in corpus_folder(tmp_path / "out", 0).iterdir()}
    assert not [name for name in names if name.startswith("part-") or name.endswith(".part")]
    request = json.loads((tmp_path / "out" / "request.json").read_text())
    assert request["corpora"] == ["given"]


def test_journals_go_that_a_build_killed_at_its_end_left(tmp_path: Path) -> None:
    corpus = in_memory([f"document {i}" for i in range(50)], parts=5)
    built(tmp_path / "out", corpus)
    whole = contents(tmp_path / "out")
    left = corpus_folder(tmp_path / "out", 0) / "part-00003.json"
    left.write_text("{}")
    built(tmp_path / "out", corpus)
    assert contents(tmp_path / "out") == whole and not left.exists()
